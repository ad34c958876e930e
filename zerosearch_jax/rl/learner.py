"""The learner: one jitted, donated step over packed microbatches, for RL and for fine-tuning.

Every mean is a numerator over a denominator taken over the *whole* batch, so that a result does
not depend on how the batch is packed, padded, cut into microbatches or sharded. An update whose
loss or gradient is not finite leaves the state as it was. The module knows packed arrays and
parameters; it knows no text, no rewards and no engines.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
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
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.rl.objective import Objective, policy_terms, value_terms

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TRUNKS = ("own", "shared")


@dataclass(frozen=True)
class OptimizerSpec:
    """How one part of the parameters is trained: an optax optimizer and its learning rate."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule


@dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      params: "policy": the stacked float32 parameters, or under LoRA the adapters alone. With a
        critic also "critic": its value head and, when the trunk is its own, a second model.
      opt_state: optimizer state under the same names.
      step: `[]` int32, updates done; skipped ones do not count.
    """

    params: dict[str, Any]
    opt_state: dict[str, Any]
    step: jax.Array


jax.tree_util.register_dataclass(TrainState)


class Learner:
    """Parameters' training on a mesh.

    Args:
      config: the model's sizes.
      policy: optimizer and schedule of the policy.
      critic: those of the critic, for PPO; None: there is none.
      critic_trunk: "own": a second model, that starts as the policy; "shared": a value head on
        the policy's hidden states, whose loss also trains them.
      lora: None trains all parameters; else adapters on frozen ones, which are kept in
        `compute_dtype` as `base`, and which are the reference policy, too.
      compute_dtype: of activations; what is trained is kept in float32.
      remat: a key of `models.transformer.REMAT_POLICIES`.
      logprob_chunk: positions whose logits exist at once, in tokens.
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
        compute_dtype: Any = jnp.float32,
        remat: str = "none",
        logprob_chunk: int = 128,
    ):
        if critic_trunk not in TRUNKS:
            raise ValueError(f"critic_trunk is {critic_trunk!r}, not one of {TRUNKS}")
        self.config = config
        self.mesh = mesh
        self.lora = lora
        self.base: nnx.State | None = None
        self._trained = {"policy": policy} | ({"critic": critic} if critic else {})
        self._critic_trunk = critic_trunk
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
        self._merge = jax.jit(
            partial(lora_lib.merge, options=lora), out_shardings=self.params_shardings
        )

    def init(self, params: nnx.State, seed: int = 0) -> TrainState:
        """A fresh state from stacked float32 parameters, which are not donated.

        Args:
          seed: of the adapters' random half.
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
        return fresh(jax.device_put(params, self.params_shardings))

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, to restore a checkpoint into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._state_shapes(),
            self.state_shardings,
        )

    def abstract_reference(self) -> nnx.State:
        """Shapes and shardings of the reference policy: float32, under LoRA `base`."""
        dtype = self._compute_dtype if self.lora else jnp.float32
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            self._abstract,
            self.params_shardings,
        )

    def put(self, batch: PackedBatch) -> Batch:
        """Host arrays `[M, R, T]` onto the mesh, rows over its data axes.

        Where R does not divide by these, empty rows are added. Every process gives the whole
        batch and puts its own devices' part of it.
        """
        return {name: self._put(array) for name, array in batch.arrays().items()}

    def _put(self, array: np.ndarray) -> jax.Array:
        sharding = mesh_lib.replicated(self.mesh)
        if array.ndim:
            sharding = self._batch_sharding
            missing = -array.shape[1] % math.prod(self.mesh.shape[axis] for axis in mesh_lib.ROWS)
            if missing:
                array = np.pad(array, ((0, 0), (0, missing), (0, 0)))
        return jax.make_array_from_process_local_data(sharding, array, array.shape)

    def policy(self, state: TrainState) -> nnx.State:
        """The policy's parameters as generators and exports take them, adapters merged in."""
        if self.lora is None:
            return state.params["policy"]
        return self._merge(self.base, state.params["policy"])

    def policy_logprobs(self, state: TrainState, batch: Batch, temperature: float) -> jax.Array:
        """`[M, R, T]` float32 log-probs of the masked-in targets under the policy as it is now."""
        tree = self._policy_tree(state.params["policy"], self.base)
        return self._jitted_logprobs(tree, batch, temperature=temperature)

    def logprobs(self, params: nnx.State, batch: Batch, temperature: float = 1.0) -> jax.Array:
        """`[M, R, T]` float32 log-probs of the targets under `params`, say the reference's.

        0 where the batch's mask is 0.
        """
        return self._jitted_logprobs(params, batch, temperature=temperature)

    def values(self, state: TrainState, batch: Batch) -> jax.Array:
        """The critic's values `[M, R, T]` of the states in which the targets were chosen."""
        return self._jitted_values(state.params, self.base, batch)

    def rl_step(
        self, state: TrainState, batch: Batch, *, objective: Objective, kl_coef: float
    ) -> tuple[TrainState, Metrics]:
        """One update of the policy (and the critic) on a batch; `state` is donated.

        Args:
          batch: from `put`, with the columns that `policy_terms` and `value_terms` read.
          kl_coef: weight of the KL term, where `objective.kl_in` is "loss".
        """
        return self._jitted_rl_step(
            state, self.base, batch, np.float32(kl_coef), objective=objective
        )

    def lower_rl_step(self, batch: Batch, objective: Objective) -> jax.stages.Lowered:
        """`rl_step` lowered for `batch`'s shapes; neither arrays nor devices need be there."""
        kl_coef = jax.ShapeDtypeStruct((), jnp.float32)
        return self._jitted_rl_step.lower(
            self.abstract_state(),
            self.abstract_reference() if self.lora else None,
            batch,
            kl_coef,
            objective=objective,
        )

    def lower_logprobs(self, batch: Batch, temperature: float) -> jax.stages.Lowered:
        """`logprobs` of the reference policy lowered for `batch`'s shapes."""
        return self._jitted_logprobs.lower(
            self.abstract_reference(), batch, temperature=temperature
        )

    def sft_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update on the weighted mean negative log-likelihood; `state` is donated."""
        return self._jitted_sft_step(state, self.base, batch)

    def sft_loss(self, state: TrainState, batch: Batch) -> jax.Array:
        """Weighted mean negative log-likelihood, in nats a token."""
        return self._jitted_sft_loss(state.params["policy"], self.base, batch)

    def _init_state(self, params, key):
        trained = {"policy": params}
        if self.lora:
            trained["policy"] = lora_lib.init_adapters(self.config, self.lora, key)
        if "critic" in self._trained:
            trained["critic"] = {"head": init_value_head(self.config)}
            if self._critic_trunk == "own":
                trained["critic"]["trunk"] = jax.tree.map(jnp.copy, params)
        opt_state = {name: how.optimizer.init(trained[name]) for name, how in self._trained.items()}
        return TrainState(trained, opt_state, jnp.int32(0))

    def _state_shapes(self) -> TrainState:
        return jax.eval_shape(self._init_state, self._abstract, jax.random.key(0))

    def _shardings(self) -> TrainState:
        shapes, replicated = self._state_shapes(), mesh_lib.replicated(self.mesh)
        params = {"policy": self.params_shardings}
        if self.lora:
            params["policy"] = lora_lib.adapter_shardings(
                shapes.params["policy"], self.mesh, mesh_lib.TRAIN_RULES
            )
        if "critic" in self._trained:
            params["critic"] = {"head": dict.fromkeys(("weight", "bias"), replicated)}
            if self._critic_trunk == "own":
                params["critic"]["trunk"] = self.params_shardings
        opt_state = {
            name: optax.tree_utils.tree_map_params(
                how.optimizer,
                lambda _, sharding: sharding,
                shapes.opt_state[name],
                params[name],
                transform_non_params=lambda _: replicated,
            )
            for name, how in self._trained.items()
        }
        return TrainState(params, opt_state, replicated)

    def _policy_tree(self, policy: Any, base: nnx.State | None) -> nnx.State:
        return policy if self.lora is None else lora_lib.adapted(base, policy, self.lora)

    def _hidden(self, params: nnx.State, batch: Batch) -> tuple[jax.Array, Any]:
        params = jax.tree.map(lambda x: x.astype(self._compute_dtype), params)
        model = nnx.merge(self._graphdef, params)
        return model(batch["tokens"], batch["positions"], batch["segment_ids"]), model

    def _logprobs(
        self, params: nnx.State, batch: Batch, temperature: float, with_entropy: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log-probs of the targets, entropies, both `[R, T]` float32, and hidden states.

        Where the mask is 0 both are 0.
        """
        hidden, model = self._hidden(params, batch)
        logprobs, entropy = chunked_logprobs(
            hidden,
            model.unembedding(),
            batch["targets"],
            mask=batch["mask"] > 0,
            chunk=self._chunk,
            temperature=temperature,
            with_entropy=with_entropy,
        )
        return logprobs, entropy, hidden

    def _values(self, critic: dict, batch: Batch, policy_hidden: jax.Array) -> jax.Array:
        hidden = policy_hidden
        if "trunk" in critic:
            hidden, _ = self._hidden(critic["trunk"], batch)
        return values_of(hidden, critic["head"])

    def _all_logprobs(self, params: nnx.State, batch: Batch, temperature: float) -> jax.Array:
        return _each(lambda one: self._logprobs(params, one, temperature, False)[0], batch)

    def _all_values(self, params: dict, base: nnx.State | None, batch: Batch) -> jax.Array:
        def values(microbatch):
            hidden = None
            if self._critic_trunk == "shared":
                hidden, _ = self._hidden(self._policy_tree(params["policy"], base), microbatch)
            return self._values(params["critic"], microbatch, hidden)

        return _each(values, batch)

    def _accumulate(
        self,
        numerators: Callable[[dict, Batch], tuple[jax.Array, Metrics]],
        params: dict,
        batch: Batch,
    ) -> tuple[dict, Metrics]:
        """Sums gradients and metrics of `numerators` over the microbatches that hold anything.

        A metric whose name ends in "_max" is the maximum, every other one the sum.
        """
        arrays, count = _split(batch)

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
        return lax.fori_loop(0, count, add, zeros)

    def _update(
        self, state: TrainState, grads: dict, loss: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The optimizers' update; the old state where `loss` or a gradient is not finite."""
        params, opt_state, metrics = {}, {}, {}
        finite = jnp.isfinite(loss)
        for name, how in self._trained.items():
            norm = optax.tree_utils.tree_norm(grads[name])
            finite &= jnp.isfinite(norm)
            updates, opt_state[name] = how.optimizer.update(
                grads[name], state.opt_state[name], state.params[name]
            )
            params[name] = optax.apply_updates(state.params[name], updates)
            prefix = "" if name == "policy" else f"{name}/"
            metrics[f"{prefix}grad_norm"] = norm
            metrics[f"{prefix}learning_rate"] = how.schedule(state.step)
        updated = TrainState(params, opt_state, state.step + 1)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return kept, metrics | {"skipped_updates": 1.0 - finite.astype(jnp.float32)}

    def _rl_step(
        self,
        state: TrainState,
        base: nnx.State | None,
        batch: Batch,
        kl_coef: jax.Array,
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
        state, metrics = self._update(state, grads, sums["loss/total"])
        # Without a correct token: nan, which is no figure.
        metrics["correct_loglik"] = sums.pop("correct_loglik") / sums.pop("correct_tokens")
        tokens = jnp.maximum(jnp.sum(batch["mask"]), 1.0)
        for name, value in sums.items():
            whole = name.startswith("loss/") or name.endswith("_max")
            metrics[name] = value if whole else value / tokens
        return state, metrics

    def _sft_step(
        self, state: TrainState, base: nnx.State | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(jnp.sum(batch["mask"]), 1e-9)

        def numerators(params, microbatch):
            total = self._nll(self._policy_tree(params["policy"], base), microbatch)
            return total / weight, {"loss/total": total / weight}

        grads, sums = self._accumulate(numerators, state.params, batch)
        state, metrics = self._update(state, grads, sums["loss/total"])
        return state, metrics | sums

    def _sft_eval(self, policy: Any, base: nnx.State | None, batch: Batch) -> jax.Array:
        tree = self._policy_tree(policy, base)
        arrays, count = _split(batch)

        def add(i, total):
            return total + self._nll(tree, {name: array[i] for name, array in arrays.items()})

        total = lax.fori_loop(0, count, add, jnp.float32(0))
        return total / jnp.maximum(jnp.sum(batch["mask"]), 1e-9)

    def _nll(self, params: nnx.State, batch: Batch) -> jax.Array:
        logprobs, *_ = self._logprobs(params, batch, 1.0, False)
        return -jnp.sum(jnp.where(batch["mask"] > 0, logprobs * batch["mask"], 0.0))


def _split(batch: Batch) -> tuple[Batch, jax.Array]:
    """The batch's `[M, R, T]` arrays, and how many of the M hold anything."""
    arrays = dict(batch)
    return arrays, arrays.pop("num_microbatches")


def _each(compute: Callable[[Batch], jax.Array], batch: Batch) -> jax.Array:
    """`compute` `[R, T]` of each microbatch that holds anything, 0 for the others: `[M, R, T]`."""
    arrays, count = _split(batch)

    def write(i, out):
        return out.at[i].set(compute({name: array[i] for name, array in arrays.items()}))

    return lax.fori_loop(0, count, write, jnp.zeros(arrays["tokens"].shape, jnp.float32))
