"""Reinforcement learning against a search engine: the paper's algorithm, top to bottom.

Every step: the curriculum sets the noise → episodes are played → rewarded → advantages within
each group → jitted updates on the policy's own tokens (`training/policy_update.py`). At the end the base
and the trained policy are judged on held-out questions with a real engine.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.checkpoints import Checkpoints
from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.baselines import evaluate_policy
from zerosearch_jax.evaluation.summary import summary, text_table
from zerosearch_jax.files import write_atomically
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.models.lora import save_adapters
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.mesh import local_meshes, make_mesh
from zerosearch_jax.parallel.processes import gather, part
from zerosearch_jax.rl.advantages import adapted_kl_coef
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.curriculum import draw_noisy, noise_probability
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.simulator import gate
from zerosearch_jax.telemetry.collapse import CollapseWatch, earlier_rows
from zerosearch_jax.telemetry.progress import Progress
from zerosearch_jax.telemetry.recorder import Recorder
from zerosearch_jax.telemetry.step_timer import StepTimer
from zerosearch_jax.telemetry.trajectories import render_segments
from zerosearch_jax.training import factory
from zerosearch_jax.training.episode_metrics import answers, episode_metrics, reward_of
from zerosearch_jax.training.nonfinite import NonFiniteCounter
from zerosearch_jax.training.policy_update import PolicyUpdater
from zerosearch_jax.training.row_sampler import RowSampler
from zerosearch_jax.training.validate import check


def run(config: ConfigDict, workdir: str) -> None:
    """Trains, evaluates and writes `workdir/summary.json`; resumes from `workdir`'s checkpoint."""
    began = time.monotonic()
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    check(config)
    check_simulator(config)

    mesh = make_mesh(**config.mesh)
    simulator = config.search.simulator
    policy_mesh, _ = local_meshes(mesh, simulator.devices, simulator.tensor)
    policy = factory.load_model(config.policy.model, mesh, "float32")
    epochs = RowSampler(
        load_qa(config.data.source, config.data.train_split, config.data.train_limit),
        config.rollout.questions_per_step,
        config.seed,
        "config.rollout.questions_per_step",
    )
    clock = DeviceClock()
    print("compiling the programs of the simulator and the policy", flush=True)
    engine = judge = None  # without turns to search in, a search ends an episode unanswered
    if config.rollout.max_turns:
        engine = factory.make_engine(config.search, config.seed, config.mesh, clock)
        judge = factory.make_engine(config.eval.search, config.seed, config.mesh)
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
        updates_per_step=config.rl.epochs * config.rl.minibatches,
    )
    state = learner.init(policy.params, config.seed)
    if learner.base is not None:  # the reference is the model with its adapters off
        policy = replace(policy, params=learner.base)
    checkpoints = Checkpoints(workdir / "checkpoints")
    first = checkpoints.latest_step() or 0
    kept = {"kl_coef": config.kl.coef, "skipped_in_a_row": 0}
    if first:
        state, kept = checkpoints.restore(first, learner.abstract_state())
        print(f"resuming after step {first}")
    writes = jax.process_index() == 0  # of several processes only the first
    if writes:
        keep_config(config, workdir / "config.json")
    kl_coef = kept["kl_coef"] if config.kl.target else config.kl.coef
    nonfinite = NonFiniteCounter(workdir, config.watch.nonfinite_limit, kept["skipped_in_a_row"])
    watch = CollapseWatch(window=config.watch.window)
    for row in earlier_rows(workdir / "metrics.jsonl", first + 1):
        watch.update(row)
    improve = PolicyUpdater(learner, policy.params, config, nonfinite, clock)
    generator.warm_up([Sampling(config.rollout.temperature), GREEDY])

    timer = StepTimer()
    judged = partial(
        evaluate_policy, generator, judge, policy.tokenizer, limits=limits_of(config.rollout)
    )
    watched = load_qa(config.data.eval_source, config.data.eval_split, config.eval.questions)
    clock.take()
    with (
        closing(Recorder(workdir, writes, first_step=first + 1)) as recorder,
        closing(Progress(config.rl.steps, first)) as progress,
    ):
        for step in range(first, config.rl.steps):
            # From p_s in the first step to p_e in the last.
            p_noisy = noise_probability(step, max(1, config.rl.steps - 1), **config.curriculum)
            with timer.section("weights"):
                generator.load(learner.policy(state))
            with timer.section("rollout"):
                played = play_step(
                    config,
                    step,
                    p_noisy,
                    epochs,
                    generator=generator,
                    engine=engine,
                    policy=policy,
                    searching=partial(timer.section, "search"),
                )
            trajectories, rewards = played.chosen()
            with timer.section("learner"):
                state, figures = improve(state, trajectories, rewards, kl_coef, step)

            done = step + 1
            figures |= episode_metrics(played.trajectories) | played.figures()
            figures |= {"p_noisy": p_noisy, "kl_coef": kl_coef}
            figures["weights_bytes"] = generator.weight_bytes
            if config.kl.target and np.isfinite(figures["kl"]):
                kl_coef = adapted_kl_coef(
                    kl_coef,
                    figures["kl"],
                    target=config.kl.target,
                    horizon=config.kl.horizon,
                    episodes=len(trajectories),
                )
            if done % config.eval.every == 0:
                with timer.section("eval"):
                    generator.load(learner.policy(state))
                    shown = judged(watched)
                figures |= {f"eval/{k}": v for k, v in episode_metrics(shown).items()}
                recorder.text(done, "trajectory", show(trajectories[0], policy.tokenizer))
            collapse = watch.update(figures)
            stopping = nonfinite.limit_reached or (config.watch.stop and watch.alarm())
            figures |= timer.pop() | collapse
            figures["host_share"] = 1.0 - min(1.0, clock.take() / figures["seconds/step"])
            figures["tokens_per_sec"] = (
                sum(t.policy_tokens for t in played.trajectories) / figures["seconds/step"]
            )
            # Before the checkpoint: a run that is killed in between writes its row again.
            recorder.scalars(done, figures)
            progress.update(done, figures)
            if done % config.checkpoint_every == 0 or done == config.rl.steps or stopping:
                with timer.section("checkpoint"):
                    kept = {"kl_coef": kl_coef, "skipped_in_a_row": nonfinite.in_a_row}
                    checkpoints.save(done, state, kept)
            if watch.alarm():
                print(f"\nstep {done}: {watch.alarm()}", flush=True)
            if nonfinite.limit_reached:
                nonfinite.raise_error(step)
            if stopping:
                raise UserError(
                    f"stopped after step {done} by config.watch.stop; its checkpoint is in "
                    f"{workdir}, earlier figures in metrics.jsonl. Go on all the same: "
                    "--config.watch.stop=False"
                )

    if learner.lora is not None:
        save_adapters(
            workdir / "adapters",
            state.params["policy"],
            learner.lora,
            policy.config,
            config.policy.model,
        )
    conclude(
        config,
        workdir,
        policy=policy,
        trained=learner.policy(state),
        generator=generator,
        judged=judged,
        engine_name=judge.name if judge else "none",
        began=began,
    )


