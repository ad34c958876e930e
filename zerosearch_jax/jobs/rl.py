"""Reinforcement learning against a search engine: the paper's algorithm, top to bottom.

Each step sets the curriculum's noise, runs episodes, rewards them, and updates the policy on the
tokens that it sampled itself (`training/policy_update.py`). At the end the base and the trained
policy are evaluated on held-out questions with a real engine.
"""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.evaluation.baselines import run_method
from zerosearch_jax.evaluation.summary import summary, text_table
from zerosearch_jax.files import write_json
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.mesh import local_meshes, make_mesh
from zerosearch_jax.rl.advantages import adapted_kl_coef
from zerosearch_jax.rl.config import KLConfig
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.train_state import TrainState
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.rollout.trajectory import Trajectory
from zerosearch_jax.search.curriculum import noise_probability
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.simulator import gate
from zerosearch_jax.telemetry.profiler import Profiler
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder, earlier_rows
from zerosearch_jax.telemetry.step_timer import StepTimer
from zerosearch_jax.telemetry.trajectories import render_segments
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.episode_metrics import answers, episode_metrics
from zerosearch_jax.training.policy_update import PolicyUpdater
from zerosearch_jax.training.row_sampler import RowSampler
from zerosearch_jax.training.run_monitor import Decision, RunMonitor
from zerosearch_jax.training.step_rollouts import StepRollouts, limits_of, run_step
from zerosearch_jax.training.train_state import export, resume, roll_back
from zerosearch_jax.training.validate import check
from zerosearch_jax.training.workdir import check_workdir, keep_config


def run(config: ConfigDict, workdir: str, profile_steps: tuple[int, ...] = ()) -> None:
    """Trains, evaluates and writes `workdir/summary.json`; resumes from `workdir`'s checkpoint.

    Args:
      profile_steps: numbers of the steps to profile, counted from 1; traces go to
        `workdir/profile`.
    """
    began, raw, config = time.monotonic(), config, config_flags.typed(RLConfig, config)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    check(config)
    check_workdir(workdir)
    check_simulator(config)
    sampler, eval_rows = load_questions(config)
    parts, state = build(config)
    policy, generator, learner, kl = parts.policy, parts.generator, parts.learner, config.kl
    checkpoints = Checkpoints(workdir / "checkpoints")
    state, first, kept = resume(checkpoints, learner, state, {"kl_coef": kl.coef})
    kl_coef = kept["kl_coef"] if kl.target else kl.coef
    is_writer = jax.process_index() == 0
    if is_writer:
        keep_config(raw, workdir)
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
    ):
        for step in monitor.steps(first):
            done = step + 1
            with profiler.step(done):
                rollouts = collect(config, step, sampler, parts, state, timer)
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

                em = metrics.get("eval/em")
                if monitor.decision is Decision.ROLL_BACK:
                    state, em = roll_back(checkpoints, learner), None
                due = done % config.checkpoint_every == 0 or done == config.rl.steps
                if due or monitor.decision is not Decision.CONTINUE or checkpoints.improves(em):
                    with timer.section("checkpoint"):
                        kept = monitor.kept() | {"kl_coef": kl_coef}
                        checkpoints.save(done, state, kept, score=em)
            monitor.raise_if_stopped(done)

    conclude(config, workdir, parts, state, began)


@dataclass(frozen=True)
class Parts:
    """Models and engines of a run.

    Attributes:
      policy: the base policy, which is also the reference policy unless that moves.
      engine, eval_engine: search engines of training and evaluation; None without searches.
      clock: measures how long the devices are busy.
    """

    policy: factory.Model
    generator: Generator
    learner: Learner
    engine: SearchEngine | None
    eval_engine: SearchEngine | None
    clock: DeviceClock


