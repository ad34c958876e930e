"""Attention kernels that never write the `[N, T, T]` weights to memory, for packed rows on a mesh:
splash attention, JAX's own for TPU, and cuDNN's for GPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel import mesh as mesh_lib

BLOCKS = (512, 256, 128)  # splash: tokens of a block; the largest that divides the row is taken
CUDNN_HEAD_DIM = 128  # cuDNN: the largest head, and every head a multiple of 8


def kernel_for(device: jax.Device, dtype: Any, head_dim: int) -> str:
    """The best kernel for whole rows on such a device: a key of `transformer.ATTENTIONS`.

    cuDNN's takes 16-bit numbers on NVIDIA GPUs of compute capability 8 (Ampere) or later.
    """
    if device.platform == "tpu":
        return "splash"
    if device.platform == "gpu":
        generation = device.compute_capability.partition(".")[0]  # of another maker: a name
        new = generation.isdigit() and int(generation) >= 8
        narrow = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        if new and narrow and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM:
            return "cudnn"
    return "xla"


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, mesh: jax.sharding.Mesh
) -> jax.Array:
    """Causal attention within segments: `[B, T, N, H]`, as `transformer.packed_attention`.

    Blocks above the diagonal are left out. Off a TPU the kernel is interpreted, for tests alone.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`; heads over `tensor`, rows over the data axes.
      segment_ids: `[B, T]` int32.

    Raises:
      UserError: T is no multiple of the smallest block.
    """
    length = q.shape[1]
    block = next((size for size in BLOCKS if length % size == 0), None)
    if block is None:
        raise UserError(
            f"splash attention needs rows of a multiple of {BLOCKS[-1]} tokens, not {length}; "
            "change config.learner.row_tokens"
        )
    sides = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{side}": block for side in sides})
    interpret = mesh.devices.flat[0].platform != "tpu"

    def local(q, k, v, segments):
        # The kernel scales nothing and wants heads before tokens.
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[1])
        kernel = splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
        return out.transpose(0, 2, 1, 3)

    return _on_shards(local, mesh)(q, k, v, segment_ids)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, mesh: jax.sharding.Mesh
) -> jax.Array:
    """As `splash_attention`, by cuDNN's fused kernel: NVIDIA GPUs, bfloat16 or float16.

    The segments' mask is a bias `[B, 1, T, T]`, one for all heads.
    """

    def local(q, k, v, segments):
        same = segments[:, :, None] == segments[:, None, :]
        return jax.nn.dot_product_attention(
            q, k, v, mask=same[:, None], is_causal=True, implementation="cudnn"
        )

    return _on_shards(local, mesh)(q, k, v, segment_ids)


def _on_shards(local: Callable[..., jax.Array], mesh: jax.sharding.Mesh) -> Callable:
    """`local(q, k, v, segments)` for each device's own rows and heads."""
    heads = PartitionSpec(mesh_lib.ROWS, None, "tensor")
    rows = PartitionSpec(mesh_lib.ROWS)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(heads,) * 3 + (rows,), out_specs=heads, check_vma=False
    )
