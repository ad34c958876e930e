"""Models, engines and questions of an RL run, checked and built from its config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from zerosearch_jax.data.qa import QARow, load_qa
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.parallel.device_clock import DeviceClock
from zerosearch_jax.parallel.mesh import local_meshes, make_mesh
from zerosearch_jax.rl.learner import Learner
from zerosearch_jax.rl.train_state import TrainState
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.search.engine import SearchEngine
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.fingerprints import engine_sha256, model_sha256, rows_sha256
from zerosearch_jax.training.no_signal import Notices
from zerosearch_jax.training.probe import probe
from zerosearch_jax.training.prompt_limits import fitting, prompt_limits
from zerosearch_jax.training.row_sampler import RowSampler


def load_questions(config: RLConfig) -> tuple[RowSampler, list[QARow], list[QARow]]:
    """Returns a sampler of training questions, and the questions of evaluations.

    Returns:
      The sampler; the questions of evaluations during training; those of the evaluation after it.

    Raises:
      UserError: also for a question too long for a slot, see `data.overlong`.
    """
    data, size = config.data, config.rollout.questions_per_step
    searches = [config.search] if config.rollout.max_turns else []
    training = prompt_limits(config.policy, config.rollout, searches)
    evaluation = prompt_limits(config.policy, config.rollout, (), ("search", "direct"))
    rows = load_qa(data.source, data.train_split, data.train_limit)
    eval_rows = load_qa(data.eval_source, data.eval_split, config.eval.questions)
    test_rows = load_qa(data.eval_source, data.test_split, config.eval.test_questions)
    rows = fitting(rows, training, data.overlong)
    sampler = RowSampler(rows, size, config.seed, "config.rollout.questions_per_step")
    eval_rows, test_rows = (fitting(r, evaluation, data.overlong) for r in (eval_rows, test_rows))
    return sampler, eval_rows, test_rows


def input_contents(
    config: RLConfig, train_rows: Sequence[QARow], eval_rows: Sequence[QARow]
) -> dict[str, str]:
    """Returns the fingerprints of the run's inputs. A resumed run compares them with its own."""
    return {
        "policy.model": model_sha256(config.policy.model),
        "search": engine_sha256(config.search),
        "eval.search": engine_sha256(config.eval.search),
        "training questions": rows_sha256(train_rows),
        "evaluation questions": rows_sha256(eval_rows),
    }


@dataclass(frozen=True)
class Parts:
    """Models and engines of a run.

    Attributes:
      policy: the base policy, which is also the reference policy unless that moves.
      engine, eval_engine: search engines of training and evaluation; None without searches.
      clock: measures how long the devices are busy.
      notices: explains steps and evaluations without a signal.
    """

    policy: factory.Model
    generator: Generator
    learner: Learner
    engine: SearchEngine | None
    eval_engine: SearchEngine | None
    clock: DeviceClock
    notices: Notices


def build(config: RLConfig) -> tuple[Parts, TrainState]:
    """Loads the models, builds the engines, and returns them with a fresh training state."""
    if config.rollout.max_turns:
        probe(config.search, "search", config.seed, config.mesh)
        probe(config.eval.search, "eval.search", config.seed, config.mesh)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    simulator = config.search.simulator
    own = (simulator.devices, simulator.tensor) if simulator else (0, 0)
    policy_mesh, _ = local_meshes(mesh, *own)
    policy, learner = policy_and_learner(config, mesh)
    clock = DeviceClock()
    engine = eval_engine = None
    # With max_turns=0 a search ends the episode, and no engine is needed. The evaluation engine
    # compiles nothing, so its corpus is read first.
    if config.rollout.max_turns:
        eval_engine = factory.make_engine(config.eval.search, config.seed, config.mesh)
    print("compiling the programs of the simulator and the policy", flush=True)
    if config.rollout.max_turns:
        engine = factory.make_engine(config.search, config.seed, config.mesh, clock)
    generator = factory.make_generator(
        policy, config.policy.generator, policy_mesh, STOP_STRINGS, clock
    )
    state = learner.init(policy.params, config.seed)
    if learner.base is not None:  # under LoRA the reference is the model without its adapters
        policy = replace(policy, params=learner.base)
    return Parts(policy, generator, learner, engine, eval_engine, clock, Notices()), state


def policy_and_learner(config: RLConfig, mesh: jax.sharding.Mesh) -> tuple[factory.Model, Learner]:
    """Loads the policy and builds its learner; `Learner.init` then makes the training state."""
    policy = factory.load_model(config.policy.model, mesh, "float32")
    learner = factory.make_learner(
        policy.config,
        mesh,
        config.optimizer,
        config.learner,
        steps=config.rl.steps,
        critic=config.critic if config.advantage.estimator == "ppo" else None,
        lora=config.lora,
        updates_per_step=config.updates_per_step,
        moving_reference=config.rl.refresh_reference > 0,
    )
    return policy, learner
