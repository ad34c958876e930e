"""Reinforcement learning against a search engine: the paper's algorithm, top to bottom.

Every step: the curriculum sets the noise → episodes are played → rewarded → advantages within
each group → one jitted update on the policy's own tokens. At the end the base and the trained
policy are judged on held-out questions with a real engine.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.jobs import build
from zerosearch_jax.jobs.epochs import Epochs
from zerosearch_jax.jobs.evaluate import GREEDY, evaluate_policy, print_table, summary
from zerosearch_jax.jobs.scores import answer_scores, episode_figures, reward_of
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.advantages import group_advantages
from zerosearch_jax.rl.learner import GRPOLoss
from zerosearch_jax.rollout.episodes import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.packing import TokenSequence, pack
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.curriculum import draw_noisy, noise_probability
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder
from zerosearch_jax.telemetry.seconds import Phases
from zerosearch_jax.telemetry.trajectories import render_segments


def run(config: ConfigDict, workdir: str) -> None:
    """Trains, evaluates and writes `workdir/summary.json`; resumes from `workdir`'s checkpoint."""
    began = time.monotonic()
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    check(config)

    mesh = make_mesh(**config.mesh)
    policy = build.load_model(config.policy.model, mesh, "float32")
    reference = policy.params
    sampling = Sampling(config.rollout.temperature)
    limits = Limits(
        config.rollout.max_turns, config.rollout.response_tokens, config.rollout.observation_tokens
    )
    epochs = Epochs(
        load_qa(config.data.source, config.data.train_split, config.data.train_limit),
        config.rollout.questions_per_step,
        config.seed,
        "config.rollout.questions_per_step",
    )
    clock = DeviceClock()
    print("compiling the programs of the simulator and the policy", flush=True)
    engine = build.make_engine(config.search, config.seed, config.mesh, clock)
    judge = build.make_engine(config.eval.search, config.seed, config.mesh)
    generator = build.make_generator(policy, config.policy.generator, mesh, STOP_STRINGS, clock)
    learner = build.make_learner(policy.config, mesh, config.rl, config.learner)
    loss = GRPOLoss(
        clip_low=config.rl.clip_low,
        clip_high=config.rl.clip_high,
        kl=config.rl.kl,
        entropy=config.rl.entropy,
        temperature=config.rollout.temperature,
    )
    state = learner.init(reference)
    checkpoints = Checkpoints(workdir / "checkpoints")
    first = checkpoints.latest_step() or 0
    if first:
        state, _ = checkpoints.restore(first, learner.abstract_state())
        print(f"resuming after step {first}")
    generator.warm_up([sampling, GREEDY])

    recorder = Recorder(workdir, first_step=first + 1)
    progress = Progress(config.rl.steps, first)
    phases = Phases()
    judged = partial(evaluate_policy, generator, judge, policy.tokenizer, limits=limits)
    watched = load_qa(config.data.eval_source, config.data.eval_split, config.eval.questions)
    clock.take()
    for step in range(first, config.rl.steps):
        p_noisy = noise_probability(step, config.rl.steps, **config.curriculum)
        generator.load(state.params)
        rollouts = Rollouts(
            generator,
            engine,
            policy.tokenizer,
            limits=limits,
            sampling=sampling,
            noisy=lambda episode, turn, p=p_noisy, i=step: draw_noisy(
                config.seed, i, episode, turn, p
            ),
            stop_on_failure=config.rollout.stop_on_failure,
            concurrent_searches=config.rollout.concurrent_searches,
            searching=partial(phases.phase, "search"),
        )
        with phases.phase("rollout"):
            episodes = episodes_of(epochs.draw(step), config.rollout.group_size, step)
            trajectories = rollouts.play(episodes, jax.random.key(config.seed))
        rewards = np.array(
            [reward_of(t, config.reward.name, config.reward.format_weight) for t in trajectories],
            np.float32,
        ).reshape(-1, config.rollout.group_size)
        advantages = np.asarray(group_advantages(rewards, normalize_std=config.rl.normalize_std))
        with phases.phase("learner"):
            batch = learner.put(batch_of(trajectories, advantages.ravel(), config))
            clock.started()
            state, metrics = learner.grpo_step(state, reference, batch, loss=loss)
            figures = {name: float(value) for name, value in metrics.items()}
            clock.drained()

        done = step + 1
        figures |= episode_figures(trajectories) | group_figures(rewards, trajectories)
        figures["p_noisy"] = p_noisy
        if done % config.eval.every == 0:
            with phases.phase("eval"):
                generator.load(state.params)
                shown = judged(watched)
            figures |= {f"eval/{k}": v for k, v in episode_figures(shown).items()}
            recorder.text(done, "trajectory", show(trajectories[0], policy.tokenizer))
        if done % config.checkpoint_every == 0 or done == config.rl.steps:
            with phases.phase("checkpoint"):
                checkpoints.save(done, state, {"seed": config.seed, "p_noisy": p_noisy})
        figures |= phases.take()
        figures["host_share"] = 1.0 - min(1.0, clock.take() / figures["seconds/step"])
        figures["tokens_per_sec"] = (
            sum(t.policy_tokens for t in trajectories) / figures["seconds/step"]
        )
        recorder.scalars(done, figures)
        progress.update(done, figures)
    progress.close()
    recorder.close()

    conclude(
        config,
        workdir,
        policy=policy,
        trained=state.params,
        generator=generator,
        judged=judged,
        engine_name=judge.name,
        began=began,
    )


