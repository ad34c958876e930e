"""Peer script: whole GRPO steps of Tunix's `GRPOLearner`: sampling, reference log-probs, update.

It imports nothing of this project but the scripts next to it. Make its environment with

    python3.11 -m venv tunixenv
    tunixenv/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8

`run_peers.subprocess_peer` calls it with a JSON request on stdin; it prints one JSON line.

Request: model (Hugging Face directory, safetensors, Llama), prompts (one list of token ids per
question, all of one length; a step uses all of them), group_size, new_tokens (length of every
completion: none ends early), micro_rows (sequences of one forward and backward pass, a multiple
of group_size), learning_rate, beta1, beta2, weight_decay, clip_norm, clip, kl, repeats, threads.
Response: step_secs (seconds of each step except the first, which compiles), version.

Everything that the request does not set keeps Tunix's default: float32, activations kept and not
recomputed, log-probs from whole logits. Tunix has no entropy bonus but computes the entropy.
"""

import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -I leaves the script's folder out

from respond import respond  # noqa: E402
from tunix_decode import Ids, load  # noqa: E402


def cluster_of(request: dict):
    """Returns Tunix's actor, reference and rollout engine on one device."""
    import jax
    import jax.numpy as jnp
    import optax
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    prompts, steps = request["prompts"], 1 + request["repeats"]
    (actor, _), (reference, _) = (load(request["model"], "float32") for _ in range(2))
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    training = RLTrainingConfig(
        actor_optimizer=optax.chain(
            optax.clip_by_global_norm(request["clip_norm"]),
            optax.adamw(
                request["learning_rate"],
                b1=request["beta1"],
                b2=request["beta2"],
                weight_decay=request["weight_decay"],
            ),
        ),
        max_steps=1 + steps,  # The data ends first.
        eval_every_n_steps=1 + steps,
        mini_batch_size=len(prompts),
        train_micro_batch_size=request["micro_rows"] // request["group_size"],
        rollout_micro_batch_size=len(prompts),
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=request["new_tokens"],
        max_prompt_length=len(prompts[0]),
        kv_cache_size=len(prompts[0]) + request["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        data_type=jnp.float32,
        eos_tokens=[-1],
    )
    return RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Ids(),
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=training,
            rollout_config=rollout,
        ),
    )


def run(request: dict) -> dict:
    """Returns the response to a request; see the module's docstring."""
    import numpy as np
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    prompts, steps = request["prompts"], 1 + request["repeats"]
    if any(len(prompt) != len(prompts[0]) for prompt in prompts):
        sys.exit("all prompts must have the same length, because Tunix pads shorter ones")
    lengths: set[int] = set()

    def distinct(prompts, completions, **_) -> list[float]:
        """Reward: the number of distinct token ids of each completion, which differs in a group."""
        tokens = [json.loads(text) for text in completions]
        lengths.update(map(len, tokens))
        return [float(len(set(ids))) for ids in tokens]

    learner = GRPOLearner(
        cluster_of(request),
        GRPOConfig(
            num_generations=request["group_size"],
            num_iterations=1,
            beta=request["kl"],
            kl_loss_mode="low_var_kl",
            epsilon=request["clip"],
            loss_agg_mode="token-mean",
        ),
        distinct,
    )
    began: list[float] = []

    def batches() -> Iterator[dict]:
        """Yields the same questions for every step and records when the learner requests them."""
        for _ in range(steps):
            began.append(time.perf_counter())
            yield {"prompts": np.array([json.dumps(prompt) for prompt in prompts])}
        began.append(time.perf_counter())

    learner.train(batches())
    if lengths != {request["new_tokens"]}:
        sys.exit(f"completions have {lengths} tokens, not {request['new_tokens']}")
    seconds = [end - start for start, end in itertools.pairwise(began)]
    return {"step_secs": seconds[1:], "version": importlib.metadata.version("google-tunix")}


if __name__ == "__main__":
    respond(run)
