"""How the vocabulary is visited in chunks: what `vocabulary_chunks` and `losses.head_divergences` are written with.

A `Head` is rows of hidden states and the table whose dot products with them are logits. `fold` visits the table chunk
by chunk; a `Block` is one chunk with its logits [N, C]. `Softmax` keeps a running maximum and a running sum, as
attention kernels do. `backpropagate` turns a gradient of the logits, by chunks, into gradients of the head's parts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

Carry = TypeVar("Carry")

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 logits: much larger leaves the cache, much smaller starves the products
SMALLEST_CHUNK = 512


class Plan(NamedTuple):
    """How the vocabulary is cut; static."""

    size: int  # V
    chunk: int  # C
    count: int  # number of chunks, count * C >= V; if more, the last chunk overlaps the one before


def plan_chunks(size: int, rows: int, chunk: int | None) -> Plan:
    """Cuts V tokens into chunks of C; for None, into equal chunks whose logits for `rows` rows stay in the cache."""
    if chunk is None:
        count = math.ceil(size / max(CHUNK_ELEMENTS // max(rows, 1), SMALLEST_CHUNK))
        chunk = math.ceil(math.ceil(size / count) / 16) * 16
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive int or None, got {chunk!r}")
    chunk = min(chunk, size)
    return Plan(size, chunk, math.ceil(size / chunk))


class Head(NamedTuple):
    """Rows of logits that are not computed yet: scale * hidden · table, or scale * cap * tanh(hidden · table / cap)."""

    hidden: Array  # [N, D]
    table: Array  # [V, D], or [D, V] if axis is 1
    scale: Array  # [] 1 / temperature
    cap: Array | None  # [] soft cap of the products; None leaves them alone
    axis: int  # where the vocabulary lies in the table; static

    @property
    def dtype(self) -> Any:
        """Dtype of logits and sums, at least float32."""
        return jnp.result_type(jnp.float32, self.hidden, self.table)


Parts = tuple[Array, Array, Array, Array | None]
"""Hidden states, table, scale and cap of a head: what of it may be traced."""


def make_head(
    hidden: Array,
    table: Array,
    temperature: ArrayLike,
    soft_cap: ArrayLike | None,
    vocabulary_axis: int,
    *,
    name: str = "",
) -> tuple[Head, tuple[int, ...]]:
    """A head with its token axes flattened and its cap stopped, and the shape of those axes.

    Raises:
      ValueError: for a table or axis that does not fit, with `name` before the arguments' names.
    """
    hidden, table = jnp.asarray(hidden), jnp.asarray(table)
    if vocabulary_axis not in (0, 1):
        raise ValueError(
            f"{name}vocabulary_axis must be 0 (table [V, D]) or 1 (kernel [D, V]), got {vocabulary_axis!r}"
        )
    if hidden.ndim < 1 or table.ndim != 2 or table.shape[1 - vocabulary_axis] != hidden.shape[-1]:
        layout = "[D, V]" if vocabulary_axis else "[V, D]"
        raise ValueError(
            f"{name}table must be {layout} with vocabulary_axis={vocabulary_axis} and D as in {name}hidden "
            f"{hidden.shape}, got {table.shape}"
        )
    dtype = jnp.result_type(jnp.float32, hidden, table)
    flat = hidden.reshape(-1, hidden.shape[-1])
    cap = None if soft_cap is None else lax.stop_gradient(jnp.asarray(soft_cap, dtype))
    return Head(flat, table, 1.0 / jnp.asarray(temperature, dtype), cap, vocabulary_axis), hidden.shape[:-1]


def make_heads(
    hidden: Array,
    table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    temperature: ArrayLike,
    soft_cap: ArrayLike | None,
    teacher_soft_cap: ArrayLike | None,
    vocabulary_axis: int,
    teacher_vocabulary_axis: int | None,
) -> tuple[Head, Head, tuple[int, ...]]:
    """The heads of a student and its stopped teacher at one stopped temperature, and the shape of the token axes."""
    temperature = lax.stop_gradient(temperature)
    student, shape = make_head(hidden, table, temperature, soft_cap, vocabulary_axis)
    axis = vocabulary_axis if teacher_vocabulary_axis is None else teacher_vocabulary_axis
    teacher, teacher_shape = make_head(
        teacher_hidden, teacher_table, temperature, teacher_soft_cap, axis, name="teacher_"
    )
    if teacher_shape != shape:
        raise ValueError(f"hidden and teacher_hidden must agree but for the width, got axes {shape}, {teacher_shape}")
    size, teacher_size = student.table.shape[vocabulary_axis], teacher.table.shape[axis]
    if teacher_size != size:
        raise ValueError(f"student and teacher must share one vocabulary, got V = {size} and {teacher_size}")
    stopped = teacher._replace(hidden=lax.stop_gradient(teacher.hidden), table=lax.stop_gradient(teacher.table))
    return student, stopped, shape


def flat_tokens(tokens: Array, shape: tuple[int, ...]) -> Array:
    """[N] the ids of [...] tokens. Raises ``TypeError`` or ``ValueError`` if they are not integers of that shape."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.shape != shape:
        raise ValueError(f"tokens must have shape {shape}, one id per hidden state, got {tokens.shape}")
    return tokens.reshape(-1)