def keep_config(config: ConfigDict, path: Path) -> None:
    """Writes the config to `path` as JSON; prints what differs from the one that stood there."""
    now = json.loads(json.dumps(config.to_dict()))  # tuples as the file gives them back
    if path.exists():
        for difference in config_flags.differences(json.loads(path.read_text()), now):
            print(f"this directory was begun with another config.{difference}")
    write_atomically(path, json.dumps(now, indent=1) + "\n")


def check_simulator(config: ConfigDict) -> None:
    """Refuses a simulator whose report, where the config names one, falls short of its gate."""
    simulator = config.search.simulator
    if config.search.engine == "simulated" and simulator.gate.report:
        gate.check(
            simulator.gate.report,
            gate.simulator_identity(config.search),
            reader_em_useful_min=simulator.gate.useful_min,
            reader_em_noisy_max=simulator.gate.noisy_max,
        )


def limits_of(rollout: ConfigDict) -> Limits:
    """What bounds an episode, in training and at evaluation alike."""
    return Limits(rollout.max_turns, rollout.response_tokens, rollout.observation_tokens)


def play_step(
    config: ConfigDict,
    step: int,
    p_noisy: float,
    epochs: RowSampler,
    *,
    generator: Generator,
    engine: SearchEngine | None,
    policy: factory.Model,
    searching: Callable[[], AbstractContextManager],
) -> "Played":
    """Plays a step's episodes; each search is noisy with probability `p_noisy`.

    Every process plays its part of the questions, and all get the episodes of all. `searching` is
    entered around every wait for the engine.
    """
    rollouts = Rollouts(
        generator,
        engine,
        policy.tokenizer,
        limits=limits_of(config.rollout),
        sampling=Sampling(config.rollout.temperature),
        noisy=lambda episode, turn: draw_noisy(config.seed, step, episode, turn, p_noisy),
        stop_on_failure=config.rollout.stop_on_failure,
        concurrent_searches=config.rollout.concurrent_searches,
        searching=searching,
    )
    played = Played(config, step)
    while not played.enough:
        episodes = part(played.next_round(epochs), config.rollout.group_size)
        played.add(gather(rollouts.run(episodes, jax.random.key(config.seed))))
    return played


