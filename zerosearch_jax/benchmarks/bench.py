"""The bench job: speed as ratios to named peers, measured in the same run."""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax.benchmarks import decode, learner, rollout
from zerosearch_jax.benchmarks.rows import report
from zerosearch_jax.errors import UserError

SUITES = {
    "rollout": rollout.run,
    "decode": decode.run,
    "bandwidth": decode.accelerator,
    "learner": learner.run,
    "mfu": learner.mfu,
}


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the suite `config.suite`; prints a table and writes `workdir/bench.json`.

    Raises:
      UserError: there is no such suite.
    """
    if config.suite not in SUITES:
        raise UserError(f"config.suite is {config.suite!r}; choose one of {', '.join(SUITES)}")
    report(SUITES[config.suite](config), Path(workdir))