def build(config: RLConfig) -> tuple[Parts, TrainState]:
    """Loads the models, builds the engines, and returns them with a fresh training state."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    simulator = config.search.simulator
    policy_mesh, _ = local_meshes(mesh, simulator.devices, simulator.tensor)
    policy = factory.load_model(config.policy.model, mesh, "float32")
    clock = DeviceClock()
    print("compiling the programs of the simulator and the policy", flush=True)
    engine = eval_engine = None
    if config.rollout.max_turns:  # with max_turns=0 a search ends the episode: no engine is needed
        engine = factory.make_engine(config.search, config.seed, config.mesh, clock)
        eval_engine = factory.make_engine(config.eval.search, config.seed, config.mesh)
    generator = factory.make_generator(
        policy, config.policy.generator, policy_mesh, STOP_STRINGS, clock
    )
    learner = factory.make_learner(
        policy.config,
        mesh,
        config.optimizer,
        config.learner,
        critic=config.critic if config.advantage.estimator == "ppo" else None,
        lora=config.lora,
        updates_per_step=config.updates_per_step,
        moving_reference=config.rl.refresh_reference > 0,
    )
    state = learner.init(policy.params, config.seed)
    if learner.base is not None:  # under LoRA the reference is the model without its adapters
        policy = replace(policy, params=learner.base)
    return Parts(policy, generator, learner, engine, eval_engine, clock), state


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


def load_questions(config: RLConfig) -> tuple[RowSampler, list[QARow]]:
    """Returns a sampler of training questions, and the questions of evaluations during training."""
    data, size = config.data, config.rollout.questions_per_step
    rows = load_qa(data.source, data.train_split, data.train_limit)
    sampler = RowSampler(rows, size, config.seed, "config.rollout.questions_per_step")
    return sampler, load_qa(data.eval_source, data.eval_split, config.eval.questions)


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
) -> StepRollouts:
    """Runs the episodes of a step, with the state's policy, against the training engine."""
    with timer.section("weights"):
        parts.generator.load(parts.learner.policy(state))
    with timer.section("rollout"):
        return run_step(
            config,
            step,
            step_noise(config, step),
            sampler,
            generator=parts.generator,
            engine=parts.engine,
            tokenizer=parts.policy.tokenizer,
            searching=partial(timer.section, "search"),
        )


def evaluate(
    config: RLConfig, parts: Parts, rows: Sequence[QARow], method: str = "search"
) -> list[Trajectory]:
    """Runs greedy episodes of the loaded policy with the evaluation engine."""
    return run_method(
        method,
        parts.generator,
        parts.eval_engine,
        parts.policy.tokenizer,
        rows,
        limits=limits_of(config.rollout),
    )


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
    """Evaluates the state's policy; returns its metrics, named `eval/…`."""
    with timer.section("eval"):
        parts.generator.load(parts.learner.policy(state))
        evaluated = evaluate(config, parts, rows)
    return {f"eval/{name}": value for name, value in episode_metrics(evaluated).items()}


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
    config: RLConfig, workdir: Path, parts: Parts, state: TrainState, began: float
) -> None:
    """Exports the trained policy and evaluates the base policy and the trained policy.

    The trained policy is also evaluated without search.

    Prints a table and an episode of each policy. Writes `policy/`, `adapters/` under LoRA,
    `answers.jsonl` (each policy's answer to each question, for paired comparisons) and, last,
    `summary.json`.

    Args:
      began: `time.monotonic()` at the run's start.
    """
    policy = parts.policy
    trained_params = export(
        workdir / "policy", parts.learner, state, policy.tokenizer, config.policy.model
    )
    rows = load_qa(config.data.eval_source, config.data.test_split, config.eval.test_questions)
    parts.generator.load(policy.params)
    episodes = {"base": evaluate(config, parts, rows)}
    parts.generator.load(trained_params)
    episodes["trained"] = evaluate(config, parts, rows)
    episodes["no_search"] = evaluate(config, parts, rows, method="direct")
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
    (workdir / "answers.jsonl").write_text("".join(lines))
    # Show the embedded world's first two-hop question, or another source's first question.
    two_hops = (i for i, row in enumerate(rows) if ">" in row.id)
    shown = next(two_hops, 0) if config.data.eval_source == "world" else 0
    for name in ("base", "trained"):
        print(f"\n---- {name} policy: {rows[shown].id}, gold {rows[shown].golden_answers[0]!r}")
        print(show(episodes[name][shown], policy.tokenizer))
    report = {
        **table,
        "steps": config.rl.steps,
        "seconds": time.monotonic() - began,
        "engine": engine,
        "split": config.data.test_split,
    }
    write_json(workdir / "summary.json", report)
    print(f"\nwritten to {workdir / 'summary.json'}; curves: tensorboard --logdir {workdir}")


def show(trajectory: Trajectory, tokenizer) -> str:
    """Renders an episode as readable text; inserted lines begin with `│`."""
    return render_segments(trajectory.segments(tokenizer), color=False)
