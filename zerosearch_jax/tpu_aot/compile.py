"""Compiles an rl config's programs for a TPU topology without a TPU: bytes, FLOPs, collectives.

Shapes alone go in; the optimized program that comes out is the one that a pod would run. Every
program is held against a chip's memory beside all that stays there during training: the learner's
state, the reference policy, both generators' weights and caches.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.markdown import table
from zerosearch_jax.generate.abstract import AbstractGenerator, abstract_generator
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.models.attention import KEY_BLOCK
from zerosearch_jax.models.config import ModelConfig, from_hf
from zerosearch_jax.models.transformer import split_layers
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.rl.batch import LearnerBatch
from zerosearch_jax.rollout.scheduler import STOP_STRINGS
from zerosearch_jax.tpu_aot import roofline
from zerosearch_jax.tpu_aot.collectives import collectives
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.policy_update import objective_of

INTS = ("tokens", "targets", "positions", "segment_ids")
FLOATS = ("mask", "old_logprobs", "sampler_logprobs", "correct")  # columns of every batch
OF_UPDATES = ("ref_logprobs", "weights", "advantages")
MOST_TENSOR = 4  # chips of a host: a generator lives on those of one process
GIB = 2**30


@dataclass(frozen=True)
class Program:
    """One program to compile.

    Attributes:
      work: of one chip, by the formulas of `roofline`.
      trips: turns of its loops whose number depends on data, the outermost first.
      held: bytes a chip of its arguments that stay in memory between programs.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    work: roofline.Work
    trips: tuple[int, ...]
    held: int


@dataclass(frozen=True)
class Row:
    """What compiling one program told; bytes are a chip's, seconds those of one call.

    Attributes:
      peak: arguments, outputs that are no donated arguments, temporaries and code.
      beside: what else stays in memory meanwhile.
      collectives: of each kind how often they run and what a chip sends.
    """

    name: str
    fits: bool
    arguments: int
    temporaries: int
    outputs: int
    peak: int
    beside: int
    hbm: int
    flops: float
    hbm_bytes: float
    compute_secs: float
    hbm_secs: float
    ici_secs: float
    bound: str
    collectives: dict[str, dict[str, float]]
    compile_secs: float


