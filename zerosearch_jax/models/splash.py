"""Splash attention, JAX's own TPU kernel, for packed rows on a mesh.

It scores block by block on the chip: the `[N, T, T]` weights never reach its memory, and blocks
above the diagonal are left out. Off a TPU the kernel is interpreted, which is for tests alone.
"""

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel import mesh as mesh_lib

BLOCKS = (512, 256, 128)  # tokens of a block; the largest that divides the row is taken


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, mesh: jax.sharding.Mesh
) -> jax.Array:
    """Causal attention within segments: `[B, T, N, H]`, as `transformer.packed_attention`.

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
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[1])
        kernel = splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))

    heads = PartitionSpec(mesh_lib.ROWS, "tensor")
    rows = PartitionSpec(mesh_lib.ROWS)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(heads,) * 3 + (rows,), out_specs=heads, check_vma=False
    )
    # The kernel scales nothing and wants heads before tokens.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    return mapped(q, k, v, segment_ids).transpose(0, 2, 1, 3)
