"""The learner: a jitted step over packed microbatches, for RL and for fine-tuning.

A batch is one minibatch of an RL step. Every mean divides by a denominator of the whole batch. Up
to rounding, results therefore do not depend on how the batch is packed, padded, cut into
microbatches or sharded. An update whose loss or gradient is not finite leaves the state unchanged.
This module knows packed arrays and parameters, but no text, rewards or engines.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from zerosearch_jax.data.packing import PackedBatch
from zerosearch_jax.models import lora as lora_lib
from zerosearch_jax.models.config import ModelConfig
from zerosearch_jax.models.fused_attention import kernel_for
from zerosearch_jax.models.transformer import abstract_model, param_shardings
from zerosearch_jax.models.value_head import init_value_head, values_of
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.rl.batch import LearnerBatch
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.rl.objective import Objective, policy_terms, value_terms
from zerosearch_jax.rl.optimizer import OptimizerSpec
from zerosearch_jax.rl.train_state import TrainState

Metrics = dict[str, jax.Array]


class Learner:
    """Trainer of a policy, and optionally a critic, on a mesh.

    Args:
      config: sizes of the model.
      policy: optimizer and schedule of the policy.
      critic: optimizer and schedule of the critic; None trains no critic.
      critic_trunk: "own" trains a second model that starts as a copy of the policy; "shared" puts
        a value head on the policy, so that the value loss also trains the policy's layers.
      lora: None trains all parameters. Otherwise only adapters are trained. `base` holds the frozen
        parameters in `compute_dtype`; they are also the reference policy.
      moving_reference: the state has a reference policy, which `refresh_reference` replaces. Not
        with `lora`.
      compute_dtype: dtype of activations; trained parameters are float32.
      remat: a key of `models.transformer.REMAT_POLICIES`.
      logprob_chunk: number of positions per row whose logits are in memory at once.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: jax.sharding.Mesh,
        policy: OptimizerSpec,
        critic: OptimizerSpec | None = None,
        critic_trunk: str = "own",
        lora: lora_lib.LoRA | None = None,
        moving_reference: bool = False,
        compute_dtype: Any = jnp.float32,
        remat: str = "none",
        logprob_chunk: int = 128,
    ):
        self.config = config
        self.mesh = mesh
        self.lora = lora
        self.base: nnx.State | None = None
        self._specs = {"policy": policy} | ({"critic": critic} if critic else {})
        self._critic_trunk = critic_trunk
        self._moving_reference = moving_reference
        self._compute_dtype = compute_dtype
        self._chunk = logprob_chunk
        attention = kernel_for(mesh.devices.flat[0], compute_dtype, config.head_dim)
        self._graphdef, self._abstract = abstract_model(
            config, remat=remat, attention=attention, mesh=mesh
        )
        self.params_shardings = param_shardings(self._abstract, mesh)
        self.state_shardings = self._shardings()
        self._batch_sharding = mesh_lib.sharding_of_batch(mesh)
        step_options = dict(donate_argnames="state", out_shardings=(self.state_shardings, None))
        self._jitted_rl_step = jax.jit(self._rl_step, static_argnames="objective", **step_options)
        self._jitted_sft_step = jax.jit(self._sft_step, **step_options)
        self._jitted_sft_loss = jax.jit(self._sft_eval)
        self._jitted_logprobs = jax.jit(self._all_logprobs, static_argnames="temperature")
        self._jitted_values = jax.jit(self._all_values)
        self._copy = jax.jit(
            lambda params: jax.tree.map(jnp.copy, params), out_shardings=self.params_shardings
        )
        self._merge = jax.jit(
            partial(lora_lib.merge, options=lora), out_shardings=self.params_shardings
        )

    def init(self, params: nnx.State, seed: int = 0) -> TrainState:
        """Returns a fresh state from float32 parameters with stacked layers; does not donate them.

        Args:
          seed: seed of the LoRA matrices that start random; the others start at 0.
        """
        if self.lora:
            cast = jax.jit(
                lambda params: jax.tree.map(lambda x: x.astype(self._compute_dtype), params),
                out_shardings=self.params_shardings,
            )
            self.base = cast(jax.device_put(params, self.params_shardings))
        fresh = jax.jit(
            lambda params: self._init_state(jax.tree.map(jnp.copy, params), jax.random.key(seed)),
            out_shardings=self.state_shardings,
        )
        state = fresh(jax.device_put(params, self.params_shardings))
        # The first refresh compiles its copy, so that later ones compile nothing.
        return self.refresh_reference(state) if self._moving_reference else state

    def refresh_reference(self, state: TrainState) -> TrainState:
        """Returns the state with a copy of the policy as its reference policy."""
        return replace(state, reference=self._copy(state.params["policy"]))

    def abstract_state(self) -> TrainState:
        """Returns the state's shapes and shardings, to restore a checkpoint into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._state_shapes(),
            self.state_shardings,
        )

    def abstract_reference(self) -> nnx.State:
        """Returns the reference policy's shapes and shardings; under LoRA those of `base`."""
        dtype = self._compute_dtype if self.lora else jnp.float32
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            self._abstract,
            self.params_shardings,
        )

    def put(self, batch: PackedBatch) -> LearnerBatch:
        """Puts a host batch onto the mesh, its rows sharded over the data axes.

        The arrays are `[M, R, T]`: microbatches, rows, tokens. Empty rows are added if R is not a
        multiple of the number of data shards. Every process passes the whole batch and copies the
        part that its own devices hold.
        """
        return LearnerBatch(**{name: self._put(array) for name, array in batch.arrays().items()})

    def _put(self, array: np.ndarray) -> jax.Array:
        sharding = mesh_lib.replicated(self.mesh)
        if array.ndim:
            sharding = self._batch_sharding
            missing = -array.shape[1] % math.prod(self.mesh.shape[axis] for axis in mesh_lib.ROWS)
            if missing:
                array = np.pad(array, ((0, 0), (0, missing), (0, 0)))
        return jax.make_array_from_process_local_data(sharding, array, array.shape)

    def policy(self, state: TrainState) -> nnx.State:
        """Returns the policy's parameters for generators and exports, with adapters merged."""
        if self.lora is None:
            return state.params["policy"]
        return self._merge(self.base, state.params["policy"])

    def policy_logprobs(
        self, state: TrainState, batch: LearnerBatch, temperature: float
    ) -> jax.Array:
        """Returns `[M, R, T]` float32 log-probs of the targets under the current policy.

        They are 0 where the mask is 0.
        """
        tree = self._policy_tree(state.params["policy"], self.base)
        return self._jitted_logprobs(tree, batch, temperature=temperature)

    def logprobs(
        self, params: nnx.State, batch: LearnerBatch, temperature: float = 1.0
    ) -> jax.Array:
        """Returns `[M, R, T]` float32 log-probs of the targets under `params`.

        They are 0 where the mask is 0.
        """
        return self._jitted_logprobs(params, batch, temperature=temperature)

    def values(self, state: TrainState, batch: LearnerBatch) -> jax.Array:
        """Returns the critic's values `[M, R, T]` of the states in which targets were chosen."""
        return self._jitted_values(state.params, self.base, batch)

    def rl_step(
        self,
        state: TrainState,
        batch: LearnerBatch,
        *,
        objective: Objective,
        kl_coef: float,
        rate_scale: float = 1.0,
    ) -> tuple[TrainState, Metrics]:
        """Updates the policy, and the critic if there is one; `state` is donated.

        Args:
          batch: from `put`, with the columns that `policy_terms` and `value_terms` read.
          kl_coef: weight of the KL term, read if `objective.kl.apply_to` is "loss".
          rate_scale: factor of all learning rates, for optimizers that take it (`adamw`).
        """
        scalars = np.float32(kl_coef), np.float32(rate_scale)
        return self._jitted_rl_step(state, self.base, batch, *scalars, objective=objective)

    def lower_rl_step(self, batch: LearnerBatch, objective: Objective) -> jax.stages.Lowered:
        """Lowers `rl_step` for the shapes of `batch`, without arrays or devices."""
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        return self._jitted_rl_step.lower(
            self.abstract_state(),
            self.abstract_reference() if self.lora else None,
            batch,
            scalar,
            scalar,
            objective=objective,
        )

    def lower_logprobs(self, batch: LearnerBatch, temperature: float) -> jax.stages.Lowered:
        """Lowers `logprobs` of the reference policy for the shapes of `batch`."""
        return self._jitted_logprobs.lower(
            self.abstract_reference(), batch, temperature=temperature
        )

    def sft_step(self, state: TrainState, batch: LearnerBatch) -> tuple[TrainState, Metrics]:
        """Updates the policy on the mean negative log-likelihood; `state` is donated.

        The mean is weighted by the batch's mask.
        """
        return self._jitted_sft_step(state, self.base, batch)

    def sft_loss(self, state: TrainState, batch: LearnerBatch) -> jax.Array:
        """Returns the mean negative log-likelihood in nats per token, weighted by the mask."""
        return self._jitted_sft_loss(state.params["policy"], self.base, batch)

    def _init_state(self, params, key):
        start = {"policy": params}
        if self.lora:
            start["policy"] = lora_lib.init_adapters(self.config, self.lora, key)
        if "critic" in self._specs:
            start["critic"] = {"head": init_value_head(self.config)}
            if self._critic_trunk == "own":
                start["critic"]["trunk"] = jax.tree.map(jnp.copy, params)
        opt_state = {name: spec.optimizer.init(start[name]) for name, spec in self._specs.items()}
        reference = jax.tree.map(jnp.copy, params) if self._moving_reference else None
        return TrainState(start, opt_state, jnp.int32(0), reference)

    def _state_shapes(self) -> TrainState:
        return jax.eval_shape(self._init_state, self._abstract, jax.random.key(0))

    def _shardings(self) -> TrainState:
        shapes, replicated = self._state_shapes(), mesh_lib.replicated(self.mesh)
        params = {"policy": self.params_shardings}
        if self.lora:
            params["policy"] = lora_lib.adapter_shardings(
                shapes.params["policy"], self.mesh, mesh_lib.TRAIN_RULES
            )
        if "critic" in self._specs:
            params["critic"] = {"head": dict.fromkeys(("weight", "bias"), replicated)}
            if self._critic_trunk == "own":
                params["critic"]["trunk"] = self.params_shardings
        opt_state = {
            name: optax.tree_utils.tree_map_params(
                spec.optimizer,
                lambda _, sharding: sharding,
                shapes.opt_state[name],
                params[name],
                transform_non_params=lambda _: replicated,
            )
            for name, spec in self._specs.items()
        }
        reference = self.params_shardings if self._moving_reference else None
        return TrainState(params, opt_state, replicated, reference)

    def _policy_tree(self, policy: Any, base: nnx.State | None) -> nnx.State:
        return policy if self.lora is None else lora_lib.adapted(base, policy, self.lora)

    def _hidden(self, params: nnx.State, batch: LearnerBatch) -> tuple[jax.Array, Any]:
        params = jax.tree.map(lambda x: x.astype(self._compute_dtype), params)
        model = nnx.merge(self._graphdef, params)
        return model(batch.tokens, batch.positions, batch.segment_ids), model

    def _logprobs(
        self, params: nnx.State, batch: LearnerBatch, temperature: float, with_entropy: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns log-probs of the targets and entropies, `[R, T]` float32, and hidden states.

        Log-probs and entropies are 0 where the mask is 0.
        """
        hidden, model = self._hidden(params, batch)
        logprobs, entropy = chunked_logprobs(
            hidden,
            model.unembedding(),
            batch.targets,
            mask=batch.mask > 0,
            chunk=self._chunk,
            temperature=temperature,
            with_entropy=with_entropy,
        )
        return logprobs, entropy, hidden

    def _values(self, critic: dict, batch: LearnerBatch, policy_hidden: jax.Array) -> jax.Array:
        hidden = policy_hidden
        if "trunk" in critic:
            hidden, _ = self._hidden(critic["trunk"], batch)
        return values_of(hidden, critic["head"])

    def _all_logprobs(
        self, params: nnx.State, batch: LearnerBatch, temperature: float
    ) -> jax.Array:
        return _each(lambda one: self._logprobs(params, one, temperature, False)[0], batch)

    def _all_values(self, params: dict, base: nnx.State | None, batch: LearnerBatch) -> jax.Array:
        def values(microbatch):
            hidden = None
            if self._critic_trunk == "shared":
                hidden, _ = self._hidden(self._policy_tree(params["policy"], base), microbatch)
            return self._values(params["critic"], microbatch, hidden)

        return _each(values, batch)

    def _accumulate(
        self,
        numerators: Callable[[dict, LearnerBatch], tuple[jax.Array, Metrics]],
        params: dict,
        batch: LearnerBatch,
    ) -> tuple[dict, Metrics]:
        """Sums gradients and metrics of `numerators` over the first `num_microbatches`.

        The other microbatches are padding.

        A metric whose name ends in "_max" is the maximum; all others are sums.
        """
        gradients = jax.value_and_grad(numerators, has_aux=True)

        def one(i):
            (_, metrics), grads = gradients(params, batch.microbatch(i))
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
        return lax.fori_loop(0, batch.num_microbatches, add, zeros)

    def _update(
        self, state: TrainState, grads: dict, loss: jax.Array, rate_scale: Any = 1.0
    ) -> tuple[TrainState, Metrics]:
        """Applies the optimizers; returns the old state if `loss` or a gradient is not finite."""
        params, opt_state, metrics = {}, {}, {}
        finite = jnp.isfinite(loss)
        for name, spec in self._specs.items():
            norm = optax.tree_utils.tree_norm(grads[name])
            finite &= jnp.isfinite(norm)
            optimizer = optax.with_extra_args_support(spec.optimizer)
            updates, opt_state[name] = optimizer.update(
                grads[name], state.opt_state[name], state.params[name], rate_scale=rate_scale
            )
            params[name] = optax.apply_updates(state.params[name], updates)
            prefix = "" if name == "policy" else f"{name}/"
            metrics[f"{prefix}grad_norm"] = norm
            metrics[f"{prefix}learning_rate"] = rate_scale * spec.schedule(state.step)
        updated = TrainState(params, opt_state, state.step + 1, state.reference)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return kept, metrics | {"skipped_updates": 1.0 - finite.astype(jnp.float32)}

    def _rl_step(
        self,
        state: TrainState,
        base: nnx.State | None,
        batch: LearnerBatch,
        kl_coef: jax.Array,
        rate_scale: jax.Array,
        *,
        objective: Objective,
    ) -> tuple[TrainState, Metrics]:
        def numerators(params, microbatch):
            tree = self._policy_tree(params["policy"], base)
            logprobs, entropy, hidden = self._logprobs(
                tree, microbatch, objective.temperature, True
            )
            total, sums = policy_terms(objective, kl_coef, logprobs, entropy, microbatch)
            if "critic" in params:
                values = self._values(params["critic"], microbatch, hidden)
                value_total, value_sums = value_terms(objective, values, microbatch)
                total, sums = total + value_total, sums | value_sums
            return total, sums | {"loss/total": total}

        grads, sums = self._accumulate(numerators, state.params, batch)
        state, metrics = self._update(state, grads, sums["loss/total"], rate_scale)
        # NaN if no episode of the batch is correct; callers drop NaNs.
        metrics["correct_loglik"] = sums.pop("correct_loglik") / sums.pop("correct_tokens")
        tokens = jnp.maximum(jnp.sum(batch.mask), 1.0)
        for name, value in sums.items():
            is_sum = not (name.startswith("loss/") or name.endswith("_max"))
            metrics[name] = value / tokens if is_sum else value
        return state, metrics

    def _sft_step(
        self, state: TrainState, base: nnx.State | None, batch: LearnerBatch
    ) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(jnp.sum(batch.mask), 1e-9)

        def numerators(params, microbatch):
            total = self._nll(self._policy_tree(params["policy"], base), microbatch)
            return total / weight, {"loss/total": total / weight}

        grads, sums = self._accumulate(numerators, state.params, batch)
        state, metrics = self._update(state, grads, sums["loss/total"])
        return state, metrics | sums

    def _sft_eval(self, policy: Any, base: nnx.State | None, batch: LearnerBatch) -> jax.Array:
        tree = self._policy_tree(policy, base)

        def add(i, total):
            return total + self._nll(tree, batch.microbatch(i))

        total = lax.fori_loop(0, batch.num_microbatches, add, jnp.float32(0))
        return total / jnp.maximum(jnp.sum(batch.mask), 1e-9)

    def _nll(self, params: nnx.State, batch: LearnerBatch) -> jax.Array:
        logprobs, *_ = self._logprobs(params, batch, 1.0, False)
        return -jnp.sum(jnp.where(batch.mask > 0, logprobs * batch.mask, 0.0))


def _each(compute: Callable[[LearnerBatch], jax.Array], batch: LearnerBatch) -> jax.Array:
    """Returns `compute` `[R, T]` of each microbatch as `[M, R, T]`; 0 for unused microbatches."""

    def write(i, out):
        return out.at[i].set(compute(batch.microbatch(i)))

    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    return lax.fori_loop(0, batch.num_microbatches, write, zeros)
