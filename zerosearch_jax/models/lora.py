"""Low-rank adapters (LoRA, arXiv 2106.09685) on the matrices of the stacked model.

The base weights are frozen and exist once: the policy is the base with adapters, the reference is
the base alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from zerosearch_jax.errors import UserError
from zerosearch_jax.files import atomic_path, write_json
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.decode_weights import SUMMED_AXES
from zerosearch_jax.models.layers import LinearOperator
from zerosearch_jax.models.transformer import PARAM_AXES, abstract_model
from zerosearch_jax.models.weights import NAMES, save_tensors
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.parallel.processes import to_host

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Target -> {"a": [L, *in, r], "b": [L, r, *out]}, where the weight is [L, *in, *out].
Adapters = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class LoRA:
    """Size and targets of the adapters.

    Attributes:
      rank: r, the inner size of an adapter.
      alpha: adapters are multiplied by `alpha / rank` (paper §4.1).
      targets: names from `TARGETS`; every layer's matrix of that name gets an adapter.

    Raises:
      UserError: the rank is below 1, alpha is not above 0, or a target is unknown or none given.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"LoRA: rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise UserError(f"LoRA: alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise UserError(f"LoRA: no targets; choose some of {', '.join(TARGETS)}")
        for name in self.targets:
            if name not in TARGETS:
                raise UserError(f"LoRA: target {name!r} is not one of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """Factor on the product of an adapter's two matrices."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LowRank(LinearOperator):
    """The weight `base + scale · a b`, whose sum is never formed (paper eq. 3).

    It replaces the array `base` in a tree of parameters. Stacked layers add a leading axis to all
    three arrays, which `lax.scan` removes.

    Attributes:
      base: `[*in, *out]`, frozen.
      a: `[*in, r]`.
      b: `[r, *out]`.
      scale: factor on `a b`.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float

    def product(self, rows: jax.Array) -> jax.Array:
        """Multiplies `rows` `[R, in]` by the weight; returns `[R, *out]`.

        The adapter is cast to the dtype of `rows`.
        """
        base = self.base.reshape(rows.shape[1], -1)
        a = self.a.reshape(rows.shape[1], -1).astype(rows.dtype)
        b = self.b.reshape(a.shape[1], -1).astype(rows.dtype)
        out = rows @ base + (self.scale * (rows @ a)) @ b
        return out.reshape(-1, *self.b.shape[1:])


jax.tree_util.register_dataclass(LowRank, data_fields=("base", "a", "b"), meta_fields=("scale",))


def init_adapters(config: ModelConfig, options: LoRA, key: jax.Array) -> Adapters:
    """Returns float32 adapters with no effect yet: `a` is normal with variance 1 / in, `b` zero.

    Each target draws from `key` folded with its index, whatever the other targets are.
    """
    layers = abstract_model(config)[1]["layers"]
    adapters = {}
    for name in options.targets:
        num_layers, *shape = layers[name].shape
        summed = len(SUMMED_AXES[name])
        inner, outer = shape[:summed], shape[summed:]
        noise = jax.random.normal(
            jax.random.fold_in(key, TARGETS.index(name)), (num_layers, *inner, options.rank)
        )
        adapters[name] = {
            "a": noise / math.sqrt(math.prod(inner)),
            "b": jnp.zeros((num_layers, options.rank, *outer)),
        }
    return adapters


def adapted(params: nnx.State, adapters: Adapters, options: LoRA) -> nnx.State:
    """Replaces the targets of stacked parameters by `LowRank` weights, for the forward pass."""

    def low_rank(base, a, b):
        return LowRank(base, a, b, options.scale)

    return _map_targets(params, adapters, options, low_rank)


def merge(params: nnx.State, adapters: Adapters, options: LoRA) -> nnx.State:
    """Adds the adapters to stacked parameters: `W + scale · a b`, in float32, then W's dtype.

    Works under `jit`.
    """

    def one(layer):
        weight, a, b = layer
        # At default precision accelerators round the factors to bfloat16 or TF32.
        change = jnp.tensordot(a, b, axes=1, precision=lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + options.scale * change).astype(weight.dtype)

    # Merge layer by layer, so that the change of only one layer is in memory.
    return _map_targets(params, adapters, options, lambda *stacked: lax.map(one, stacked))


def _map_targets(
    params: nnx.State,
    adapters: Adapters,
    options: LoRA,
    change: Callable[..., jax.Array | LowRank],
) -> nnx.State:
    """Replaces each target's weight by `change(weight, a, b)`."""

    def one(path, leaf):
        if path[-1] not in options.targets:
            return leaf
        adapter = adapters[path[-1]]
        return leaf.replace(change(leaf[...], adapter["a"], adapter["b"]))

    return nnx.map_state(one, params)


def adapter_shardings(
    adapters: Adapters, mesh: jax.sharding.Mesh, rules: mesh_lib.Rules = mesh_lib.TRAIN_RULES
) -> dict[str, dict[str, jax.sharding.NamedSharding]]:
    """Returns the weights' shardings with the rank axis replicated, as a tree like `adapters`.

    Args:
      adapters: arrays or shapes.
    """
    rules = {**rules, "rank": None}

    def one(name, adapter):
        summed = len(SUMMED_AXES[name])
        axes = {
            "a": ("layers", *PARAM_AXES[name][:summed], "rank"),
            "b": ("layers", "rank", *PARAM_AXES[name][summed:]),
        }
        return {
            factor: mesh_lib.sharding(mesh, axes[factor], array.shape, rules)
            for factor, array in adapter.items()
        }

    return {name: one(name, adapter) for name, adapter in adapters.items()}


def save_adapters(
    directory: str | Path,
    adapters: Adapters,
    options: LoRA,
    config: ModelConfig,
    base_name: str,
) -> None:
    """Writes adapters in Hugging Face's PEFT format, which servers load together with the base.

    `adapter_config.json` is written last, so a directory that has one is complete. Every process
    must call this; only process 0 writes.

    Args:
      base_name: directory of the base weights, or their name on the Hugging Face hub.
    """
    contiguous = np.ascontiguousarray  # safetensors needs it
    tensors, modules = {}, []
    for name in options.targets:
        module = NAMES[f"layers.{name}"][0].removesuffix(".weight")
        modules.append(module.rpartition(".")[2])
        a, b = to_host(adapters[name]["a"]), to_host(adapters[name]["b"])
        for layer in range(config.num_layers):
            prefix = f"base_model.model.{module.format(layer)}"
            # PEFT's matrices are [out, in]. NAMES flattens axes in the order that they have here.
            tensors[f"{prefix}.lora_A.weight"] = contiguous(a[layer].reshape(-1, options.rank).T)
            tensors[f"{prefix}.lora_B.weight"] = contiguous(b[layer].reshape(options.rank, -1).T)
    if jax.process_index():
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_path(directory / ADAPTER_WEIGHTS) as part:
        save_tensors(part, tensors)
        (directory / ADAPTER_CONFIG).unlink(missing_ok=True)
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, peft, indent=2)
