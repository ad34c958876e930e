"""Reinforcement learning against a search engine: the paper's algorithm, top to bottom.

Each step sets the curriculum's noise, runs episodes, rewards them, and updates the policy on the
tokens that it sampled itself (`training/policy_update.py`). At the end the base and the trained
policy are evaluated on held-out questions with a real engine.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import Terminated, UserError
from zerosearch_jax.evaluation.baselines import run_method
from zerosearch_jax.evaluation.summary import search_failures, summary, text_table
from zerosearch_jax.files import write_atomically, write_json
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.parallel.processes import gather
from zerosearch_jax.parallel.stop_request import StopRequest
from zerosearch_jax.rl.advantages import adapted_kl_coef
from zerosearch_jax.rl.config import KLConfig
from zerosearch_jax.rl.train_state import TrainState
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.search.curriculum import noise_probability
from zerosearch_jax.simulator import gate
from zerosearch_jax.telemetry.profiler import Profiler
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder, earlier_rows
from zerosearch_jax.telemetry.step_timer import StepTimer
from zerosearch_jax.telemetry.trajectories import render_segments
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.episode_metrics import answers, episode_metrics
from zerosearch_jax.training.fingerprints import check_base, model_sha256
from zerosearch_jax.training.inputs import check_job
from zerosearch_jax.training.no_signal import failed_searches, no_signal, unanswered
from zerosearch_jax.training.parts import (
    Parts,
    build,
    input_contents,
    load_questions,
    policy_and_learner,
)
from zerosearch_jax.training.policy_update import PolicyUpdater
from zerosearch_jax.training.row_sampler import RowSampler
from zerosearch_jax.training.run_monitor import Decision, RunMonitor
from zerosearch_jax.training.step_rollouts import StepRollouts, limits_of, run_step
from zerosearch_jax.training.train_state import (
    export,
    kept_step,
    restore_kept,
    resume,
    roll_back,
)
from zerosearch_jax.training.workdir import check_workdir, keep_config


def run(config: ConfigDict, workdir: str, profile_steps: tuple[int, ...] = ()) -> None:
    """Trains, evaluates and writes `workdir/summary.json`; resumes from `workdir`'s checkpoint.

    Args:
      profile_steps: numbers of the steps to profile, counted from 1; traces go to
        `workdir/profile`.
    """
    raw, config = config, config_flags.typed(RLConfig, config)
    workdir = Path(workdir)
    check_job(config)
    before = check_workdir(workdir)
    check_models(config)
    sampler, eval_rows, test_rows = load_questions(config)
    contents = input_contents(config, sampler.rows, [*eval_rows, *test_rows])
    check_base(workdir, before, config, contents["policy.model"])
    parts, state = build(config)
    workdir.mkdir(parents=True, exist_ok=True)
    policy, generator, learner, kl = parts.policy, parts.generator, parts.learner, config.kl
    checkpoints = Checkpoints(workdir / "checkpoints")
    state, first, kept = resume(checkpoints, learner, state, {"kl_coef": kl.coef})
    kl_coef = kept["kl_coef"] if kl.target else kl.coef
    is_writer = jax.process_index() == 0
    if is_writer:
        keep_config(config_flags.plain(raw) | {"contents": contents}, workdir)
    monitor = RunMonitor(config, workdir, kept, earlier_rows(workdir / "metrics.jsonl", first + 1))
    if config.watch.action == "rollback" and first == 0:  # before the first evaluation: EM 0
        checkpoints.save(0, state, kept, score=0.0)
    update_policy = PolicyUpdater(learner, policy.params, config, monitor.nonfinite, parts.clock)
    generator.warm_up([Sampling(config.rollout.temperature), GREEDY])
    profiler, timer = Profiler(profile_steps, workdir / "profile"), StepTimer()
    parts.clock.take()

    with (
        closing(Recorder(workdir, is_writer, first_step=first + 1)) as recorder,
        closing(Progress(config.rl.steps, first)) as progress,
        StopRequest() as stop,
    ):
        for step in monitor.steps(first):
            done = step + 1
            with profiler.step(done):
                try:
                    rollouts = collect(config, step, sampler, parts, state, timer, stop)
                except Terminated:  # the state is that of the last finished step
                    if step > first:
                        checkpoints.save(step, state, kept)
                    raise
                trajectories, rewards = rollouts.selected()
                with timer.section("learner"):
                    state, metrics = update_policy(
                        state, trajectories, rewards, kl_coef, step, monitor.rate_scale
                    )
                metrics |= episode_metrics(rollouts.trajectories) | rollouts.metrics()
                metrics |= {"p_noisy": step_noise(config, step), "kl_coef": kl_coef}
                kl_coef = next_kl_coef(kl, kl_coef, metrics, len(trajectories))

                if done % config.eval.every == 0:
                    metrics |= eval_metrics(config, parts, state, eval_rows, timer)
                    recorder.text(done, "trajectory", show(trajectories[0], policy.tokenizer))

                metrics |= speed(timer.pop(), parts, rollouts)
                metrics |= monitor.decide(metrics)
                # Rows precede checkpoints: a killed run repeats steps and replaces their rows.
                recorder.scalars(done, metrics)
                progress.update(done, metrics)
                monitor.report(done)

                kept, em = monitor.kept() | {"kl_coef": kl_coef}, metrics.get("eval/em")
                if monitor.decision is Decision.ROLL_BACK:
                    state, em = roll_back(checkpoints, learner), None
                terminated = any(gather([stop.received]))  # all processes end after one step
                due = done % config.checkpoint_every == 0 or done == config.rl.steps
                due = due or terminated or monitor.decision is not Decision.CONTINUE
                if due or checkpoints.improves(em):
                    with timer.section("checkpoint"):
                        checkpoints.save(done, state, kept, score=em)
            monitor.raise_if_stopped(done)
            if terminated:
                raise Terminated

    conclude(config, workdir, parts, state, test_rows, checkpoints.latest_step() or 0)


def export_checkpoint(config: ConfigDict, workdir: str, which: str) -> None:
    """Exports the policy of a kept checkpoint to `workdir/exports/STEP/policy`.

    Args:
      which: a step, "latest" or "best" (see `kept_step`).

    Raises:
      UserError: there is no such checkpoint, or the run has another base model.
    """
    config = config_flags.typed(RLConfig, config)
    checkpoints = Path(workdir) / "checkpoints"
    step = kept_step(checkpoints, which)
    check_base(workdir, check_workdir(workdir), config, model_sha256(config.policy.model))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    policy, learner = policy_and_learner(config, mesh)
    if learner.lora is not None:
        learner.init(policy.params, config.seed)  # sets the base that the adapters adapt
    state, _ = restore_kept(checkpoints, step, learner.abstract_state())
    path = Path(workdir) / "exports" / str(step) / "policy"
    tokenizer, generation = policy.tokenizer, policy.generation
    export(path, learner, state, tokenizer, config.policy.model, generation)
    print(f"policy of step {step} written to {path}")


def check_models(config: RLConfig) -> None:
    """Checks the model directories, without reading weights, and the simulator's report.

    Raises:
      UserError: the files of a model contradict each other or the config, or the simulator fails
        its gate.
    """
    factory.check_model(config.policy.model, STOP_STRINGS)
    if config.rollout.max_turns:
        factory.check_simulator_model(config.search)
        factory.check_simulator_model(config.eval.search)
    check_simulator(config)


def check_simulator(config: RLConfig) -> None:
    """Raises UserError if `simulator.gate.report` is set and its scores miss the thresholds."""
    simulator = config.search.simulator
    if config.search.engine == "simulated" and simulator.gate.report:
        gate.check(
            simulator.gate.report,
            gate.simulator_identity(config.search),
            reader_em_useful_min=simulator.gate.useful_min,
            reader_em_noisy_max=simulator.gate.noisy_max,
        )


def step_noise(config: RLConfig, step: int) -> float:
    """Returns the noise probability of a step, from `curriculum.start` to `curriculum.end`."""
    return noise_probability(step, max(1, config.rl.steps - 1), **asdict(config.curriculum))


def collect(
    config: RLConfig,
    step: int,
    sampler: RowSampler,
    parts: Parts,
    state: TrainState,
    timer: StepTimer,
    stop: StopRequest,
) -> StepRollouts:
    """Runs the episodes of a step, with the state's policy, against the training engine."""
    with timer.section("weights"):
        parts.generator.load(parts.learner.policy(state))
    with timer.section("rollout"):
        rollouts = run_step(
            config,
            step,
            step_noise(config, step),
            sampler,
            generator=parts.generator,
            engine=parts.engine,
            tokenizer=parts.policy.tokenizer,
            searching=partial(timer.section, "search"),
            stop=stop,
        )
    parts.notices.show(f"step {step + 1}", failed_searches(rollouts.trajectories))
    reason = no_signal(config, episode_metrics(rollouts.trajectories), rollouts.selected()[1])
    parts.notices.show(f"step {step + 1} teaches nothing", reason)
    return rollouts


