"""Folders as Hugging Face writes them: read into our decoder, and written from it.

`load_pretrained` and `save_pretrained` are inverse to each other, bit for bit. What a family is, is said in `families`;
how tensors are cut and turned, in `tensors`; how files are read, in `safetensors`. No pickle is ever opened.
"""

from rlhf_jax.models.huggingface.families import FAMILIES, Family, read_config, tensor_plan, write_config
from rlhf_jax.models.huggingface.peft import PeftAdapters, load_peft, save_peft
from rlhf_jax.models.huggingface.pretrained import check_vocabulary, load_pretrained, save_pretrained
from rlhf_jax.models.huggingface.tensors import params_from_tensors, tensors_from_params

__all__ = [
    "FAMILIES",
    "Family",
    "PeftAdapters",
    "check_vocabulary",
    "load_peft",
    "load_pretrained",
    "params_from_tensors",
    "read_config",
    "save_peft",
    "save_pretrained",
    "tensor_plan",
    "tensors_from_params",
    "write_config",
]
