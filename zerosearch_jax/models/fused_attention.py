"""Fused attention kernels for packed rows on a mesh: splash attention (TPU) and cuDNN (GPU).

They never write the attention weights `[N, T, T]` to memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel import mesh as mesh_lib

BLOCKS = (512, 256, 128)  # splash block sizes in tokens; the largest that divides T is used
CUDNN_HEAD_DIM = 128  # largest head size that cuDNN accepts; head sizes must be multiples of 8


def kernel_for(device: jax.Device, dtype: Any, head_dim: int) -> str:
    """Returns the key in `attention.ATTENTIONS` of the best kernel for a device and model.

    The cuDNN kernel needs a 16-bit dtype and an NVIDIA GPU of compute capability 8 (Ampere) or
    later.
    """
    if device.platform == "tpu":
        return "splash"
    if device.platform == "gpu":
        # NVIDIA reports "9.0" and AMD a name such as "gfx90a".
        generation = device.compute_capability.partition(".")[0]
        new = generation.isdigit() and int(generation) >= 8
        narrow = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        if new and narrow and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM:
            return "cudnn"
    return "xla"


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, mesh: jax.sharding.Mesh
) -> jax.Array:
    """Causal attention within segments, like `attention.packed_attention`, for TPUs.

    Blocks above the diagonal are skipped. On other devices Pallas interprets the kernel, which is
    slow and serves tests only.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, T, K, H]`. Heads are split over `tensor`, rows over the data
        axes.
      segment_ids: `[B, T]` int32.

    Returns:
      `[B, T, N, H]`.

    Raises:
      UserError: T is not a multiple of the smallest block.
    """
    length = q.shape[1]
    block = next((size for size in BLOCKS if length % size == 0), None)
    if block is None:
        raise UserError(
            f"splash attention needs rows of a multiple of {BLOCKS[-1]} tokens, not {length}; "
            "fix config.learner.row_tokens"
        )
    sides = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{side}": block for side in sides})
    interpret = mesh.devices.flat[0].platform != "tpu"

    def local(q, k, v, segments):
        # The kernel does not scale queries and expects heads before tokens.
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
    """Like `splash_attention`, with cuDNN's fused kernel for NVIDIA GPUs, bfloat16 or float16.

    The segment mask becomes a bias `[B, 1, T, T]` that all heads share.
    """

    def local(q, k, v, segments):
        same = segments[:, :, None] == segments[:, None, :]
        return jax.nn.dot_product_attention(
            q, k, v, mask=same[:, None], is_causal=True, implementation="cudnn"
        )

    return _on_shards(local, mesh)(q, k, v, segment_ids)


def _on_shards(local: Callable[..., jax.Array], mesh: jax.sharding.Mesh) -> Callable:
    """Wraps `local(q, k, v, segments)` so that each device runs its rows and heads."""
    heads = PartitionSpec(mesh_lib.ROWS, None, "tensor")
    rows = PartitionSpec(mesh_lib.ROWS)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(heads,) * 3 + (rows,), out_specs=heads, check_vma=False
    )
