"""The compile job on eight fake CPU devices, and on a real topology if libtpu is installed."""

import importlib.util
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from zerosearch_jax import config_flags
from zerosearch_jax.errors import UserError
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.tpu_aot import compile_report as job
from zerosearch_jax.tpu_aot.collectives import Collective, collectives
from zerosearch_jax.tpu_aot.programs import Sizes, fill_mesh, model_sizes
from zerosearch_jax.tpu_aot.report import GIB, Row, advice

# HLO as the TPU compiler writes it: a data-dependent loop around a scan of 3, and one collective
# spread over two fusions.
HLO = """\
HloModule jit_step, is_scheduled=true

%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %c.1 = u32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c.1), direction=LT
}

%part.1 (q: bf16[4,16]) -> bf16[16,16] {
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%part.2 (q: bf16[4,16]) -> bf16[16,16] {
  ROOT %all-gather.2 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%part.1
  %done = bf16[16,16]{1,0} fusion(%start), kind=kCustom, calls=%part.2
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%i, %x)
}

%all-reduce-scatter.1 (q: f32[8]) -> f32[4] {
  %all-reduce.9 = f32[8]{0} all-reduce(%q), channel_id=2, replica_groups={{0,1},{2,3}}
  ROOT %slice.1 = f32[4]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={4}
}

%cond.2 (p: (s32[], s32[])) -> pred[] {
  %i.2 = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n.2 = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.2, %n.2), direction=LT
}

%body.2 (p: (s32[], s32[])) -> (s32[], s32[]) {
  %w.1 = (s32[], f32[8]) while(%t.1), condition=%cond.1, body=%body.1
  %r.1 = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t.2 = (s32[], s32[]) tuple(%i.2, %n.2)
}

ENTRY %main (a: f32[8]) -> f32[] {
  %w.2 = (s32[], s32[]) while(%t.0), condition=%cond.2, body=%body.2
  %all-reduce.3 = (f32[]{:T(128)}, /*index=1*/f32[2]{0}) all-reduce(%a, %b), channel_id=3, \
replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %all-to-all.4 = f32[] all-to-all(%a), channel_id=4, replica_groups={}
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}
"""


def test_collectives_of_a_tpu_program_match_a_hand_count():
    # A ring over g chips sends (g-1)/g of the gathered bytes, twice that for an all-reduce, and g-1
    # times the result for a reduce-scatter. The loops run 5 and 5 · 3 times.
    assert sorted(collectives(HLO, (5,), 8), key=lambda one: one.kind) == [
        Collective("all-gather", 512, 512 * 3 / 4, 15),
        Collective("all-reduce", 12, 12 * 2 * 3 / 4, 1),
        Collective("all-to-all", 4, 4 * 7 / 8, 1),
        Collective("reduce-scatter", 16, 16, 5),
    ]


def test_a_loop_of_unknown_trip_count_is_an_error():
    with pytest.raises(ValueError, match="1 nested loops of unknown trip count"):
        collectives(HLO, (), 8)


def test_collectives_of_a_compiled_cpu_program_match_a_hand_count():
    mesh = make_mesh(1, 4, 2)

    def local(x, count):
        def add(x, _):
            return x + lax.psum(x, "tensor"), None

        x, _ = lax.scan(add, x, length=5)
        return lax.fori_loop(0, count, lambda _, x: lax.pmax(x, "fsdp") * 0.5, x)

    specs = dict(in_specs=(P("fsdp", "tensor"), P()), out_specs=P("fsdp", "tensor"))
    run = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)
    x, count = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(run).lower(x, count).compile().as_text()
    found = collectives(text, (7,), 8)
    # 4 × 16 floats per device: 5 times over 2 devices, 7 times over 4 devices.
    assert sorted((one.times, one.bytes, one.wire_bytes) for one in found) == [
        (5, 256, 256.0),
        (7, 256, 384.0),
    ]
    assert {one.kind for one in found} == {"all-reduce"}


