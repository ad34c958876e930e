"""Config files: every preset is valid and typed; the paper presets have the paper's values."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from zerosearch_jax import config_flags, main
from zerosearch_jax.data.embedded.scripted_agent import Behaviours
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.config import from_hf
from zerosearch_jax.models.transformer import abstract_model, param_shardings
from zerosearch_jax.parallel import mesh as mesh_lib
from zerosearch_jax.training.config import RLConfig
from zerosearch_jax.training.validate import check, warnings

PAPER = ("qwen2.5-3b", "qwen2.5-7b", "llama-3.2-3b")
PRESETS = ("", "smollm2-135m", *PAPER)

# Sizes from the config.json of each model.
_QWEN = dict(model_type="qwen2", rms_norm_eps=1e-6, max_position_embeddings=32768)
MODELS = {
    "models/Qwen2.5-3B": _QWEN
    | dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "models/Qwen2.5-7B": _QWEN
    | dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "models/SearchSimulation_14B": _QWEN
    | dict(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    "models/Llama-3.2-3B": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])


def _load(preset: str):
    return config_flags.load(f"configs/grpo.py:{preset}" if preset else "configs/grpo.py")


def _specs() -> list[str]:
    root = Path(__file__).parents[1]
    files = sorted((root / "configs").glob("*.py"))
    return [f"configs/{f.name}:{preset}" for f in files for preset in ("", *_presets_of(f))]


def _presets_of(path: Path) -> tuple[str, ...]:
    presets = config_flags.presets(path)
    quick = tuple(f"quick/{name}" for name in presets if name != "quick")
    return (*presets, *quick) if path.stem == "miniature" else presets


@pytest.mark.parametrize("spec", _specs())
def test_every_preset_of_every_config_fills_its_dataclass(spec):
    config = config_flags.load(spec)
    typed = config_flags.typed(main.config_class(config), config)
    assert config_flags.plain(typed) == config.to_dict()
    assert config_flags.describe(typed).startswith("config: ")
    check(typed)
    assert warnings(typed) == []


def _check(config) -> None:
    check(config_flags.typed(RLConfig, config))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_valid_and_its_sizes_fit(preset):
    config = _load(preset)
    _check(config)
    assert config.is_locked
    longest_turn = config.rollout.response_tokens + config.rollout.observation_tokens
    assert config.policy.generator.max_tokens > longest_turn
    assert config.search.simulator.generator.max_tokens > config.search.simulator.max_new_tokens


@pytest.mark.parametrize("preset", PAPER)
def test_paper_preset_has_the_released_hyperparameters(preset):
    config = _load(preset)
    assert config.rl.steps == 203
    assert config.optimizer.learning_rate == 1e-6
    assert config.optimizer.warmup_steps == round(0.95 * 203)
    assert (config.kl.coef, config.loss.entropy, config.optimizer.clip_norm) == (0.001, 0.001, 1.0)
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)
    rollout = config.rollout
    assert (rollout.questions_per_step, rollout.group_size, rollout.temperature) == (64, 5, 1.0)
    assert (rollout.max_turns, rollout.response_tokens) == (5, 500)
    assert rollout.observation_tokens == 2048
    simulator = config.search.simulator
    assert (config.search.topk, simulator.temperature, simulator.max_new_tokens) == (5, 0.8, 600)
    assert simulator.top_p == 1.0
    assert dict(config.curriculum) == dict(start=0.0, end=0.5, base=4.0)
    assert config.reward.name == "f1"
    # BM25 indexes the embedded world, so it can evaluate the world's questions only.
    assert config.eval.search.engine == "bm25"
    assert config.data.eval_source == "world"
    assert config.data.source.endswith(".parquet")


@pytest.mark.parametrize("preset", PAPER)
def test_mesh_of_a_paper_preset_divides_its_models(preset):
    config = _load(preset)
    mesh = mesh_lib.make_mesh(**config.mesh)
    assert mesh.size == 8
    pairs = (
        (config.policy.model, config.policy.generator),
        (config.search.simulator.model, config.search.simulator.generator),
    )
    for name, generator in pairs:
        # All layers have the same shapes, and two are faster to build than 48.
        model = replace(from_hf(MODELS[name]), num_layers=2)
        assert generator.max_tokens <= model.max_positions
        for stacked in (True, False):
            _, abstract = abstract_model(model, stacked=stacked)
            shapes = jax.tree.map(
                lambda leaf, sharding: sharding.shard_shape(leaf.shape),
                abstract,
                param_shardings(abstract, mesh),
            )
            assert jax.tree.leaves(shapes)
        axes = ("batch", "length", "kv_heads", "head_dim")
        cache = (generator.slots, generator.max_tokens, model.num_kv_heads, model.head_dim)
        mesh_lib.sharding(mesh, axes, cache)
    rows = (1, config.learner.rows, config.learner.row_tokens)
    mesh_lib.sharding_of_batch(mesh).shard_shape(rows)


def test_misspelt_preset_is_refused_with_the_presets():
    with pytest.raises(UserError, match="no preset 'qwen'.* smollm2-135m, qwen2.5-3b, qwen2.5-7b"):
        _load("qwen")


SFT_CONFIGS = ("sft_policy.py", "sft_policy.py:behaviours", "sft_policy.py:smollm2-135m")


def test_rl_starts_from_the_warm_started_model():
    rl_config, config = _load("smollm2-135m"), config_flags.load(f"configs/{SFT_CONFIGS[2]}")
    workdir, _, written = rl_config.policy.model.rpartition("/")
    assert written == "model"  # below the sft job's workdir
    for name in ("configs/grpo.py", f"configs/{SFT_CONFIGS[0]}", "README.md"):
        assert f"--workdir={workdir}\n" in Path(name).read_text()
    assert Behaviours(**config.data.behaviours) == Behaviours()  # no poor behaviours
    assert config.init == rl_config.search.simulator.model == "models/smollm2-135m"
    assert config.sft.checkpoint_every == config.sft.eval_every == config.sft.steps


def test_misspelt_sft_preset_is_refused_with_the_presets():
    with pytest.raises(
        UserError, match="no preset 'behaviour'; the presets are behaviours, smollm2-135m"
    ):
        config_flags.load("configs/sft_policy.py:behaviour")


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.limit=7", 7),
        ("data.sets=('world/test',)", ("world/test",)),
        ("methods=('direct','rag')", ("direct", "rag")),
        ("engines.bm25.topk=3", 3),
    ],
)
def test_overrides_narrow_an_evaluation(override, read):
    from absl import flags

    arguments = ["main", "--config=configs/eval.py", f"--config.{override}"]
    value = config_flags.parse(flags.FlagValues(), arguments)
    for key in override.partition("=")[0].split("."):
        value = value[key]
    assert value == read


KL_IN_REWARD = {"kl.apply_to": "reward", "kl.estimator": "k1"}
ALGORITHMS = {
    # Name: the keys that set it apart, in every preset.
    "ppo": {"advantage.estimator": "ppo", "advantage.gamma": 1.0, "advantage.gae_lambda": 1.0}
    | KL_IN_REWARD,
    "reinforce": {
        "advantage.estimator": "reinforce",
        "kl.apply_to": "loss",
    },
    "reinforce_pp": {"advantage.estimator": "reinforce_pp"} | KL_IN_REWARD,
    "rloo": {"advantage.estimator": "rloo"} | KL_IN_REWARD,
    "dr_grpo": {
        "advantage.estimator": "grpo",
        "advantage.normalize_std": False,
        "loss.aggregate": "fixed_length",
    },
    "dapo": {
        "advantage.estimator": "grpo",
        "loss.clip_high": 0.28,
        "kl.coef": 0.0,
        "rl.overlong": "mask",
    },
    "gspo": {
        "loss.surrogate": "sequence",
        "loss.aggregate": "sequence_mean",
    },
    "cispo": {"loss.surrogate": "cispo", "loss.clip_high": 0.28},
    "lora": {"advantage.estimator": "grpo", "loss.surrogate": "clip"},
}
LEARNING = {"rl", "optimizer", "advantage", "loss", "kl", "lora"}
"""Sections that an algorithm may change, besides the size and number of groups."""


def _algorithm(name: str, preset: str = ""):
    return config_flags.load(f"configs/{name}.py:{preset}")


def _flat(config, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_preset_is_valid_and_changes_only_the_learning(name, preset):
    config, base = _algorithm(name, preset), _load(preset)
    _check(config)
    assert config.is_locked
    # Models, engines, data, sizes and the evaluation are grpo.py's.
    ours, theirs = _flat(config), _flat(base)
    assert {key: ours[key] for key in ALGORITHMS[name]} == ALGORITHMS[name]
    assert ours.keys() == theirs.keys()
    changed = {key for key in ours if ours[key] != theirs[key]}
    assert {key for key in changed if key.partition(".")[0] not in LEARNING} <= {
        "rollout.questions_per_step",
        "rollout.group_size",
        "rollout.max_rounds",
    }
    assert (config.lora.rank > 0) == (name == "lora")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_all_algorithms_have_the_same_episodes_per_step(name):
    for config in (_algorithm(name), _load("")):
        assert config.rollout.questions_per_step * config.rollout.group_size == 120
    comparison = config_flags.load("configs/algorithms.py")
    assert comparison.episodes_per_step == 120
    assert name in comparison.configs and "grpo" in comparison.configs
    assert set(comparison.configs) == {*ALGORITHMS, "grpo"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_misspelt_preset_of_an_algorithm_is_refused_with_the_presets(name):
    with pytest.raises(UserError, match="no preset 'qwen'.* smollm2-135m, qwen2.5-3b"):
        _algorithm(name, "qwen")


@pytest.mark.parametrize("preset", PAPER)
@pytest.mark.parametrize(
    ("name", "apply_to", "warmup"),
    [("grpo", "loss", 0.95), ("ppo", "reward", 0.285), ("reinforce", "loss", 0.95)],
)
def test_paper_presets_have_the_released_hyperparameters_of_the_update(
    preset, name, apply_to, warmup
):
    config = _algorithm(name, preset)
    rollout, loss, kl, optimizer = config.rollout, config.loss, config.kl, config.optimizer
    assert (rollout.questions_per_step, rollout.group_size) == (64, 5)
    assert (rollout.temperature, rollout.max_turns, config.search.topk) == (1.0, 5, 5)
    assert (config.rl.steps, optimizer.learning_rate) == (203, 1e-6)
    assert optimizer.warmup_steps == round(warmup * 203)
    assert optimizer.final_fraction == 1.0  # constant after the warm-up
    assert (kl.coef, kl.apply_to, kl.target) == (0.001, apply_to, 0.0)
    if apply_to == "loss":
        assert kl.estimator == "k3"
    assert (loss.clip_low, loss.clip_high) == (0.2, 0.2)
    assert (loss.entropy, optimizer.clip_norm) == (0.001, 1.0)
    assert (config.advantage.gamma, config.advantage.gae_lambda) == (1.0, 1.0)
    typed = config_flags.typed(RLConfig, config)
    assert (typed.episodes_per_step, typed.episodes_per_update) == (320, 256)
    assert typed.updates_per_step == 2
    if name == "reinforce":
        assert config.advantage.baseline == "none"
    if name == "ppo":
        assert config.critic.value_clip == 0.5
        assert config.critic.learning_rate == 1e-5
        assert config.critic.warmup_steps == round(0.015 * 203)
        assert config.critic.trunk == "own"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "updates"), [("dapo", 2), ("cispo", 2), ("gspo", 4)])
def test_algorithms_with_several_updates_split_the_step_evenly(name, updates, preset):
    config = config_flags.typed(RLConfig, _algorithm(name, preset))
    assert config.updates_per_step == updates
    assert config.episodes_per_update * updates == config.episodes_per_step


def test_dr_grpo_divides_by_the_most_tokens_of_an_episode():
    for preset, most in (("", 4 * 64), ("smollm2-135m", 2 * 64), ("qwen2.5-3b", 6 * 500)):
        assert _algorithm("dr_grpo", preset).loss.fixed_tokens == most


PAPERS = {
    # Config of another paper: its sections that differ from grpo.py, and their values.
    "r1": dict(rollout=dict(max_turns=0), search=dict(engine="none"), eval=dict()),
    "search_r1": dict(
        search=dict(engine="bm25"), reward=dict(rule="answer", name="em"), rollout=dict(), eval={}
    ),
    "r1_searcher": dict(
        search=dict(engine="bm25"),
        reward=dict(rule="r1_searcher"),
        advantage=dict(estimator="reinforce_pp"),
        kl=dict(apply_to="reward", estimator="k1"),
        rollout=dict(group_size=1),
    ),
    "research": dict(search=dict(engine="bm25"), reward=dict(rule="research")),
    "deepresearcher": dict(search=dict(), reward=dict(rule="deepresearcher"), rollout=dict()),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", PAPERS)
def test_preset_of_another_paper_is_valid_and_changes_only_its_sections(name, preset):
    config, base = _algorithm(name, preset), _load(preset)
    _check(config)
    assert config.is_locked
    for section, values in PAPERS[name].items():
        assert {key: config[section][key] for key in values} == values
    ours, theirs = _flat(config), _flat(base)
    assert ours.keys() == theirs.keys()
    changed = {key.partition(".")[0] for key in ours if ours[key] != theirs[key]}
    # Only the simulator reads the curriculum.
    assert changed and changed <= PAPERS[name].keys() | {"curriculum"}
    episodes = config.rollout.questions_per_step * config.rollout.group_size
    assert episodes == base.rollout.questions_per_step * base.rollout.group_size


@pytest.mark.parametrize("name", PAPERS)
def test_config_of_another_paper_names_the_paper(name):
    text = Path(f"configs/{name}.py").read_text()
    assert "arXiv 25" in text.partition('"""\n\n')[0]


