"""Where texts come from and how they become batches: verified downloads, tokenizers, padding, resumable order.

Files become rows (`readers`), rows examples (`formats`), examples token lists (`encoding`, by a tokenizer and its chat
template), and those batches (`collation`, `batches`, or `packing`), in an order that resumes (`batches`, or grain by
`pipeline`).
"""

from rlhf_jax.data.batches import BatchStream, DataPosition, epoch_plan, preference_batch, token_batch
from rlhf_jax.data.chat import assistant_spans, render_chat
from rlhf_jax.data.collation import (
    ResponsesBatch,
    StepwiseBatch,
    UnpairedBatch,
    batch_completions,
    batch_preferences,
    batch_ranked,
    batch_rated,
    batch_stepwise,
    batch_unpaired,
)
from rlhf_jax.data.encoding import EncodedRow, encode_conversation, encode_pair, encode_prompt, encode_text, row_batch
from rlhf_jax.data.folder_tokenizer import FolderTokenizer, check_embedding, load_tokenizer
from rlhf_jax.data.formats import FORMATS, Format, detect_format, split_prompt
from rlhf_jax.data.packing import PackedBatch, choose_buckets, pack, packed_batch, unpack
from rlhf_jax.data.pipeline import PlanSource, batch_dataset
from rlhf_jax.data.readers import Rows, read_examples, read_rows
from rlhf_jax.data.tokenizer import ByteTokenizer, Tokenizer, load_gguf_tokenizer

__all__ = [
    "FORMATS",
    "BatchStream",
    "ByteTokenizer",
    "DataPosition",
    "EncodedRow",
    "FolderTokenizer",
    "Format",
    "PackedBatch",
    "PlanSource",
    "ResponsesBatch",
    "Rows",
    "StepwiseBatch",
    "Tokenizer",
    "UnpairedBatch",
    "assistant_spans",
    "batch_completions",
    "batch_dataset",
    "batch_preferences",
    "batch_ranked",
    "batch_rated",
    "batch_stepwise",
    "batch_unpaired",
    "check_embedding",
    "choose_buckets",
    "detect_format",
    "encode_conversation",
    "encode_pair",
    "encode_prompt",
    "encode_text",
    "epoch_plan",
    "load_gguf_tokenizer",
    "load_tokenizer",
    "pack",
    "packed_batch",
    "preference_batch",
    "read_examples",
    "read_rows",
    "render_chat",
    "row_batch",
    "split_prompt",
    "token_batch",
    "unpack",
]