class Block(NamedTuple):
    """One chunk of a head's vocabulary."""

    ids: Array  # [C] which tokens
    embeddings: Array  # [C, D], or [D, C] if the head's axis is 1
    logits: Array  # [N, C]
    fresh: Array | None  # [C] bool, tokens that no earlier chunk has seen; None if all
    bend: Array | None  # [N, C] slope of the cap, ∂logit / ∂(scale * product); None without a cap


def capped(head: Head, products: Array) -> tuple[Array, Array | None]:
    """Logits of products hidden · e, and the slope of the head's cap there."""
    if head.cap is None:
        return products * head.scale, None
    bounded = jnp.tanh(products / head.cap)
    return bounded * (head.cap * head.scale), 1.0 - jnp.square(bounded)


def block(plan: Plan, head: Head, index: Array) -> Block:
    """Chunk number `index` with its logits."""
    start = jnp.minimum(index * plan.chunk, plan.size - plan.chunk)
    embeddings = lax.dynamic_slice_in_dim(head.table, start, plan.chunk, head.axis)
    narrow = jnp.result_type(head.hidden, head.table)
    products = lax.dot_general(
        head.hidden.astype(narrow),
        embeddings.astype(narrow),
        (((1,), (1 - head.axis,)), ((), ())),
        preferred_element_type=head.dtype,
    )
    ids = start + jnp.arange(plan.chunk)
    overlap = plan.count * plan.chunk != plan.size
    logits, bend = capped(head, products)
    return Block(ids, embeddings, logits, ids >= index * plan.chunk if overlap else None, bend)


def unseen(part: Block, x: Array, fill: ArrayLike) -> Array:
    """x [N, C] with `fill` in the columns that an earlier chunk has counted already."""
    return x if part.fresh is None else jnp.where(part.fresh[None], x, fill)


def fold(plan: Plan, step: Callable[[Carry, Array], Carry], carry: Carry) -> Carry:
    """``carry = step(carry, chunk index)`` over all chunks; a single chunk needs no loop."""
    if plan.count == 1:
        return step(carry, jnp.int32(0))
    return lax.scan(lambda c, index: (step(c, index), None), carry, jnp.arange(plan.count, dtype=jnp.int32))[0]


def bent(part: Block, weights: Array) -> Array:
    """Weights [N, C] of logits as weights of the products hidden · e: times the slope of the cap, if there is one."""
    return weights if part.bend is None else weights * part.bend


def mixture(head: Head, weights: Array, embeddings: Array) -> Array:
    """Σ_v weights_v e_v: [N, C] with a chunk of the table -> [N, D]."""
    return lax.dot_general(weights, embeddings.astype(weights.dtype), (((1,), (head.axis,)), ((), ())))


class Chosen(NamedTuple):
    """The logits of given tokens, one per row."""

    logits: Array  # [N]
    slopes: Array  # [N, D] ∂logit / ∂hidden / scale


def chosen_tokens(head: Head, tokens: Array) -> Chosen:
    """Logits of tokens [N] from the table's vectors of them; NaN for an id outside [0, V)."""
    size = head.table.shape[head.axis]
    vectors = jnp.take(head.table, jnp.where(tokens < 0, size, tokens), axis=head.axis, mode="fill", fill_value=jnp.nan)
    vectors = (vectors if head.axis == 0 else vectors.T).astype(head.dtype)
    logits, bend = capped(head, jnp.sum(head.hidden.astype(head.dtype) * vectors, axis=-1))
    return Chosen(logits, vectors if bend is None else vectors * bend[:, None])


