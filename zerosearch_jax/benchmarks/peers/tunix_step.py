"""Times whole GRPO steps of Tunix's `GRPOLearner`: sampling, reference log-probs, update.

Stand-alone but for `tunix_decode.py` beside it; it runs in an environment of its own,

    python3.11 -m venv tunixenv
    tunixenv/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8

and is called by `bench_peers.subprocess_peer`: JSON request on stdin, one JSON line on stdout.

Request: model (Hugging Face directory, safetensors, Llama), prompts (token ids, one list a
question, all of one length; a step takes all of them), group_size, new_tokens (of every
completion: none ends early), micro_rows (sequences of one forward and backward pass, a multiple
of group_size), learning_rate, beta1, beta2, weight_decay, clip_norm, clip, kl, repeats, threads.
Response: step_secs (seconds of each step but the first, which compiles), version.

Tunix is left at its defaults but for what the request names: float32, activations kept and not
computed again, log-probs from whole logits. It has no entropy bonus and computes the entropy.
"""

import importlib.metadata
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out

from tunix_decode import Ids, load  # noqa: E402


def run(request: dict) -> dict:
    """The response to a request; see the module's docstring."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    prompts, steps = request["prompts"], 1 + request["repeats"]
    length = len(prompts[0])
    if any(len(prompt) != length for prompt in prompts):
        sys.exit("prompts must be of one length: Tunix pads shorter ones")
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
        max_steps=1 + steps,  # the prompts come to an end first
        eval_every_n_steps=1 + steps,
        mini_batch_size=len(prompts),
        train_micro_batch_size=request["micro_rows"] // request["group_size"],
        rollout_micro_batch_size=len(prompts),
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=request["new_tokens"],
        max_prompt_length=length,
        kv_cache_size=length + request["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        data_type=jnp.float32,
        eos_tokens=[-1],
    )
    cluster = RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Ids(),
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=training,
            rollout_config=rollout,
        ),
    )
    lengths: set[int] = set()

    def distinct(prompts, completions, **_) -> list[float]:
        """A reward that differs within a group: distinct token ids of each completion."""
        tokens = [json.loads(text) for text in completions]
        lengths.update(map(len, tokens))
        return [float(len(set(ids))) for ids in tokens]

    learner = GRPOLearner(
        cluster,
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
        """The same questions for every step; asked for when the step before has ended."""
        for _ in range(steps):
            began.append(time.perf_counter())
            yield {"prompts": np.array([json.dumps(prompt) for prompt in prompts])}
        began.append(time.perf_counter())

    learner.train(batches())
    if lengths != {request["new_tokens"]}:
        sys.exit(f"completions had {lengths} tokens, not {request['new_tokens']}")
    seconds = [end - start for start, end in itertools.pairwise(began)]
    return {"step_secs": seconds[1:], "version": importlib.metadata.version("google-tunix")}


def main() -> None:
    """Reads the request, limits the threads, prints the response."""
    request = json.load(sys.stdin)
    # XLA makes one thread for each core that it may run on when it is loaded.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["threads"]])
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries print there
    response = run(request)
    print(json.dumps(response), file=stdout)


if __name__ == "__main__":
    main()
