"""The rollouts of one RL step: its questions, episodes and rewards, and the groups to train on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import Terminated
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.parallel.processes import gather, part
from zerosearch_jax.parallel.stop_request import StopRequest
from zerosearch_jax.rollout.scheduler import Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search.curriculum import draw_noisy
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.training.config import RLConfig, RolloutConfig
from zerosearch_jax.training.episode_metrics import reward_of
from zerosearch_jax.training.row_sampler import RowSampler


class StepRollouts:
    """Episodes of one step, from one round of questions or several (dynamic sampling).

    Rounds are added until `questions_per_step` groups have episodes with unequal rewards, or until
    `rollout.max_rounds` rounds are done (DAPO, arXiv 2503.14476 §3.2). If too few groups qualify,
    zero-variance groups fill the batch, to keep its shape fixed. Under GRPO and RLOO the advantages
    of such a group, if it has several episodes, are 0.
    """

    def __init__(self, config: RLConfig, step: int):
        self._config = config
        self._step = step
        self._rounds = 0
        self._rewards = np.zeros((0, config.rollout.group_size), np.float32)
        self.trajectories: list[Trajectory] = []

    @property
    def complete(self) -> bool:
        """Whether enough groups have unequal rewards, or all rounds are done."""
        rollout = self._config.rollout
        enough = sum(self._differ()) >= rollout.questions_per_step
        return enough or self._rounds == rollout.max_rounds

    def next_round(self, sampler: RowSampler) -> list[Episode]:
        """Returns the episodes of the next round; each round of each step has its own draw."""
        rollout = self._config.rollout
        draw = self._step * rollout.max_rounds + self._rounds
        self._rounds += 1
        return episodes_of(sampler.draw(draw), rollout.group_size, draw)

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Adds the episodes of a round, group by group, and computes their rewards."""
        rewards = [reward_of(t, self._step, self._config.reward) for t in trajectories]
        rewards = np.array(rewards, np.float32).reshape(-1, self._rewards.shape[1])
        self._rewards = np.concatenate([self._rewards, rewards])
        self.trajectories += trajectories

    def selected(self) -> tuple[list[Trajectory], np.ndarray]:
        """Returns the groups to train on; groups with unequal rewards have priority.

        Returns:
          Q·G episodes, group by group, and their rewards `[Q, G]`.
        """
        size, differ = self._config.rollout.group_size, self._differ()
        groups = sorted(range(len(differ)), key=lambda group: not differ[group])
        groups = sorted(groups[: self._config.rollout.questions_per_step])
        episodes = [self.trajectories[group * size + i] for group in groups for i in range(size)]
        return episodes, self._rewards[groups]

    def metrics(self) -> dict[str, float]:
        """Returns metrics of all episodes of the step, selected or not."""
        searches = [request.noisy for t in self.trajectories for request, _ in t.searches]
        return {
            "reward": float(self._rewards.mean()),
            "zero_variance_groups": 1.0 - float(np.mean(self._differ())),
            "noisy_ratio": float(np.mean(searches)) if searches else 0.0,
            "sampling_rounds": float(self._rounds),
        }

    def _differ(self) -> list[bool]:
        return (np.ptp(self._rewards, axis=1) != 0).tolist()


def run_step(
    config: RLConfig,
    step: int,
    p_noisy: float,
    sampler: RowSampler,
    *,
    generator: Generator,
    engine: SearchEngine | None,
    tokenizer,
    searching: Callable[[], AbstractContextManager],
    stop: StopRequest,
) -> StepRollouts:
    """Runs the episodes of step `step`; each search is noisy with probability `p_noisy`.

    Every process runs its part of the questions and receives the episodes of all processes.

    Args:
      searching: returns a context manager that times the periods in which only the engine works.

    Raises:
      Terminated: a process got SIGTERM; all processes raise.
    """
    rollouts = Rollouts(
        generator,
        engine,
        tokenizer,
        limits=limits_of(config.rollout),
        sampling=Sampling(config.rollout.temperature),
        noisy=lambda episode, turn: draw_noisy(config.seed, step, episode, turn, p_noisy),
        stop_on_failure=config.rollout.stop_on_failure,
        concurrent_searches=config.rollout.concurrent_searches,
        searching=searching,
    )
    of_step = StepRollouts(config, step)
    while not of_step.complete:
        episodes = part(of_step.next_round(sampler), config.rollout.group_size)
        try:
            with stop.interruptible():
                own = rollouts.run(episodes, jax.random.key(config.seed))
        except Terminated:
            own = [None]
        trajectories = gather(own)
        if None in trajectories:
            raise Terminated
        of_step.add(trajectories)
    return of_step


def episodes_of(rows: Sequence[QARow], group_size: int, draw: int) -> list[Episode]:
    """Returns one group of episodes per row, numbered without repetition through the run."""
    first = draw * len(rows) * group_size
    return [
        Episode(first + i * group_size + member, row.question, row.golden_answers)
        for i, row in enumerate(rows)
        for member in range(group_size)
    ]


def limits_of(rollout: RolloutConfig) -> Limits:
    """Returns the limits of an episode, the same in training and evaluation."""
    return Limits(rollout.max_turns, rollout.response_tokens, rollout.observation_tokens)
