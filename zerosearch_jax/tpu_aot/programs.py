"""The programs of one training step as shapes, with the cost of each.

A program is the learner's step, the reference policy's log-probs, prefill or decode of a generator,
or the transfer of new weights to the policy's generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from zerosearch_jax.errors import UserError
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
from zerosearch_jax.tpu_aot.config import ChosenMeshConfig, CompileConfig
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.policy_update import objective_of
from zerosearch_jax.training.sections import GeneratorConfig

INTS = ("tokens", "targets", "positions", "segment_ids")
FLOATS = ("mask", "old_logprobs", "sampler_logprobs", "correct")  # columns of every batch
OF_UPDATES = ("ref_logprobs", "weights", "advantages")
MAX_TENSOR = 4  # chips of a host, because a replica of a generator lives in one process


@dataclass(frozen=True)
class Program:
    """One program to compile.

    Attributes:
      work: one chip's work per call, by the formulas of `roofline`.
      trips: trip counts of the loops whose length depends on data, the outermost loop first.
      held: bytes per chip of the arguments that stay in memory between calls.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    work: roofline.Work
    trips: tuple[int, ...]
    held: int


class Sizes:
    """Models, meshes and batch sizes for a number of chips.

    Attributes:
      policy, simulator: sizes of the two models.
      mesh, simulator_mesh: chips along each axis of the two meshes.
      rows: rows of a microbatch over all chips.
      microbatches: microbatches of a step.
    """

    def __init__(self, config: CompileConfig, rl: RLConfig, chips: int):
        self.policy = model_sizes(config, rl.policy.model)
        self.simulator = model_sizes(config, rl.search.simulator.model)
        parts = chips, config.slices
        self.mesh = fill_mesh("mesh", config.mesh, *parts, self.policy)
        self.simulator_mesh = fill_mesh(
            "simulator_mesh", config.simulator_mesh, *parts, self.simulator
        )
        self.rows = config.rows_each * self.mesh["data"] * self.mesh["fsdp"]
        episodes = rl.rollout.questions_per_step * rl.rollout.group_size
        self.microbatches = config.microbatches or -(-episodes // self.rows)


def model_sizes(config: CompileConfig, name: str) -> ModelConfig:
    """Returns the sizes in `config.models` of the model that the rl config calls `name`."""
    for hf in config.models.values():
        if hf["name"] == name:
            return from_hf(dict(hf))
    known = ", ".join(hf["name"] for hf in config.models.values())
    raise UserError(f"config.models has no {name}, only {known}; add the sizes of its config.json")


def fill_mesh(
    key: str, mesh: ChosenMeshConfig, chips: int, slices: int, model: ModelConfig
) -> dict[str, int]:
    """Returns a mesh over all chips of all slices, with the sizes that are 0 chosen.

    `data` becomes the number of slices, `tensor` the largest size that the key-value heads and a
    host of `MAX_TENSOR` chips allow, and `fsdp` the rest.

    Args:
      key: config key of the mesh, for messages.

    Raises:
      UserError: the mesh does not use all chips or does not divide the model.
    """
    data, fsdp, tensor = mesh.data or slices, mesh.fsdp, mesh.tensor
    divisible = math.gcd(model.num_kv_heads, model.vocab_size, model.mlp_dim, MAX_TENSOR)
    tensor = tensor or math.gcd(divisible, chips // data)
    fsdp = fsdp or chips // (data * tensor)
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    if data * fsdp * tensor != chips or data % slices:
        chosen = ChosenMeshConfig(data=0, fsdp=0, tensor=0)
        nearest = fill_mesh(key, chosen, chips, slices, model)
        within = f" in {slices} slices" if slices > 1 else ""
        raise UserError(
            f"config.{key} {mesh_text(sizes)} is not {chips} chips{within}; {mesh_text(nearest)} is"
        )
    if divisible % tensor or model.embed_dim % fsdp:
        raise UserError(
            f"config.{key} {mesh_text(sizes)} does not divide {model.num_kv_heads} key-value "
            f"heads, {model.vocab_size} tokens and {model.embed_dim} features; tensor can be "
            f"{divisible} at most"
        )
    return sizes


def programs_of(
    config: CompileConfig, rl: RLConfig, sizes: Sizes, devices: list[jax.Device]
) -> tuple[list[Program], dict[str, int]]:
    """The programs of one training step, and the resident bytes per chip by name."""
    programs, resident, policy_params = learner_programs(config, rl, sizes, devices)
    simulator = rl.search.simulator
    stops = (f"Doc {rl.search.topk + 1}",)
    for name, model, mesh, generator, sampling, strings, loaded in (
        ("policy", sizes.policy, sizes.mesh, rl.policy.generator,
         Sampling(rl.rollout.temperature), STOP_STRINGS, policy_params),
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
    config: CompileConfig, rl: RLConfig, sizes: Sizes, devices: list[jax.Device]
) -> tuple[list[Program], dict[str, int], nnx.State]:
    """The learner's step and the reference's log-probs.

    Returns:
      The programs, the resident bytes per chip by name, and the shapes of the policy's parameters.
    """
    mesh = mesh_lib.make_mesh(**sizes.mesh, devices=devices)
    learner = factory.make_learner(sizes.policy, mesh, rl.optimizer, rl.learner, steps=rl.rl.steps)
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
    gradients = roofline.training_work(sizes.policy, **each, remat=config.remat)
    logprobs = roofline.logprob_work(sizes.policy, **each)
    update = roofline.adamw_work(parameters / (sizes.mesh["fsdp"] * tensor))
    programs = [
        Program(
            "learner step",
            lambda: learner.lower_rl_step(batch(*FLOATS, *OF_UPDATES), objective_of(rl)),
            gradients * sizes.microbatches + update,
            (sizes.microbatches, chunks),
            resident["learner state"],
        ),
        Program(
            "reference log-probs",
            lambda: learner.lower_logprobs(batch(*FLOATS), rl.rollout.temperature),
            logprobs * sizes.microbatches,
            (sizes.microbatches, chunks),
            resident["reference"],
        ),
    ]
    return programs, resident, reference


def generator_programs(
    name: str,
    model: ModelConfig,
    mesh_sizes: dict[str, int],
    config: GeneratorConfig,
    sampling: Sampling,
    stop_strings: tuple[str, ...],
    slots_each: int,
    devices: list[jax.Device],
    policy_params: nnx.State | None,
) -> tuple[list[Program], dict[str, int]]:
    """Prefill and decode of one model, and the resident bytes per chip by name.

    Args:
      slots_each: slots of each data × fsdp part of the mesh.
      policy_params: shapes of the learner's parameters. If given, the programs include the transfer
        of one layer to the generator.
    """
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
    prefill = roofline.prefill_work(model, rows=rows, tokens=prompt, **common)
    chunk = roofline.decode_work(model, rows=slots_each, chunk_tokens=config.chunk_tokens, **common)
    held = sum(resident.values())
    blocks = (math.ceil(config.max_tokens / KEY_BLOCK),)
    programs = [
        Program(f"{name} prefill", generator.prefill, prefill, blocks, held),
        Program(f"{name} decode", generator.decode, chunk, (config.chunk_tokens,), held),
    ]
    if policy_params is not None:
        # The program reads one layer of the learner's state and writes one layer of the generator's
        # weights. The other layers' weights stay in memory.
        held = chip_bytes(split_layers(policy_params)[1])
        layer = (held + chip_bytes(generator.params["layers"])) / model.num_layers
        moved = roofline.Work(0.0, layer)
        load = Program(
            f"{name} weights, a layer", lambda: generator.load(policy_params), moved, (), held
        )
        programs.append(load)
    return programs, resident


def chip_bytes(tree) -> int:
    """Bytes on one chip of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def mesh_text(sizes: dict[str, int]) -> str:
    """A mesh as text, such as `data=1 × fsdp=16 × tensor=4`."""
    return " × ".join(f"{axis}={size}" for axis, size in sizes.items())