def test_configs_of_other_papers_have_their_values():
    for preset in PAPER:
        search_r1 = _algorithm("search_r1", preset)
        assert search_r1.search.topk == search_r1.eval.search.topk == 3
        assert search_r1.rollout.max_turns == 4
        assert _algorithm("r1_searcher", preset).reward.stage_one_steps == 8  # of 203
        web = _algorithm("deepresearcher", preset)
        assert (web.search.engine, web.search.web.provider) == ("web", "serper")
        assert "huggingface.co" in web.search.web.blocked_domains
        assert not web.rollout.stop_on_failure
    assert _algorithm("search_r1").search.topk == 2
    assert _algorithm("r1_searcher").reward.stage_one_steps == 2  # of 10
    recorded = _algorithm("deepresearcher").search
    assert (recorded.engine, recorded.web.recording) == ("recorded_web", "world")
    for preset in PRESETS:
        assert _algorithm("r1", preset).eval.search.engine == "none"
        assert _load(preset).reward.rule == "answer"


def test_server_presets_of_the_evaluation_have_no_bm25():
    for preset in ("retriever", "web"):
        config = config_flags.load(f"configs/eval.py:{preset}")
        assert list(config.engines) == [preset]
        assert config.engines[preset].engine == preset and "remote" in config.engines[preset]