def run(config: ConfigDict, workdir: str) -> None:
    """Compiles `config.programs`; writes `workdir/compile.json` and `compile.md`.

    Raises:
      UserError: an unknown topology or model, no libtpu, or a program that does not fit, with
        what would make it fit.
    """
    rl = config_flags.load(f"{config.recipe}:{config.preset}").unlock()
    rl.search.simulator.generator.int8_weights = config.int8_simulator
    chip = chip_of(config.topology)
    devices = topology_devices(config.topology, config.slices)
    sizes = Sizes(config, rl, len(devices))
    programs, resident = programs_of(config, rl, sizes, devices)
    unknown = set(config.programs) - {program.name for program in programs}
    if unknown:
        known = ", ".join(program.name for program in programs)
        raise UserError(f"config.programs has {sorted(unknown)}; the programs are {known}")
    report = {
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
    print(heading(report), flush=True)
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for program in programs:
        if program.name in config.programs:
            rows.append(compiled(program, sum(resident.values()), chip, len(devices)))
            print(table([cells(rows[-1])]).splitlines()[-1], flush=True)
            report["programs"] = [asdict(row) for row in rows]
            (path / "compile.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = table([cells(row) for row in rows])
    (path / "compile.md").write_text(f"{heading(report)}\n\n{shown}\n")
    print(f"\n{shown}\n\nwritten to {path / 'compile.md'}")
    too_large = [row for row in rows if not row.fits]
    if too_large:
        names = ", ".join(row.name for row in too_large)
        worst = max(too_large, key=lambda row: row.peak + row.beside)
        raise UserError(
            f"{names}: {(worst.peak + worst.beside) / GIB:.1f} GiB do not fit the "
            f"{worst.hbm / GIB:.0f} GiB of a {config.topology} chip; "
            + advice(config, sizes, resident, worst)
        )


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
    """Devices to compile for; needs libtpu, no TPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    # No chip is opened, so it does not matter who else has the library open.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = dict(topology_name=topology) | (dict(num_slices=slices) if slices > 1 else {})
    try:
        return topologies.get_topology_desc(platform="tpu", **options).devices
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(
            f"no compiler for {topology} ({str(error).splitlines()[0]}); "
            "pip install -r requirements-tpu-aot.txt, and see that the shape exists"
        ) from error


class Sizes:
    """Meshes, rows and slots for a number of chips."""

    def __init__(self, config: ConfigDict, rl: ConfigDict, chips: int):
        self.policy = model_sizes(config, rl.policy.model)
        self.simulator = model_sizes(config, rl.search.simulator.model)
        parts = chips, config.slices
        self.mesh = filled("mesh", config.mesh, *parts, self.policy)
        self.simulator_mesh = filled(
            "simulator_mesh", config.simulator_mesh, *parts, self.simulator
        )
        self.rows = config.rows_each * self.mesh["data"] * self.mesh["fsdp"]
        episodes = rl.rollout.questions_per_step * rl.rollout.group_size
        self.microbatches = config.microbatches or -(-episodes // self.rows)


def model_sizes(config: ConfigDict, name: str) -> ModelConfig:
    """The sizes of a model by the name that the rl config gives it."""
    for hf in config.models.values():
        if hf.name == name:
            return from_hf(hf.to_dict())
    known = ", ".join(hf.name for hf in config.models.values())
    raise UserError(f"config.models has no {name}, only {known}; add its config.json's sizes")


def filled(
    key: str, mesh: ConfigDict, chips: int, slices: int, model: ModelConfig
) -> dict[str, int]:
    """A mesh over all chips of all slices. Where a size is 0 it is chosen:

    `data` is the number of slices, `tensor` as large as the heads allow, `fsdp` the rest.

    Raises:
      UserError: the mesh does not use all chips or does not divide the model.
    """
    data, fsdp, tensor = mesh.data or slices, mesh.fsdp, mesh.tensor
    divisible = math.gcd(model.num_kv_heads, model.vocab_size, model.mlp_dim, MOST_TENSOR)
    tensor = tensor or math.gcd(divisible, chips // data)
    fsdp = fsdp or chips // (data * tensor)
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    if data * fsdp * tensor != chips or data % slices:
        chosen = ConfigDict(dict.fromkeys(mesh_lib.AXES, 0))
        nearest = filled(key, chosen, chips, slices, model)
        within = f" in {slices} slices" if slices > 1 else ""
        raise UserError(
            f"config.{key} {_mesh(sizes)} is not {chips} chips{within}; {_mesh(nearest)} is"
        )
    if divisible % tensor or model.embed_dim % fsdp:
        raise UserError(
            f"config.{key} {_mesh(sizes)} does not divide {model.num_kv_heads} key-value heads, "
            f"{model.vocab_size} tokens and {model.embed_dim} features; tensor can be {divisible} "
            "at most"
        )
    return sizes


def programs_of(
    config: ConfigDict, rl: ConfigDict, sizes: Sizes, devices: list[jax.Device]
) -> tuple[list[Program], dict[str, int]]:
    """The programs of one training step, and bytes a chip of what stays in memory, by name."""
    programs, resident, trained = learner_programs(config, rl, sizes, devices)
    simulator = rl.search.simulator
    stops = (f"Doc {rl.search.topk + 1}",)
    for name, model, mesh, generator, sampling, strings, loaded in (
        ("policy", sizes.policy, sizes.mesh, rl.policy.generator,
         Sampling(rl.rollout.temperature), STOP_STRINGS, trained),
        ("simulator", sizes.simulator, sizes.simulator_mesh, simulator.generator,
         Sampling(simulator.temperature, simulator.top_k, simulator.top_p), stops, None),
    ):  # fmt: skip
        added, held = generator_programs(
            name, model, mesh, generator, sampling, strings, config.slots_each, devices, loaded
        )
        programs += added
        resident |= held
    return programs, resident


def learner_programs(
    config: ConfigDict, rl: ConfigDict, sizes: Sizes, devices: list[jax.Device]
) -> tuple[list[Program], dict[str, int], nnx.State]:
    """The learner step and the reference's log-probs; the policy's parameters, as shapes."""
    mesh = mesh_lib.make_mesh(**sizes.mesh, devices=devices)
    rl.learner.remat = config.remat
    learner = factory.make_learner(sizes.policy, mesh, rl.optimizer, rl.learner)
    length, tensor = rl.learner.row_tokens, sizes.mesh["tensor"]
    shape = (sizes.microbatches, sizes.rows, length)

    def batch(*floats: str) -> LearnerBatch:
        by_row = mesh_lib.sharding_of_batch(mesh)
        dtypes = dict.fromkeys(INTS, jnp.int32) | dict.fromkeys(floats, jnp.float32)
        arrays = {k: jax.ShapeDtypeStruct(shape, t, sharding=by_row) for k, t in dtypes.items()}
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
        return LearnerBatch(**arrays, num_microbatches=scalar)

    each = dict(rows=config.rows_each, length=length, tensor=tensor)
    chunks = -(-length // rl.learner.logprob_chunk)
    reference = learner.abstract_reference()
    resident = {
        "learner state": chip_bytes(learner.abstract_state()),
        "reference": chip_bytes(reference),
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(reference))
    trained = roofline.trained(sizes.policy, **each, remat=config.remat)
    scored = roofline.scored(sizes.policy, **each)
    updated = roofline.updated(parameters / (sizes.mesh["fsdp"] * tensor))
    programs = [
        Program(
            "learner step",
            lambda: learner.lower_rl_step(
                batch(*FLOATS, *OF_UPDATES), objective_of(config_flags.typed(RLConfig, rl))
            ),
            trained * sizes.microbatches + updated,
            (sizes.microbatches, chunks),
            resident["learner state"],
        ),
        Program(
            "reference log-probs",
            lambda: learner.lower_logprobs(batch(*FLOATS), rl.rollout.temperature),
            scored * sizes.microbatches,
            (sizes.microbatches, chunks),
            resident["reference"],
        ),
    ]
    return programs, resident, reference


def generator_programs(
    name: str,
    model: ModelConfig,
    mesh_sizes: dict[str, int],
    config: ConfigDict,
    sampling: Sampling,
    stop_strings: tuple[str, ...],
    slots_each: int,
    devices: list[jax.Device],
    trained: nnx.State | None,
) -> tuple[list[Program], dict[str, int]]:
    """Prefill and decode of one model; of one that is `trained`, how it gets its weights."""
    tensor = mesh_sizes["tensor"]
    prompt = max(config.prefill_buckets)
    generator: AbstractGenerator = abstract_generator(
        model,
        stop_table=build_stop_table([b""] * model.vocab_size, stop_strings),
        sampling=sampling,
        slots=slots_each * mesh_sizes["data"] * mesh_sizes["fsdp"],
        max_tokens=config.max_tokens,
        mesh=mesh_lib.make_mesh(**mesh_sizes, devices=devices),
        prefill_rows=config.prefill_rows,
        prefill_tokens=prompt,
        chunk_tokens=config.chunk_tokens,
        dtype=factory.dtype_of(config.dtype),
        int8_weights=config.int8_weights,
    )
    resident = {
        f"{name} weights": chip_bytes(generator.params),
        f"{name} cache": chip_bytes(generator.cache),
    }
    weight = 1 if config.int8_weights else 2
    common = dict(window=config.max_tokens, tensor=tensor, weight=weight)
    rows = min(config.prefill_rows, slots_each)
    prefilled = roofline.prefilled(model, rows=rows, tokens=prompt, **common)
    decoded = roofline.decoded(model, rows=slots_each, burst=config.chunk_tokens, **common)
    held = sum(resident.values())
    blocks = (math.ceil(config.max_tokens / KEY_BLOCK),)
    programs = [
        Program(f"{name} prefill", generator.prefill, prefilled, blocks, held),
        Program(f"{name} decode", generator.decode, decoded, (config.chunk_tokens,), held),
    ]
    if trained is not None:
        # Of one layer, read from the learner's state; what the others became stands beside it.
        held = chip_bytes(split_layers(trained)[1])
        layer = (held + chip_bytes(generator.params["layers"])) / model.num_layers
        moved = roofline.Work(0.0, layer)
        programs.append(
            Program(f"{name} weights, a layer", lambda: generator.load(trained), moved, (), held)
        )
    return programs, resident


def chip_bytes(tree) -> int:
    """Bytes on one chip of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled(program: Program, resident: int, chip: roofline.Chip, devices: int) -> Row:
    """Compiles one program. What XLA refuses for its size is a row, too, with what it says."""
    began = time.monotonic()
    lowered = program.lower()
    beside = resident - program.held
    sent: dict[str, dict[str, float]] = {}
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error))
        if needed is None:
            raise
        arguments, temporaries, outputs, peak = program.held, needed - program.held, 0, needed
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
    return Row(
        name=program.name,
        fits=peak + beside <= chip.hbm_bytes,
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        peak=peak,
        beside=beside,
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
    """How many bytes a program wanted that XLA refused for its size; None: another complaint."""
    match = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
    if match is None:
        return None
    return int(float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]])


