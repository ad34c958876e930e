"""Benchmarks: speed as ratios against named peers that run in the same process or alternately."""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax.errors import UserError
from zerosearch_jax.jobs import bench_decode, bench_learner, bench_rollout
from zerosearch_jax.jobs.bench_rows import report

SUITES = {
    "rollout": bench_rollout.run,
    "decode": bench_decode.run,
    "bandwidth": bench_decode.accelerator,
    "learner": bench_learner.run,
    "mfu": bench_learner.mfu,
}


def run(config: ConfigDict, workdir: str) -> None:
    """Runs the suite that `config.suite` names; prints a table and writes `bench.json`."""
    if config.suite not in SUITES:
        raise UserError(f"config.suite is {config.suite!r}; choose one of {', '.join(SUITES)}")
    report(SUITES[config.suite](config), Path(workdir))