def evaluate(
    config: RLConfig, parts: Parts, rows: Sequence[QARow], method: str = "search"
) -> list[Trajectory]:
    """Runs greedy episodes of the loaded policy with the evaluation engine."""
    trajectories = run_method(
        method,
        parts.generator,
        parts.eval_engine,
        parts.policy.tokenizer,
        rows,
        limits=limits_of(config.rollout),
    )
    reason = unanswered(episode_metrics(trajectories), "rollout")
    if trouble := search_failures(trajectories, config.eval.max_failed_searches):
        reason = "failed searches", f"{trouble}; its scores are no result; fix config.eval.search"
    parts.notices.show("evaluation", reason or failed_searches(trajectories))
    return trajectories


def next_kl_coef(kl: KLConfig, coef: float, metrics: dict[str, float], episodes: int) -> float:
    """Returns the next KL coefficient: adapted to `kl.target`, or `coef` without a target."""
    if not kl.target or not np.isfinite(metrics["kl"]):
        return coef
    return adapted_kl_coef(
        coef, metrics["kl"], target=kl.target, horizon=kl.horizon, episodes=episodes
    )


def eval_metrics(
    config: RLConfig, parts: Parts, state: TrainState, rows: Sequence[QARow], timer: StepTimer
) -> dict[str, float]:
    """Evaluates the state's policy; returns its metrics, named `eval/…`.

    If too many searches failed, there are no scores, so no checkpoint and no plateau counts them.
    """
    with timer.section("eval"):
        parts.generator.load(parts.learner.policy(state))
        evaluated = evaluate(config, parts, rows)
    metrics = episode_metrics(evaluated)
    if search_failures(evaluated, config.eval.max_failed_searches):
        metrics = {name: value for name, value in metrics.items() if "failed_search" in name}
    return {f"eval/{name}": value for name, value in metrics.items()}


