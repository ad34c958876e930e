"""The bench job: speed as ratios to named peers, measured in the same run."""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.benchmarks import config as configs
from zerosearch_jax.benchmarks import decode, learner, rollout
from zerosearch_jax.benchmarks.rows import report
from zerosearch_jax.errors import UserError

SUITES = {
    "rollout": (rollout.run, configs.RolloutBenchConfig),
    "decode": (decode.run, configs.DecodeBenchConfig),
    "bandwidth": (decode.accelerator, configs.BandwidthBenchConfig),
    "learner": (learner.run, configs.LearnerBenchConfig),
    "mfu": (learner.mfu, configs.MFUBenchConfig),
}
"""Suite: its function and the dataclass of its config."""


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the suite `config.suite`; prints a table and writes `workdir/bench.json`.

    Raises:
      UserError: there is no such suite.
    """
    if config.suite not in SUITES:
        raise UserError(f"config.suite is {config.suite!r}; choose one of {', '.join(SUITES)}")
    suite, config_class = SUITES[config.suite]
    report(suite(config_flags.typed(config_class, config)), Path(workdir))
