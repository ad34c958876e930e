"""The learner: one jitted, donated step over packed microbatches, for RL and for fine-tuning.

Every mean is a numerator over a denominator taken over the *whole* batch, so that a result does
not depend on how the batch is packed, padded, cut into microbatches or sharded. The module knows
packed arrays and parameters; it knows no text, no rewards and no engines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.transformer import abstract_model, param_shardings
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.rl.losses import clipped_surrogate, kl_k3, masked_sum
from zerosearch_jax.rollout.packing import PackedBatch

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
UNDECAYED = ("norm", "bias")


@dataclass(frozen=True)
class TrainState:
    """What training changes: parameters (float32), optimizer state, steps done `[]` int32."""

    params: nnx.State
    opt_state: Any
    step: jax.Array


jax.tree_util.register_dataclass(TrainState)


@dataclass(frozen=True)
class GRPOLoss:
    """The coefficients of the GRPO objective (paper §3.4; FACTS §3).

    Attributes:
      clip_low, clip_high: the surrogate's ratio stays in [1 - low, 1 + high].
      kl: weight of the k3 KL to the reference; 0 leaves the reference out.
      entropy: weight of the entropy bonus.
      temperature: the one the tokens were sampled at.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.001
    entropy: float = 0.001
    temperature: float = 1.0


