"""Compiles an rl config's programs for a TPU topology without a TPU: memory, FLOPs, collectives.

Only shapes go in. Each optimized program that comes out is the one that a TPU pod would run. It
must fit a chip's memory together with everything that stays there during training: the learner's
state, the reference policy, and the weights and caches of both generators.
"""

import os
import re
import time
from dataclasses import asdict
from pathlib import Path

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.files import write_json
from zerosearch_jax.tpu_aot import report, roofline
from zerosearch_jax.tpu_aot.collectives import collectives
from zerosearch_jax.tpu_aot.config import CompileConfig
from zerosearch_jax.tpu_aot.programs import Program, Sizes, programs_of
from zerosearch_jax.training.config import RLConfig


def run(config: ConfigDict, workdir: str) -> None:
    """Compiles `config.programs`; writes `workdir/compile.json` and `compile.md`.

    Raises:
      UserError: an unknown topology, model or program; libtpu is missing; or a program does not
        fit. The last message says which setting would make it fit.
    """
    config = config_flags.typed(CompileConfig, config)
    rl = config_flags.load(f"{config.recipe}:{config.preset}")
    rl.search.simulator.generator.int8_weights = config.int8_simulator
    rl.learner.remat = config.remat
    rl = config_flags.typed(RLConfig, rl)
    chip = chip_of(config.topology)
    devices = topology_devices(config.topology, config.slices)
    sizes = Sizes(config, rl, len(devices))
    programs, resident = programs_of(config, rl, sizes, devices)
    unknown = set(config.programs) - {program.name for program in programs}
    if unknown:
        known = ", ".join(program.name for program in programs)
        raise UserError(f"config.programs has {sorted(unknown)}; the programs are {known}")
    summary = {
        "preset": config.preset,
        "topology": config.topology,
        "slices": config.slices,
        "mesh": sizes.mesh,
        "simulator_mesh": sizes.simulator_mesh,
        "rows": sizes.rows,
        "row_tokens": rl.learner.row_tokens,
        "microbatches": sizes.microbatches,
        "resident": resident,
        "programs": [],
    }
    print(report.heading(summary), flush=True)
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    rows: list[report.Row] = []
    for program in programs:
        if program.name in config.programs:
            rows.append(compile_program(program, sum(resident.values()), chip, len(devices)))
            print(report.table(rows[-1:]).splitlines()[-1], flush=True)
            summary["programs"] = [asdict(row) for row in rows]
            write_json(path / "compile.json", summary)
    shown = report.table(rows)
    (path / "compile.md").write_text(f"{report.heading(summary)}\n\n{shown}\n")
    print(f"\n{shown}\n\nwritten to {path / 'compile.md'}")
    report.check_fits(rows, config, sizes, resident)


def chip_of(topology: str) -> roofline.Chip:
    """The chip of a topology such as v5e:8x8."""
    name = topology.partition(":")[0]
    if name not in roofline.CHIPS:
        known = ", ".join(roofline.CHIPS)
        raise UserError(
            f"config.topology is {topology!r}; write CHIP:SHAPE such as v5e:8x8; "
            f"the chips are {known}"
        )
    return roofline.CHIPS[name]


def topology_devices(topology: str, slices: int) -> list[jax.Device]:
    """Devices to compile for. Needs libtpu but no TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no metadata server to query.
    # No chip is opened, so other processes may have the library open at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = dict(topology_name=topology) | (dict(num_slices=slices) if slices > 1 else {})
    try:
        return topologies.get_topology_desc(platform="tpu", **options).devices
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(
            f"no compiler for config.topology {topology} ({str(error).splitlines()[0]}); "
            "run pip install -r requirements-tpu-aot.txt and check that the shape exists"
        ) from error


def compile_program(
    program: Program, resident: int, chip: roofline.Chip, devices: int
) -> report.Row:
    """Compiles one program and measures it.

    A program that XLA refuses for its size also gets a row, with the bytes that XLA reports.

    Args:
      resident: bytes per chip that stay in memory during training, `program.held` included.
      devices: chips of the whole topology.
    """
    began = time.monotonic()
    lowered = program.lower()
    sent: dict[str, dict[str, float]] = {}
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = refused_bytes(str(error))
        if peak is None:
            raise
        arguments, temporaries, outputs = program.held, peak - program.held, 0
    else:
        memory = executable.memory_analysis()
        arguments = memory.argument_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = arguments + temporaries + outputs + memory.generated_code_size_in_bytes
        for one in collectives(executable.as_text(), program.trips, devices):
            kind = sent.setdefault(one.kind, {"times": 0, "wire_bytes": 0.0})
            kind["times"] += one.times
            kind["wire_bytes"] += one.wire_bytes * one.times
    wire = sum(kind["wire_bytes"] for kind in sent.values())
    bound = roofline.bound(program.work, wire, chip)
    also_resident = resident - program.held
    return report.Row(
        name=program.name,
        fits=peak + also_resident <= chip.hbm_bytes,
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        peak=peak,
        also_resident=also_resident,
        hbm=chip.hbm_bytes,
        flops=program.work.flops,
        hbm_bytes=program.work.hbm_bytes,
        compute_secs=bound.compute,
        hbm_secs=bound.hbm,
        ici_secs=bound.interconnect,
        bound=bound.name,
        collectives=sent,
        compile_secs=time.monotonic() - began,
    )


def refused_bytes(message: str) -> int | None:
    """Bytes that a program needs, from XLA's out-of-memory error; None for any other error."""
    match = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    if match is None:
        return None
    return int(float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]])
