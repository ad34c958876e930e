"""Analytic cost of a program on a chip: FLOPs, HBM bytes and a lower bound in seconds.

XLA's cost analysis counts a loop's body once and knows no trip counts. So the cost is derived here
from the model's sizes. A product reads both operands once and writes its result once. Norms,
rotations, the softmax and copies are left out. The seconds are a lower bound, not a forecast.

Axis letters as in `models.transformer`: D embed, N query heads, K key-value heads, H head size,
F MLP, L layers, V vocabulary.
"""

from dataclasses import dataclass

from zerosearch_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Chip:
    """Speed and memory of a TPU chip.

    Attributes:
      flops: bfloat16 FLOP/s.
      hbm_bytes: size of the memory.
      hbm: bytes/s of the memory.
      ici: bytes/s of the links that one collective gets: a ring over one torus axis, both
        directions together.
    """

    flops: float
    hbm_bytes: int
    hbm: float
    ici: float


# FLOP/s, HBM size and HBM speed are from the "System architecture" page of each chip at
# cloud.google.com/tpu/docs. Link speeds are from "How to Scale Your Model", part 2
# (jax-ml.github.io/scaling-book/tpus): 4.5e10 bytes/s one way for v5e, 9e10 for v5p and v6e,
# doubled here.
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 9e10),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 1.8e11),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1.8e11),
}


@dataclass(frozen=True)
class Work:
    """One chip's work: floating-point operations and bytes to and from HBM."""

    flops: float
    hbm_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.hbm_bytes * times)


def product(rows: float, inner: int, outer: float, *, weight=2, result=2) -> Work:
    """Work of `[rows, inner]` bfloat16 times `[inner, outer]`.

    Args:
      weight, result: bytes of an element of the second operand and of the result.
    """
    moved = 2 * rows * inner + weight * inner * outer + result * rows * outer
    return Work(2 * rows * inner * outer, moved)


def trunk_products(config: ModelConfig, tokens: float, tensor: int, weight: int = 2) -> Work:
    """Work of all layers' weight products for `tokens`, on one of `tensor` chips."""
    d, h, f = config.embed_dim, config.head_dim, config.mlp_dim / tensor
    n, k = config.num_heads / tensor, config.num_kv_heads / tensor
    shapes = ((d, n * h), (d, k * h), (d, k * h), (n * h, d), (d, f), (d, f), (f, d))
    layer = Work(0, 0)
    for inner, outer in shapes:
        layer += product(tokens, inner, outer, weight=weight)
    return layer * config.num_layers


def vocab_product(config: ModelConfig, tokens: float, tensor: int, weight: int = 2) -> Work:
    """Work of the float32 logits of `tokens`."""
    outer = config.vocab_size / tensor
    return product(tokens, config.embed_dim, outer, weight=weight, result=4)


def attention(config: ModelConfig, *, queries: float, keys: float, pairs: float, tensor: int):
    """Work of both attention products of all layers; the scores never reach HBM.

    Args:
      queries, keys: tokens whose queries, or keys and values, are read from HBM, over all rows.
      pairs: query-key pairs that are scored.
    """
    n, k, h = config.num_heads / tensor, config.num_kv_heads / tensor, config.head_dim
    one = Work(4 * pairs * n * h, 2 * h * (2 * queries * n + 2 * keys * k))
    return one * config.num_layers


def causal_pairs(length: int, block: int) -> float:
    """Query-key pairs of one row if each block of queries scores all keys up to its own end."""
    full, rest = divmod(length, block)
    return block * block * full * (full + 1) / 2 + rest * length


def logprob_work(config: ModelConfig, *, rows: float, length: int, tensor: int) -> Work:
    """Work of one chip for the log-probs of `rows` rows of `length` tokens, without gradients."""
    tokens = rows * length
    return (
        trunk_products(config, tokens, tensor)
        + attention(
            config,
            queries=tokens,
            keys=tokens,
            pairs=rows * causal_pairs(length, SPLASH_BLOCK),
            tensor=tensor,
        )
        + vocab_product(config, tokens, tensor)
    )


SPLASH_BLOCK = 512  # tokens
# Each product runs once forward and once for the gradient of each operand.
PASSES = 3
# Splash's forward kernel has two products, its two backward kernels have three and four.
ATTENTION_PASSES = 1 + 7 / 2


def training_work(
    config: ModelConfig, *, rows: float, length: int, tensor: int, remat: str
) -> Work:
    """Work of one chip for the gradients of one microbatch.

    Args:
      rows, length: the chip's rows of the microbatch, and tokens per row.
      remat: "full" recomputes the layers, except their last product, whose result no gradient
        needs; "dots" recomputes only the attention; "none" recomputes nothing.
    """
    tokens = rows * length
    pairs = rows * causal_pairs(length, SPLASH_BLOCK)
    last = product(tokens, config.mlp_dim / tensor, config.embed_dim) * config.num_layers
    again = {"none": 0, "dots": 0, "full": 1}[remat]
    attention_again = {"none": 0, "dots": 1, "full": 1}[remat]
    scores = attention(config, queries=tokens, keys=tokens, pairs=pairs, tensor=tensor)
    return (
        trunk_products(config, tokens, tensor) * (PASSES + again)
        + last * -again
        + scores * (ATTENTION_PASSES + attention_again)
        + vocab_product(config, tokens, tensor) * (PASSES + 1)  # Logits are computed twice.
    )


def adamw_work(parameters: float) -> Work:
    """Work of AdamW on one chip's `parameters`.

    It reads and writes parameters and both moments and reads gradients, all in float32.
    """
    return Work(15 * parameters, 7 * 4 * parameters)


def prefill_work(
    config: ModelConfig, *, rows: float, tokens: int, window: int, tensor: int, weight: int
) -> Work:
    """Work of a prefill of `tokens` per row after `window` cached tokens, without logits."""
    pairs = rows * tokens * (window + tokens)
    keys = rows * (window + tokens)
    scores = attention(config, queries=rows * tokens, keys=keys, pairs=pairs, tensor=tensor)
    return trunk_products(config, rows * tokens, tensor, weight) + scores


def decode_work(
    config: ModelConfig, *, rows: float, chunk_tokens: int, window: int, tensor: int, weight: int
) -> Work:
    """Work of a decode chunk of `chunk_tokens` per row, after `window` cached tokens."""
    keys = rows * (window + chunk_tokens)
    step = (
        trunk_products(config, rows, tensor, weight)
        + attention(config, queries=rows, keys=keys, pairs=keys, tensor=tensor)
        + vocab_product(config, rows, tensor, weight)
    )
    return step * chunk_tokens


@dataclass(frozen=True)
class Bound:
    """Least seconds for compute, memory and links; the slowest of them bounds the program."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Least seconds of the program if all three overlap perfectly."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def name(self) -> str:
        """The slowest of the three."""
        return max(("compute", "hbm", "interconnect"), key=lambda part: getattr(self, part))


def bound(work: Work, collective_bytes: float, chip: Chip) -> Bound:
    """The roofline of a program that sends `collective_bytes` over the chip's links."""
    return Bound(work.flops / chip.flops, work.hbm_bytes / chip.hbm, collective_bytes / chip.ici)