class Softmax(NamedTuple):
    """Running softmax statistics of rows of logits."""

    maximum: Array  # [N]
    total: Array  # [N] Σ exp(logit - maximum)

    @property
    def log_normaliser(self) -> Array:
        """[N] log Σ exp(logit)."""
        return self.maximum + jnp.log(self.total)


class Step(NamedTuple):
    """What a chunk did to a `Softmax`."""

    weights: Array  # [N, C] exp(logit - new maximum), 0 in columns counted already
    decay: Array  # [N] what older sums of such weights shrink by
    shift: Array  # [N] old maximum - new maximum, <= 0


def init_softmax(head: Head) -> Softmax:
    """Statistics before the first chunk."""
    rows = head.hidden.shape[0]
    lowest = jnp.finfo(head.dtype).min / 2  # half, so that subtracting any logit from it stays finite
    return Softmax(jnp.full(rows, lowest, head.dtype), jnp.zeros(rows, head.dtype))


def update_softmax(softmax: Softmax, part: Block) -> tuple[Softmax, Step]:
    """Statistics after one more chunk."""
    logits = unseen(part, part.logits, -jnp.inf)
    maximum = jnp.maximum(softmax.maximum, jnp.max(logits, axis=-1))
    shift = softmax.maximum - maximum
    step = Step(jnp.exp(logits - maximum[:, None]), jnp.exp(shift), shift)
    return Softmax(maximum, softmax.total * step.decay + jnp.sum(step.weights, axis=-1)), step


def any_nonzero(*cotangents: Array) -> Array:
    """[N] bool, rows that somebody uses; a row whose cotangents are all exactly 0 may hold NaN."""
    return jnp.any(jnp.stack(cotangents) != 0, axis=0)


class HeadGradient(NamedTuple):
    """Gradients with respect to the parts of a `Head`."""

    hidden: Array  # [N, D]
    table: Array  # like the table
    scale: Array  # []


def cap_gradient(cap: Array | None) -> Array | None:
    """The gradient with respect to a cap, which is a constant of the model."""
    return None if cap is None else jnp.zeros_like(cap)


def scale_gradient(head: Head, hidden_gradient: Array) -> Array:
    """∂/∂scale from ∂/∂hidden: a function of scale * hidden alone has scale ∂/∂scale = Σ hidden · ∂/∂hidden.

    Not for a head with a cap, whose logits are not a function of that product.
    """
    products = jnp.where(hidden_gradient != 0, head.hidden.astype(head.dtype) * hidden_gradient, 0.0)
    return jnp.sum(products) / head.scale


def backpropagate(
    plan: Plan, head: Head, used: Array, logits_gradient: Callable[[Array, Block], Array]
) -> HeadGradient:
    """Gradients of a head from `logits_gradient(index, block)` [N, C], that of the scaled logits; unused rows give 0.

    The table's gradient is written once, chunk by chunk, in the table's own layout. Under `jit` a gradient that nobody
    uses costs nothing, and a single chunk's logits are not computed again.
    """
    rows = jnp.where(used[:, None], head.hidden, 0).astype(head.dtype)

    def step(carry: tuple[Array, Array, Array], index: Array) -> tuple[Array, Array, Array]:
        hidden, table, scale = carry
        part = block(plan, head, index)
        gradient = jnp.where(used[:, None], logits_gradient(index, part) * head.scale, 0.0)
        weights = jnp.where(used[:, None], bent(part, gradient), 0.0)
        left, right = (weights, rows) if head.axis == 0 else (rows, weights)
        columns = lax.dot_general(left, right, (((0,), (0,)), ((), ()))).astype(table.dtype)
        table = lax.dynamic_update_slice_in_dim(table, columns, part.ids[0], head.axis)
        if head.cap is not None:
            products = jnp.where(used[:, None], unseen(part, gradient * part.logits, 0.0), 0.0)
            scale += jnp.sum(products) / jnp.square(head.scale)
        return hidden + mixture(head, unseen(part, weights, 0.0), part.embeddings), table, scale

    start = jnp.zeros(head.hidden.shape, head.dtype), jnp.zeros_like(head.table), jnp.zeros((), head.dtype)
    hidden, table, scale = fold(plan, step, start)
    scale = scale_gradient(head, hidden) if head.cap is None else scale
    return HeadGradient(hidden.astype(head.hidden.dtype), table, scale)
