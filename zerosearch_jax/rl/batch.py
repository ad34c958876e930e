"""The learner's input on the devices."""

from dataclasses import dataclass, replace

import jax


@dataclass(frozen=True)
class LearnerBatch:
    """Packed batch of M microbatches × R rows × T tokens; a microbatch has the shape `[R, T]`.

    Column t belongs to `targets[t]`, the token that follows `tokens[t]` in the same sequence. Only
    the columns that an update reads are set.
    """

    tokens: jax.Array
    """`[M, R, T]` int32 token ids."""
    targets: jax.Array
    """`[M, R, T]` int32 ids of the next tokens; 0 at a sequence's last token."""
    positions: jax.Array
    """`[M, R, T]` int32 positions, from 0 in each sequence."""
    segment_ids: jax.Array
    """`[M, R, T]` int32 sequence of each token, from 1 within a row; 0 is padding."""
    mask: jax.Array
    """`[M, R, T]` float32 loss weight of each target; 0 for tokens the policy did not write."""
    num_microbatches: jax.Array | None
    """`[]` int32 microbatches that hold any sequence; None in a single microbatch."""
    weights: jax.Array | None = None
    """`[M, R, T]` float32 weight of each token in the mean over the batch."""
    advantages: jax.Array | None = None
    """`[M, R, T]` float32 advantages."""
    old_logprobs: jax.Array | None = None
    """`[M, R, T]` float32 log-probs before the step's first update."""
    ref_logprobs: jax.Array | None = None
    """`[M, R, T]` float32 log-probs under the frozen reference policy."""
    sampler_logprobs: jax.Array | None = None
    """`[M, R, T]` float32 log-probs recorded at sampling."""
    correct: jax.Array | None = None
    """`[M, R, T]` float32, 1 in episodes whose answer matches exactly."""
    values: jax.Array | None = None
    """`[M, R, T]` float32 values before the step's first update."""
    returns: jax.Array | None = None
    """`[M, R, T]` float32 regression targets of the value function."""

    def microbatch(self, i: jax.Array | int) -> "LearnerBatch":
        """Returns microbatch `i`, its arrays `[R, T]`."""
        return jax.tree.map(lambda array: array[i], replace(self, num_microbatches=None))


jax.tree_util.register_dataclass(LearnerBatch)