def advice(config: ConfigDict, sizes: Sizes, resident: dict[str, int], row: Row) -> str:
    """What would make `row` fit, what costs no speed first."""
    split = resident["learner state"] + resident["reference"]
    whole = sum(resident.values()) - split
    over = row.peak + row.beside - row.hbm
    if row.name == "learner step" and config.remat != "full":
        return "--config.remat=full computes the layers again instead of keeping them"
    of_learner = row.name in ("learner step", "reference log-probs")
    if of_learner and config.rows_each > 1 and row.temporaries / 2 > over:
        return f"--config.rows_each={config.rows_each // 2} halves a microbatch"
    times = next((n for n in (2, 4, 8, 16) if split - split / n > over), None)
    if times:
        mesh = sizes.mesh | {"fsdp": sizes.mesh["fsdp"] * times}
        return f"{times} times the chips do, with config.mesh {_mesh(mesh)}"
    return (
        f"of that {whole / GIB:.1f} GiB are the generators': give int8_simulator, fewer slots_each "
        "or shorter max_tokens, or more tensor in config.simulator_mesh"
    )


def heading(report: dict) -> str:
    """What was compiled, and what stays in memory."""
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["resident"].items())
    return (
        f"{report['preset']} on {report['slices']} × {report['topology']}: policy "
        f"{_mesh(report['mesh'])}, simulator {_mesh(report['simulator_mesh'])}; "
        f"{report['microbatches']} microbatches of {report['rows']} × {report['row_tokens']} "
        "tokens\n\n"
        f"GiB a chip that stay: {held}; together {sum(report['resident'].values()) / GIB:.2f}"
    )


def cells(row: Row) -> dict[str, object]:
    """A row of the table: GiB of one chip, and what one call does there."""
    sent = sum(kind["wire_bytes"] for kind in row.collectives.values())
    gib = {
        "arguments": row.arguments,
        "temporaries": row.temporaries,
        "peak": row.peak,
        "+ beside": row.peak + row.beside,
        "of": row.hbm,
    }
    return {
        "program": row.name,
        "fits": "yes" if row.fits else "NO",
        **{name: f"{size / GIB:.2f}" for name, size in gib.items()},
        "TFLOP": f"{row.flops / 1e12:.2f}",
        "GB moved": f"{row.hbm_bytes / 1e9:.1f}",
        "GB sent": f"{sent / 1e9:.2f}",
        "compute s": f"{row.compute_secs:.3g}",
        "HBM s": f"{row.hbm_secs:.3g}",
        "links s": f"{row.ici_secs:.3g}",
        "bound": row.bound,
        "compile s": f"{row.compile_secs:.0f}",
    }


def _mesh(sizes: dict[str, int]) -> str:
    return " × ".join(f"{axis}={size}" for axis, size in sizes.items())
