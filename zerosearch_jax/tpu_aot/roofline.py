"""What a program costs on a chip, from the model's sizes: FLOPs, HBM bytes, seconds at least.

XLA's cost analysis counts a loop's body once and knows no trip counts, so the figures are derived
here. A product reads both operands once and writes its result once; norms, rotations and the
softmax are left out, as are copies. So the seconds are a lower bound, not a forecast.

Axis letters as in `models.transformer`: D embed, N query heads, K key-value heads, H head size,
F MLP, L layers, V vocabulary.
"""

from dataclasses import dataclass

from zerosearch_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Chip:
    """A TPU chip: bfloat16 FLOP/s, HBM bytes, HBM bytes/s, interconnect bytes/s.

    Attributes:
      ici: of a ring over one torus axis, both directions together: what one collective gets.
    """

    flops: float
    hbm_bytes: int
    hbm: float
    ici: float


# FLOP/s, HBM size and speed: cloud.google.com/tpu/docs, "System architecture" of each. Links:
# "How to Scale Your Model", part 2 (jax-ml.github.io/scaling-book/tpus): 4.5e10 bytes/s one way
# for v5e, 9e10 for v5p and v6e, doubled.
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 9e10),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 1.8e11),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1.8e11),
}


@dataclass(frozen=True)
class Work:
    """What one chip does: floating-point operations and bytes to and from HBM."""

    flops: float
    hbm_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.hbm_bytes * times)


def product(rows: float, inner: int, outer: float, *, weight=2, result=2) -> Work:
    """`[rows, inner]` bfloat16 times `[inner, outer]`; `weight`, `result`: bytes of an element."""
    moved = 2 * rows * inner + weight * inner * outer + result * rows * outer
    return Work(2 * rows * inner * outer, moved)


def trunk_products(config: ModelConfig, tokens: float, tensor: int, weight: int = 2) -> Work:
    """All layers' matrix products for `tokens` on one chip of `tensor` that share the heads."""
    d, h, f = config.embed_dim, config.head_dim, config.mlp_dim / tensor
    n, k = config.num_heads / tensor, config.num_kv_heads / tensor
    shapes = ((d, n * h), (d, k * h), (d, k * h), (n * h, d), (d, f), (d, f), (f, d))
    layer = Work(0, 0)
    for inner, outer in shapes:
        layer += product(tokens, inner, outer, weight=weight)
    return layer * config.num_layers


def vocab_product(config: ModelConfig, tokens: float, tensor: int, weight: int = 2) -> Work:
    """Float32 logits of `tokens`."""
    outer = config.vocab_size / tensor
    return product(tokens, config.embed_dim, outer, weight=weight, result=4)


def attention(config: ModelConfig, *, queries: float, keys: float, pairs: float, tensor: int):
    """Both products of all layers' attention, with the scores kept on the chip.

    Args:
      queries, keys: tokens read as such from HBM, of all rows together.
      pairs: query-key pairs that are scored.
    """
    n, k, h = config.num_heads / tensor, config.num_kv_heads / tensor, config.head_dim
    one = Work(4 * pairs * n * h, 2 * h * (2 * queries * n + 2 * keys * k))
    return one * config.num_layers


def causal_pairs(length: int, block: int) -> float:
    """Pairs that one row scores when its blocks of queries look at the keys up to their end."""
    full, rest = divmod(length, block)
    return block * block * full * (full + 1) / 2 + rest * length


def scored(config: ModelConfig, *, rows: float, length: int, tensor: int) -> Work:
    """Log-probs of all targets of `rows` on one chip, without a gradient."""
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
# Passes over the products of a forward pass: itself, the gradients of both operands.
PASSES = 3
# Splash's two backward kernels take three and four products where the forward pass takes two.
ATTENTION_PASSES = 1 + 7 / 2


def trained(config: ModelConfig, *, rows: float, length: int, tensor: int, remat: str) -> Work:
    """Gradients of one microbatch of `rows` on one chip.

    Args:
      remat: "full" computes the layers once more, but for their last product, whose result no
        gradient needs; "dots" their attention alone; "none" neither.
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
        + vocab_product(config, tokens, tensor) * (PASSES + 1)  # logits are computed twice
    )


def updated(parameters: float) -> Work:
    """AdamW on `parameters` of one chip: they and both moments read and written, gradients read."""
    return Work(15 * parameters, 7 * 4 * parameters)


def prefilled(config: ModelConfig, *, rows: float, tokens: int, window: int, tensor: int, weight):
    """`tokens` a row behind a window of cached ones; no logits."""
    pairs = rows * tokens * (window + tokens)
    keys = rows * (window + tokens)
    scores = attention(config, queries=rows * tokens, keys=keys, pairs=pairs, tensor=tensor)
    return trunk_products(config, rows * tokens, tensor, weight) + scores


def decoded(config: ModelConfig, *, rows: float, burst: int, window: int, tensor: int, weight):
    """`burst` tokens a row, each behind the window and what the burst has written."""
    keys = rows * (window + burst)
    step = (
        trunk_products(config, rows, tensor, weight)
        + attention(config, queries=rows, keys=keys, pairs=keys, tensor=tensor)
        + vocab_product(config, rows, tensor, weight)
    )
    return step * burst


@dataclass(frozen=True)
class Bound:
    """Seconds that each of a chip's parts needs at least; the slowest is the program's bound."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The program's seconds if all three work at once."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def name(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "hbm", "interconnect"), key=lambda part: getattr(self, part))


def bound(work: Work, collective_bytes: float, chip: Chip) -> Bound:
    """The roofline of a program that also sends `collective_bytes` over the chip's links."""
    return Bound(work.flops / chip.flops, work.hbm_bytes / chip.hbm, collective_bytes / chip.ici)