def test_misspelt_preset_of_the_evaluation_is_refused_with_the_presets():
    with pytest.raises(UserError, match="no preset 'simulatd'; the presets are simulated, retr"):
        config_flags.load("configs/eval.py:simulatd")


WIKIPEDIA = "smollm2-135m-wikipedia"
STAGES = ("collect", "sft_simulator", "simulator_report")


def test_wikipedia_stages_read_the_files_of_earlier_stages():
    collect, sft, report = (config_flags.load(f"configs/{name}.py:{WIKIPEDIA}") for name in STAGES)
    text = Path("docs/pipeline.md").read_text()
    for name, stage in zip(STAGES, ("collect", "simulator", "report"), strict=True):
        assert f"configs/{name}.py:{WIKIPEDIA} ARGS=--workdir=runs/wikipedia/{stage}\n" in text
    assert collect.search.corpus == "data/wikipedia/passages.jsonl"
    assert collect.policy.model == collect.labeling.model == report.reader.model
    assert collect.policy.model == _load("smollm2-135m").policy.model
    assert sft.data.examples == "runs/wikipedia/collect/pairs.jsonl"
    assert sft.data.validation == report.pairs == "runs/wikipedia/collect/heldout.jsonl"
    assert report.simulators.finetuned.simulator.model == "runs/wikipedia/simulator/model"
    assert report.simulators.prompted.simulator.model == sft.init
    for reader in (collect.labeling, report.reader):  # a prompt with the query has 200 tokens
        fits = 200 + reader.observation_tokens + reader.response_tokens
        assert fits <= reader.generator.max_tokens
    for simulator in (one.simulator for one in report.simulators.values()):
        room = simulator.generator.max_tokens - simulator.max_new_tokens
        assert room == simulator.generator.prefill_buckets[-1]
    topk = [config.topk for config in (collect.search, sft.data, *report.simulators.values())]
    assert topk == [3, 3, 3, 3]


@pytest.mark.parametrize("name", STAGES)
def test_misspelt_preset_of_a_stage_is_refused_with_the_preset(name):
    with pytest.raises(UserError, match=f"no preset 'wikipedia'; the presets are {WIKIPEDIA}"):
        config_flags.load(f"configs/{name}.py:wikipedia")