def warmup_cosine(
    peak: float, *, warmup_steps: int, total_steps: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to `final_fraction` of it (1: constant).

    Steps count from 0: warm-up step i has the rate peak·(i + 1) / warmup_steps, so that the first
    update changes something and the last one of the warm-up has the peak; so has the step after
    it, with which the cosine begins. From step `total_steps` on the rate stays at the end's.
    """
    cosine = optax.cosine_decay_schedule(
        peak, max(total_steps - warmup_steps, 1), alpha=final_fraction
    )
    if not warmup_steps:
        return cosine
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def adamw(
    schedule: optax.Schedule, *, beta1: float, beta2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW; norms and biases are not decayed."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not any(word in jax.tree_util.keystr(path) for word in UNDECAYED),
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=decayed),
    )


class Learner:
    """Parameters' training on a mesh.

    Args:
      config: the model's sizes.
      schedule, optimizer: from `warmup_cosine` and `adamw`.
      compute_dtype: of activations; parameters are kept in float32.
      remat: a key of `models.transformer.REMAT_POLICIES`.
      logprob_chunk: positions whose logits exist at once, in tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: jax.sharding.Mesh,
        schedule: optax.Schedule,
        optimizer: optax.GradientTransformation,
        compute_dtype: Any = jnp.float32,
        remat: str = "none",
        logprob_chunk: int = 128,
    ):
        self.config = config
        self.mesh = mesh
        self._schedule = schedule
        self._optimizer = optimizer
        self._compute_dtype = compute_dtype
        self._chunk = logprob_chunk
        self._graphdef, self._abstract = abstract_model(config, remat=remat)
        self.state_shardings = self._shardings()
        self._batch_sharding = mesh_lib.sharding_of_batch(mesh)
        step_options = dict(donate_argnames="state", out_shardings=(self.state_shardings, None))
        self.grpo_step = jax.jit(self._grpo_step, static_argnames="loss", **step_options)
        self.sft_step = jax.jit(self._sft_step, **step_options)
        self.sft_loss = jax.jit(self._sft_eval)

    def init(self, params: nnx.State) -> TrainState:
        """A fresh state from stacked float32 parameters, which are not donated."""

        fresh = jax.jit(
            lambda params: self._init_state(jax.tree.map(jnp.copy, params)),
            out_shardings=self.state_shardings,
        )
        return fresh(jax.device_put(params, self.state_shardings.params))

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, to restore a checkpoint into."""
        shapes = jax.eval_shape(self._init_state, self._abstract)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.state_shardings,
        )

    def put(self, batch: PackedBatch) -> Batch:
        """Host arrays `[M, R, T]` onto the mesh, rows over its data axes."""
        return {
            name: jax.make_array_from_process_local_data(
                self._batch_sharding if array.ndim else mesh_lib.replicated(self.mesh), array
            )
            for name, array in batch.arrays().items()
        }

    def _init_state(self, params):
        return TrainState(params, self._optimizer.init(params), jnp.int32(0))

    def _shardings(self) -> TrainState:
        params = param_shardings(self._abstract, self.mesh)
        replicated = mesh_lib.replicated(self.mesh)
        opt_state = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(self._optimizer.init, self._abstract),
            params,
            transform_non_params=lambda _: replicated,
        )
        return TrainState(params, opt_state, replicated)

    def _logprobs(
        self, params: nnx.State, batch: Batch, temperature: float, with_entropy: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probs of the targets and entropies, both `[R, T]` float32."""
        params = jax.tree.map(lambda x: x.astype(self._compute_dtype), params)
        model = nnx.merge(self._graphdef, params)
        hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        return chunked_logprobs(
            hidden,
            model.unembedding(),
            batch["targets"],
            chunk=self._chunk,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    def _accumulate(
        self,
        numerators: Callable[[nnx.State, Batch], tuple[jax.Array, Metrics]],
        params: nnx.State,
        batch: Batch,
    ) -> tuple[nnx.State, Metrics]:
        """Sums gradients and metrics of `numerators` over the microbatches that hold anything.

        A metric whose name ends in "_max" is the maximum, every other one the sum.
        """
        arrays = {name: array for name, array in batch.items() if name != "num_microbatches"}

        def one(i):
            microbatch = {name: array[i] for name, array in arrays.items()}
            (_, metrics), grads = jax.value_and_grad(numerators, has_aux=True)(params, microbatch)
            return grads, metrics

        def add(i, carry):
            grads, metrics = one(i)
            combined = {
                name: jnp.maximum(carry[1][name], value)
                if name.endswith("_max")
                else carry[1][name] + value
                for name, value in metrics.items()
            }
            return jax.tree.map(jnp.add, carry[0], grads), combined

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
        return lax.fori_loop(0, batch["num_microbatches"], add, zeros)

    def _update(self, state: TrainState, grads: nnx.State) -> tuple[TrainState, Metrics]:
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "grad_norm": optax.tree_utils.tree_norm(grads),
            "learning_rate": self._schedule(state.step),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    def _grpo_step(
        self, state: TrainState, ref_params: nnx.State, batch: Batch, *, loss: GRPOLoss
    ) -> tuple[TrainState, Metrics]:
        """One GRPO update on all policy tokens of the batch, token-mean (paper eq. 2)."""
        tokens = jnp.maximum(jnp.sum(batch["mask"]), 1.0)

        def numerators(params, microbatch):
            mask = microbatch["mask"]
            logprobs, entropy = self._logprobs(params, microbatch, loss.temperature, True)
            surrogate, clipped = clipped_surrogate(
                logprobs,
                microbatch["old_logprobs"],
                microbatch["advantages"],
                mask,
                clip_low=loss.clip_low,
                clip_high=loss.clip_high,
            )
            sums = {
                "loss/policy": masked_sum(surrogate, mask),
                "entropy": masked_sum(entropy, mask),
                "clip_fraction": masked_sum(clipped, mask),
            }
            total = sums["loss/policy"] - loss.entropy * sums["entropy"]
            if loss.kl:
                ref_logprobs, _ = self._logprobs(ref_params, microbatch, loss.temperature, False)
                sums["kl"] = masked_sum(kl_k3(logprobs, ref_logprobs, mask), mask)
                total += loss.kl * sums["kl"]
            sums["loss/total"] = total
            sums |= _mismatch(logprobs, microbatch)
            return total / tokens, sums

        grads, sums = self._accumulate(numerators, state.params, batch)
        state, metrics = self._update(state, grads)
        correct = jnp.maximum(sums.pop("correct_tokens"), 1.0)
        metrics["correct_loglik"] = sums.pop("correct_loglik") / correct
        metrics["sampler_logprob_diff_max"] = sums.pop("sampler_logprob_diff_max")
        return state, metrics | {name: value / tokens for name, value in sums.items()}

    def _sft_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update on the weighted mean negative log-likelihood of the targets."""
        weight = jnp.maximum(jnp.sum(batch["mask"]), 1e-9)

        def numerators(params, microbatch):
            total = self._nll(params, microbatch)
            return total / weight, {"loss/total": total / weight}

        grads, sums = self._accumulate(numerators, state.params, batch)
        state, metrics = self._update(state, grads)
        return state, metrics | sums

    def _sft_eval(self, params: nnx.State, batch: Batch) -> jax.Array:
        """Weighted mean negative log-likelihood, in nats a token."""

        def add(i, total):
            arrays = {k: v[i] for k, v in batch.items() if k != "num_microbatches"}
            return total + self._nll(params, arrays)

        total = lax.fori_loop(0, batch["num_microbatches"], add, jnp.float32(0))
        return total / jnp.maximum(jnp.sum(batch["mask"]), 1e-9)

    def _nll(self, params: nnx.State, batch: Batch) -> jax.Array:
        logprobs, _ = self._logprobs(params, batch, 1.0, False)
        return -jnp.sum(jnp.where(batch["mask"] > 0, logprobs * batch["mask"], 0.0))


def _mismatch(logprobs: jax.Array, batch: Batch) -> Metrics:
    """Sampler-learner log-prob difference and log-likelihood of correct trajectories, as sums."""
    mask = batch["mask"] > 0
    difference = jnp.where(mask, jnp.abs(logprobs - batch["old_logprobs"]), 0.0)
    right = mask & (batch["correct"] > 0)
    return {
        "sampler_logprob_diff_mean": jnp.sum(difference),
        "sampler_logprob_diff_max": jnp.max(difference),
        "correct_loglik": masked_sum(logprobs, right),
        "correct_tokens": jnp.sum(right.astype(jnp.float32)),
    }