class Played:
    """One step's episodes, in one round of questions or in several (dynamic sampling).

    With `config.rollout.max_rounds` above 1 further questions are played until
    `questions_per_step` groups have rewards that differ (DAPO, arXiv 2503.14476 §3.2). Where they
    stay too few the last places go to groups without a difference, which teach nothing but what
    KL and entropy ask for, so that a step's batch is always of one size.
    """

    def __init__(self, config: ConfigDict, step: int):
        self._config = config
        self._step = step
        self._rounds = 0
        self.trajectories: list[Trajectory] = []
        self._rewards = np.zeros((0, config.rollout.group_size), np.float32)

    @property
    def enough(self) -> bool:
        """Whether enough groups differ, or all rounds are played."""
        rollout = self._config.rollout
        if self._rounds < rollout.max_rounds:
            return rollout.max_rounds > 1 and sum(self._differ()) >= rollout.questions_per_step
        return True

    def next_round(self, epochs: RowSampler) -> list[Episode]:
        """The episodes to play next. Each round of each step has its own place in the data."""
        rollout = self._config.rollout
        draw = self._step * rollout.max_rounds + self._rounds
        self._rounds += 1
        return episodes_of(epochs.draw(draw), rollout.group_size, draw)

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Takes a round's episodes, group by group."""
        rewards = [reward_of(t, self._step, self._config.reward) for t in trajectories]
        self.trajectories += trajectories
        rewards = np.array(rewards, np.float32).reshape(-1, self._rewards.shape[1])
        self._rewards = np.concatenate([self._rewards, rewards])

    def chosen(self) -> tuple[list[Trajectory], np.ndarray]:
        """`questions_per_step` groups, those that differ first: Q·G episodes, `[Q, G]` rewards."""
        size = self._config.rollout.group_size
        groups = range(len(self._rewards))
        if self._config.rollout.max_rounds > 1:
            differ = self._differ()
            groups = sorted(groups, key=lambda group: not differ[group])
        groups = sorted(groups[: self._config.rollout.questions_per_step])
        members = [self.trajectories[group * size + i] for group in groups for i in range(size)]
        return members, self._rewards[list(groups)]

    def figures(self) -> dict[str, float]:
        """Figures of all episodes that were played."""
        searches = [request.noisy for t in self.trajectories for request, _ in t.searches]
        return {
            "reward": float(self._rewards.mean()),
            "zero_variance_groups": 1.0 - float(np.mean(self._differ())),
            "noisy_ratio": float(np.mean(searches)) if searches else 0.0,
            "sampling_rounds": float(self._rounds),
        }

    def _differ(self) -> list[bool]:
        return (np.ptp(self._rewards, axis=1) != 0).tolist()


def episodes_of(rows: Sequence[QARow], group_size: int, draw: int) -> list[Episode]:
    """The episodes of one draw, group by group, one group a row; numbered through the run."""
    number = draw * len(rows) * group_size
    return [
        Episode(number + i * group_size + member, row.question, row.golden_answers)
        for i, row in enumerate(rows)
        for member in range(group_size)
    ]


def conclude(
    config: ConfigDict,
    workdir: Path,
    *,
    policy: factory.Model,
    trained: nnx.State,
    generator: Generator,
    judged: Callable[..., list[Trajectory]],
    engine_name: str,
    began: float,
) -> None:
    """Exports the trained policy and judges it beside the base policy and without search.

    Prints the table and an episode of each policy; writes `policy/`, `answers.jsonl` (what each
    answered to each question, for paired comparisons) and, last, `summary.json`.

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
    test = load_qa(config.data.eval_source, config.data.test_split, config.eval.test_questions)
    generator.load(policy.params)
    played = {"base": judged(test)}
    generator.load(trained)
    played |= {"trained": judged(test), "no_search": judged(test, method="direct")}
    if jax.process_index() != 0:  # it had to help; the first process writes
        return
    policy.tokenizer.save_pretrained(workdir / "policy")
    table = {name: summary(trajectories) for name, trajectories in played.items()}
    title = f"{config.data.eval_source}/{config.data.test_split}, judged with {engine_name}"
    print(f"\n{text_table(table, title)}")
    rows = [
        {"policy": name, "id": row.id, **answer}
        for name, trajectories in played.items()
        for row, answer in zip(test, answers(trajectories), strict=True)
    ]
    (workdir / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    write_atomically(workdir / "summary.json", json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {workdir / 'summary.json'}; curves: tensorboard --logdir {workdir}")


def question_to_show(rows: Sequence[QARow], source: str) -> int:
    """Which row's episodes are printed: the embedded world's first two-hop one, else the first."""
    two_hop = [i for i, row in enumerate(rows) if source == "world" and ">" in row.id]
    return two_hop[0] if two_hop else 0


def show(trajectory: Trajectory, tokenizer) -> str:
    """An episode for people, inserted text behind a margin."""
    return render_segments(trajectory.segments(tokenizer), color=False)