def _config(**changes):
    config = config_flags.load("configs/compile.py").unlock()
    config.update(changes)
    return config


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def _mesh(data=0, fsdp=0, tensor=0):
    return ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor))


@pytest.mark.parametrize(
    ("model", "chips", "wanted"),
    [
        ("models/Qwen2.5-3B", 16, (1, 8, 2)),
        ("models/Qwen2.5-7B", 64, (1, 16, 4)),
        ("models/SearchSimulation_14B", 64, (1, 16, 4)),  # 8 would span hosts of 4 chips
    ],
)
def test_default_mesh_uses_the_largest_tensor_size_that_heads_and_host_allow(model, chips, wanted):
    sizes = model_sizes(_config(), model)
    assert tuple(fill_mesh("mesh", _mesh(), chips, 1, sizes).values()) == wanted
    given = fill_mesh("mesh", _mesh(), chips, 2, sizes)
    assert given == dict(data=2, fsdp=wanted[1] // 2, tensor=wanted[2])


def test_bad_mesh_is_refused_with_a_valid_one():
    sizes = model_sizes(_config(), "models/Qwen2.5-7B")
    with pytest.raises(UserError, match="is not 16 chips; data=1 × fsdp=4 × tensor=4 is"):
        fill_mesh("mesh", _mesh(fsdp=8, tensor=4), 16, 1, sizes)
    with pytest.raises(UserError, match="is not 32 chips in 2 slices; data=2 × fsdp=4 × tensor=4"):
        fill_mesh("mesh", _mesh(data=1), 32, 2, sizes)
    with pytest.raises(UserError, match="does not divide 4 key-value heads.*tensor can be 4"):
        fill_mesh("mesh", _mesh(fsdp=2, tensor=8), 16, 1, sizes)
    with pytest.raises(
        UserError, match="config.models has no models/other, only models/Qwen2.5-3B"
    ):
        model_sizes(_config(), "models/other")
    with pytest.raises(UserError, match="write CHIP:SHAPE such as v5e:8x8; the chips are v5e, "):
        job.chip_of("v4:2x2x1")


def test_refused_bytes_reads_xlas_out_of_memory_error():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    )
    assert job.refused_bytes(message) == int(20.5 * GIB)
    assert job.refused_bytes("INTERNAL: something else") is None


def test_advice_names_the_setting_that_makes_it_fit():
    config = _config(remat="none", rows_each=2)
    sizes = Sizes(config, config_flags.load("configs/grpo.py:qwen2.5-7b"), 16)
    resident = {"learner state": 6 * GIB, "reference": 2 * GIB, "policy weights": 4 * GIB}
    row = Row("learner step", False, 6 * GIB, 9 * GIB, 0, 15 * GIB, 5 * GIB, 16 * GIB,
              0, 0, 0, 0, 0, "", {}, 0)  # fmt: skip
    assert "--config.remat=full" in advice(config, sizes, resident, row)
    config.remat = "full"
    assert "--config.rows_each=1" in advice(config, sizes, resident, row)
    # 4 GiB too much. Of the 8 GiB that are split, four times the chips save 6 GiB.
    in_vain = replace(row, temporaries=7 * GIB)
    assert "fsdp=16" in advice(config, sizes, resident, in_vain)
    config.rows_each = 1
    assert "fsdp=16" in advice(config, sizes, resident, row)
    of_generators = replace(row, name="policy decode", peak=15 * GIB, also_resident=12 * GIB)
    assert "int8" in advice(config, sizes, resident, of_generators)


TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512)


def _shrunk(monkeypatch):
    """Returns the job's config with tiny models, rows and caches, and shrinks the rl config."""
    config = _config(preset="qwen2.5-7b", slots_each=2, microbatches=3)
    for key in ("qwen_7b", "simulator_14b"):
        config.models[key].update(TINY)
        config.models[key].head_dim = 128
    load = config_flags.load

    def small(spec):
        rl = load(spec).unlock()
        rl.learner.update(dict(row_tokens=256, logprob_chunk=64))
        for generator in (rl.policy.generator, rl.search.simulator.generator):
            generator.update(dict(max_tokens=192, prefill_buckets=(64,), chunk_tokens=8))
        rl.search.simulator.max_new_tokens = 64
        return rl

    monkeypatch.setattr(config_flags, "load", small)
    return config