def check(config: ConfigDict) -> None:
    """Refuses settings that contradict each other."""
    episodes = config.rollout.questions_per_step * config.rollout.group_size
    if config.rollout.temperature <= 0:
        raise UserError("config.rollout.temperature must be above 0: groups need different samples")
    if config.learner.row_tokens < config.policy.generator.max_tokens:
        raise UserError(
            f"config.learner.row_tokens={config.learner.row_tokens} cannot hold an episode of "
            f"config.policy.generator.max_tokens={config.policy.generator.max_tokens}; raise it"
        )
    if config.learner.rows * config.learner.microbatches < episodes:
        raise UserError(
            f"config.learner.rows × microbatches must be at least the {episodes} episodes of a step"
        )


def episodes_of(rows: Sequence[QARow], group_size: int, step: int) -> list[Episode]:
    """The step's episodes, group by group, one group a row; numbered through the run."""
    number = step * len(rows) * group_size
    return [
        Episode(number + i * group_size + member, row.question, row.golden_answers)
        for i, row in enumerate(rows)
        for member in range(group_size)
    ]


def batch_of(trajectories: Sequence[Trajectory], advantages: np.ndarray, config: ConfigDict):
    """The learner's packed batch: ids and log-probs as sampled, provenance as the mask."""
    correct = answer_scores(trajectories, "em")
    sequences = [
        TokenSequence(t.tokens, t.by_policy, t.logprobs, float(advantage), right == 1.0)
        for t, advantage, right in zip(trajectories, advantages, correct, strict=True)
    ]
    return pack(
        sequences,
        row_tokens=config.learner.row_tokens,
        rows=config.learner.rows,
        microbatches=config.learner.microbatches,
    )


def group_figures(rewards: np.ndarray, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Reward figures of `[Q, G]` rewards, and the share of searches that were noisy."""
    searches = [request.noisy for t in trajectories for request, _ in t.searches]
    return {
        "reward": float(rewards.mean()),
        "zero_variance_groups": float(np.mean(np.ptp(rewards, axis=1) == 0)),
        "noisy_ratio": float(np.mean(searches)) if searches else 0.0,
    }


def conclude(
    config: ConfigDict,
    workdir: Path,
    *,
    policy: build.Model,
    trained: nnx.State,
    generator: Generator,
    judged: Callable[..., list[Trajectory]],
    engine_name: str,
    began: float,
) -> None:
    """Exports the trained policy and judges it beside the base policy and without search.

    Prints the table and an episode of each policy; writes `policy/` and `summary.json`.

    Args:
      policy: the base policy.
      trained: its parameters after training.
      judged: greedy episodes of what `generator` has loaded (`evaluate_policy`, its first
        arguments given) with the engine that is called `engine_name`.
      began: `time.monotonic()` at the run's start.
    """
    save_params(
        workdir / "policy", trained, policy.config, eos_token_id=policy.tokenizer.eos_token_id
    )
    policy.tokenizer.save_pretrained(workdir / "policy")
    test = load_qa(config.data.eval_source, config.data.test_split, config.eval.test_questions)
    generator.load(policy.params)
    played = {"base": judged(test)}
    generator.load(trained)
    played |= {"trained": judged(test), "no_search": judged(test, forbid_search=True)}
    table = {name: summary(trajectories) for name, trajectories in played.items()}
    print_table(
        table, f"{config.data.eval_source}/{config.data.test_split}, judged with {engine_name}"
    )
    shown = question_to_show(test, config.data.eval_source)
    for name in ("base", "trained"):
        print(f"\n---- {name} policy: {test[shown].id}, gold {test[shown].golden_answers[0]!r}")
        print(show(played[name][shown], policy.tokenizer))
    report = {
        **table,
        "steps": config.rl.steps,
        "seconds": time.monotonic() - began,
        "engine": engine_name,
        "split": config.data.test_split,
    }
    (workdir / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {workdir / 'summary.json'}; curves: tensorboard --logdir {workdir}")


def question_to_show(rows: Sequence[QARow], source: str) -> int:
    """Which row's episodes are printed: the embedded world's first two-hop one, else the first."""
    two_hop = [i for i, row in enumerate(rows) if source == "world" and ">" in row.id]
    return two_hop[0] if two_hop else 0


def show(trajectory: Trajectory, tokenizer) -> str:
    """An episode for people, inserted text behind a margin."""
    return render_segments(trajectory.segments(tokenizer), color=False)