def speed(seconds: dict[str, float], parts: Parts, rollouts: StepRollouts) -> dict[str, float]:
    """Adds `host_share`, `tokens_per_sec` and `weights_bytes` to the seconds of a step.

    Takes from the clock the time in which the devices had work since the last step.
    """
    tokens = sum(t.policy_tokens for t in rollouts.trajectories)
    return seconds | {
        "host_share": 1.0 - min(1.0, parts.clock.take() / seconds["seconds/step"]),
        "tokens_per_sec": tokens / seconds["seconds/step"],
        "weights_bytes": parts.generator.weight_bytes,
    }


def conclude(
    config: RLConfig,
    workdir: Path,
    parts: Parts,
    state: TrainState,
    rows: Sequence[QARow],
    steps: int,
) -> None:
    """Exports the trained policy and evaluates the base policy and the trained policy.

    The trained policy is also evaluated without search.

    Prints a table and an episode of each policy. Writes `policy/`, `adapters/` under LoRA,
    `answers.jsonl` (each policy's answer to each question, for paired comparisons) and, last,
    `summary.json`.

    Args:
      rows: questions of the evaluation.
      steps: finished training steps, all calls together.

    Raises:
      UserError: too many searches failed, so there is no summary.
    """
    if steps > config.rl.steps:
        print(f"{workdir} has {steps} training steps; config.rl.steps={config.rl.steps} adds none")
    policy = parts.policy
    trained_params = export(
        workdir / "policy",
        parts.learner,
        state,
        policy.tokenizer,
        config.policy.model,
        policy.generation,
    )
    parts.generator.load(policy.params)
    episodes = {"base": evaluate(config, parts, rows)}
    parts.generator.load(trained_params)
    episodes["trained"] = evaluate(config, parts, rows)
    episodes["no_search"] = evaluate(config, parts, rows, method="direct")
    for name, trajectories in episodes.items():
        if trouble := search_failures(trajectories, config.eval.max_failed_searches):
            raise UserError(
                f"evaluation of the {name} policy: {trouble}; fix config.eval.search or its server "
                "and repeat the command, which evaluates again without training"
            )
    if jax.process_index() != 0:  # the first process writes
        return
    engine = parts.eval_engine.name if parts.eval_engine else "none"
    table = {name: summary(trajectories) for name, trajectories in episodes.items()}
    title = f"{config.data.eval_source}/{config.data.test_split}, evaluated with {engine}"
    print(f"\n{text_table(table, title)}")
    lines = [
        json.dumps({"policy": name, "id": row.id, **answer}) + "\n"
        for name, trajectories in episodes.items()
        for row, answer in zip(rows, answers(trajectories), strict=True)
    ]
    write_atomically(workdir / "answers.jsonl", "".join(lines))
    # Show the embedded world's first two-hop question, or another source's first question.
    two_hops = (i for i, row in enumerate(rows) if ">" in row.id)
    shown = next(two_hops, 0) if config.data.eval_source == "world" else 0
    for name in ("base", "trained"):
        print(f"\n---- {name} policy: {rows[shown].id}, gold {rows[shown].golden_answers[0]!r}")
        print(show(episodes[name][shown], policy.tokenizer))
    rows_of_steps = earlier_rows(workdir / "metrics.jsonl", steps + 1)
    report = {
        **table,
        "steps": steps,
        "training_seconds": sum(row["seconds/step"] for row in rows_of_steps),
        "engine": engine,
        "split": config.data.test_split,
    }
    write_json(workdir / "summary.json", report)
    print(f"\nwritten to {workdir / 'summary.json'}; curves: tensorboard --logdir {workdir}")


def show(trajectory: Trajectory, tokenizer) -> str:
    """Renders an episode as readable text; inserted lines begin with `│`."""
    return render_segments(trajectory.segments(tokenizer), color=False)