@pytest.mark.slow
def test_compile_job_on_fake_devices(monkeypatch, tmp_path, capsys):
    config = _shrunk(monkeypatch)
    monkeypatch.setattr(job, "topology_devices", lambda *_: jax.devices())
    config.mesh.tensor = config.simulator_mesh.tensor = 2
    config.programs = ("learner step", "reference log-probs", "policy decode")
    config.programs += ("policy weights, a layer",)
    job.run(config, str(tmp_path))
    report = json.loads((tmp_path / "compile.json").read_text())
    rows = {row["name"]: row for row in report["programs"]}
    assert report["mesh"] == dict(data=1, fsdp=4, tensor=2)
    assert list(rows) == list(config.programs)
    # Parameters and two moments in float32, split over all chips where an axis divides.
    state = report["resident"]["learner state"]
    layer = 64 * (28 + 2 * 4 + 28) * 128 + 3 * 64 * 128
    matrices = 2 * 512 * 64 + 2 * layer
    assert 1.0 < state / (3 * 4 * matrices / 8) < 1.05
    step = rows["learner step"]
    assert step["fits"] and state < step["arguments"] < 1.1 * state
    assert step["also_resident"] == sum(report["resident"].values()) - state
    assert step["collectives"]["all-gather"]["times"] >= 2 * 3  # layers × microbatches
    # Each replica decodes alone, so only the tensor axis causes traffic.
    reduced = rows["policy decode"]["collectives"]["all-reduce"]
    assert reduced["times"] >= 2 * 2 * 8  # twice per layer for each token of the chunk
    # New weights are gathered over fsdp once, one layer at a time.
    weights = rows["policy weights, a layer"]
    assert weights["outputs"] == pytest.approx(2 * layer / 2, rel=0.02)  # bfloat16, tensor=2
    assert weights["arguments"] == pytest.approx(4 * 2 * layer / 8, rel=0.05)  # both, float32
    assert weights["temporaries"] < weights["arguments"] + weights["outputs"]
    gathered = weights["collectives"]["all-gather"]["wire_bytes"]
    assert 0.9 < gathered / (2 * 0.75 * weights["outputs"]) < 1.1  # a CPU gathers in float32
    assert re.search(r"\| learner step +\| yes +\|", (tmp_path / "compile.md").read_text())
    assert "fsdp=4" in capsys.readouterr().out


def test_program_that_does_not_fit_is_refused_after_the_report_is_written(monkeypatch, tmp_path):
    config = _shrunk(monkeypatch)
    monkeypatch.setattr(job, "topology_devices", lambda *_: jax.devices())
    chip = replace(job.chip_of("v5e:2x4"), hbm_bytes=2**20)
    monkeypatch.setattr(job, "chip_of", lambda topology: chip)
    config.programs = ("simulator decode",)
    with pytest.raises(UserError, match="simulator decode: .* GiB do not fit the .* chip; "):
        job.run(config, str(tmp_path))
    assert re.search(r"\| simulator decode +\| NO +\|", (tmp_path / "compile.md").read_text())
    config.programs = ("decode",)
    with pytest.raises(UserError, match="the programs are learner step, reference log-probs"):
        job.run(config, str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_compile_job_on_a_real_topology(monkeypatch, tmp_path):
    config = _shrunk(monkeypatch)
    config.topology = "v5e:2x4"
    job.run(config, str(tmp_path))
    rows = json.loads((tmp_path / "compile.json").read_text())["programs"]
    assert len(rows) == 7
    assert all(row["fits"] and row["temporaries"] > 0 for row in rows)
