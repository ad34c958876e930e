"""Commands that cannot work are refused before anything is compiled, and leave no trace."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from zerosearch_jax import config_flags, main
from zerosearch_jax.errors import UserError, error_line
from zerosearch_jax.search.http_client import JsonClient
from zerosearch_jax.training import inputs

ROOT = Path(__file__).parents[1]
CLOSED = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)


def _refusal(capsys, tmp_path: Path, file: str, *overrides: str) -> str:
    """Runs a command that must be refused; returns its one-line error."""
    workdir = tmp_path / "runs" / "new"
    flags = [f"--config.{override}" for override in overrides]
    assert main.cli(["main", f"--config=configs/{file}", *flags, f"--workdir={workdir}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "compiling" not in captured.out
    assert not workdir.parent.exists()  # no empty workdir, no config.json, no compiled programs
    return captured.err


NUMBERS = [
    ("optimizer.learning_rate=-0.5", "above 0"),
    ("optimizer.clip_norm=-0.5", "above 0"),
    ("optimizer.beta1=1e9", "below 1"),
    ("kl.coef=nan", "finite"),
    ("loss.clip_high=nan", "finite"),
    ("advantage.gamma=-inf", "finite"),
    ("policy.generator.slots=-3", "at least 1"),
    ("policy.generator.decode_rows=('a',)", "decode_rows[0]='a'"),
    ("mesh.tensor=-1", "at least 1"),
    ("seed=1e20", "int"),
    ("seed=100000000000000000000", "at most"),
    ("rollout.group_size=1000000000", "at most"),
    ("eval.every=0", "at least 1"),
    ("eval.every=-1", "at least 1"),
    ("checkpoint_every=0", "at least 1"),
    ("eval.test_questions=0", "at least 1"),
    ("data.train_limit=0", "at least 1"),
    ("rollout.temperature=1e-320", "0 or at least 1e-30"),
    ("rollout.temperature=1e308", "finite"),
    ("search.remote.timeout_secs=nan", "finite"),
    ("search.remote.timeout_secs=inf", "finite"),
    ("search.remote.timeout_secs=-0.0", "above 0"),
    ("search.remote.timeout_secs=1e400", "finite"),
    ("search.remote.attempts=2.5", "of type int"),
    ("search.remote.attempts=True", "of type int"),
    ("search.remote.attempts=None", "of type int"),
    (f"rl.steps={'9' * 5000}", "of type int"),
    (f"rl.steps={'9' * 4000}", "at most"),
    ("rl=3", "is a section"),
    ("policy.model=models/\udcff", "not UTF-8"),
    ("policy.model=a\nb", "line break"),
]


@pytest.mark.parametrize(("override", "part"), NUMBERS)
def test_a_number_outside_its_range_is_refused_with_its_key(capsys, tmp_path, override, part):
    error = _refusal(capsys, tmp_path, "grpo.py", override)
    assert override.partition("=")[0] in error and part in error and len(error) < 600


ADDRESSES = [
    *("ftp://host", "http://", "http:///path", "http://host:99999", "http://host:0"),
    *("http://host:x", "http://[bad#x", "http://host name", "http://host\n", "http://host?key=1"),
    *("http://host#part", "http://user:s3cr3t@host", "https://s3cr3t@host:1/path"),
]


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("grpo.py", "search.remote.url"),
        ("grpo.py", "search.simulator.url"),
        ("collect.py", "labeling.url"),
    ],
)
def test_an_address_without_a_valid_host_or_with_a_password_is_refused(file, key):
    section, _, name = key.rpartition(".")
    config = config_flags.load(f"configs/{file}")
    for address in ADDRESSES:
        config.update_from_flattened_dict({key: address})
        with pytest.raises(UserError) as refused:
            config_flags.typed(main.config_class(config), config)
        line = error_line(refused.value)
        assert f"config.{section}" in line and name in line, address
        assert "s3cr3t" not in line


def test_a_password_is_hidden_wherever_a_value_is_shown(capsys, tmp_path):
    for key in ("kl.coef", "policy.model", "lora", "search.engine"):
        assert "s3cr3t" not in _refusal(capsys, tmp_path, "grpo.py", f"{key}=http://u:s3cr3t@host")
    arguments = ["--config=configs/grpo.py", "--config.policy.model=http://u:s3cr3t@h"]
    assert main.cli(["main", *arguments, "--describe"]) == 0
    assert "s3cr3t" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "key", ["s3cr3té", "s3cr3t\n", " s3cr3t", "s3cr3t s3cr3t", "s3cr3t\udcff", ""]
)
def test_an_api_key_that_no_header_can_hold_is_refused_without_showing_it(
    capsys, tmp_path, monkeypatch, key
):
    monkeypatch.setattr(JsonClient, "no_reply", lambda client: "")
    monkeypatch.setenv("SERPER_API_KEY", key)
    monkeypatch.setenv("LABEL_KEY", key)
    server = ["labeling.kind=server", f"labeling.url={CLOSED}"]
    for variable, file, overrides in (
        ("SERPER_API_KEY", "grpo.py", ["search.engine=web"]),
        ("LABEL_KEY", "collect.py", [*server, "labeling.server.key_variable=LABEL_KEY"]),
    ):
        error = _refusal(capsys, tmp_path, file, *overrides)
        assert variable in error and "s3cr3t" not in error


@pytest.mark.parametrize(
    ("name", "section"), [("collect.py", "labeling.server"), ("grpo.py", "search.remote")]
)
def test_an_api_key_in_place_of_its_variable_is_refused_without_showing_it(
    capsys, tmp_path, name, section
):
    error = _refusal(capsys, tmp_path, name, f"{section}.key_variable=sk-s3cr3t")
    assert f"config.{section}: key_variable" in error
    assert "s3cr3t" not in error


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("reward.name=rouge", "f1, em, cover_em"),
        ("optimizer.moment_dtype=float16", "float32, bfloat16"),
        ("learner.compute_dtype=float8", "float32, bfloat16"),
        ("policy.generator.dtype=int4", "float32, bfloat16"),
        ("learner.remat=some", "none, dots, full"),
        ("lora.targets=('q','z')", "gate, up, down"),
        ("search.simulator.form=tuned", "finetuned, prompted"),
        ("search.remote.dialect=rest", "search_r1, zerosearch"),
        ("search.web.provider=bing", "serper, serpapi"),
        ("loss.aggregate=mean", "token_mean"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(capsys, tmp_path, override, known):
    assert known in _refusal(capsys, tmp_path, "grpo.py", override)


@pytest.mark.parametrize(
    ("file", "overrides", "parts"),
    [
        ("grpo.py", ["data.test_split=tset"], ("data.test_split", "'tset'", "compositions")),
        ("grpo.py", ["data.eval_source=no/eval.jsonl"], ("data.eval_source=no/eval.jsonl",)),
        ("grpo.py", ["data.source=no/train.parquet"], ("data.source=no/train.parquet",)),
        ("grpo.py", [f"data.source={'a/' * 5000}b.jsonl"], ("data.source", "no such file")),
        ("grpo.py", ["data.source=nq"], ("data.source=nq", "synthetic:COUNT:SEED")),
        ("grpo.py", ["data.source=synthetic:x:1"], ("data.source", "synthetic:COUNT:SEED")),
        ("grpo.py", [f"data.source=synthetic:{'9' * 5000}:1"], ("data.source", "COUNT:SEED")),
        ("grpo.py", ["eval.search.corpus=synthetic:0:1"], ("eval.search.corpus", "COUNT")),
        (
            "grpo.py",
            ["data.source=synthetic:9:1", "data.train_split=x"],
            ("train_split", "'train'"),
        ),
        ("grpo.py", ["search.simulator.form=promted"], ("form='promted'", "finetuned, prompted")),
        ("sft_policy.py", ["model.num_attention_heads=-0.5"], ("model", "num_attention_heads")),
        ("bench.py", ["long.prompt_words=(20, 130, 5)"], ("long.prompt_words", "2 values")),
        ("bench.py", ["variants=('lockstp',)"], ("variants[0]='lockstp'", "without refill")),
        ("grpo.py", ["eval.search.corpus=no/corpus.jsonl"], ("eval.search.corpus=no/corpus",)),
        ("grpo.py", ["policy.model=no/model"], ("config.policy.model", "no config.json")),
        ("grpo.py", ["search.simulator.model=no/m"], ("config.search.simulator.model",)),
        ("grpo.py", ["search.simulator.gate.report=no/r.json"], ("gate.report=no/r.json",)),
        ("grpo.py", [f"search.simulator.url={CLOSED}"], ("search.simulator.url", "not answer")),
        ("grpo.py", ["search.simulator.url=localhost:80"], ("begin with http://",)),
        (
            "grpo.py",
            ["search.engine=retriever", f"search.remote.url={CLOSED}"],
            ("search.remote.url", CLOSED, "does not answer"),
        ),
        ("grpo.py", ["search.engine=web"], ("SERPER_API_KEY",)),
        ("deepresearcher.py", ["search.web.recording=no/w.jsonl"], ("recording=no/w.jsonl",)),
        ("grpo.py", ["mesh.data=16"], ("mesh",)),
        ("grpo.py", ["rollout.questions_per_step=65536"], ("rows to train on",)),
        ("grpo.py", ["search.simulator.generator.max_tokens=4096"], ("2048 positions",)),
        ("sft_policy.py", ["sft.eval_every=0"], ("sft.eval_every=0", "at least 1")),
        ("sft_policy.py", ["sft.checkpoint_every=-1"], ("sft.checkpoint_every=-1",)),
        ("sft_policy.py", ["data.examples=poems"], ("'poems'", "policy_transcripts")),
        ("sft_policy.py", ["data.validation_examples=0"], ("validation_examples=0",)),
        ("sft_policy.py:behaviours", ["init=no/model"], ("config.init", "no config.json")),
        ("sft_simulator.py", ["data.examples=no/p.jsonl"], ("data.examples=no/p.jsonl",)),
        ("collect.py", ["search.engine=none"], ("search.engine=none",)),
        ("collect.py", ["labeling.model=no/model"], ("config.labeling.model",)),
        ("collect.py", ["labeling.kind=server", f"labeling.url={CLOSED}"], ("labeling.url",)),
        (
            "collect.py",
            ["labeling.kind=server", f"labeling.url={CLOSED}", "labeling.server.key_variable=NO_K"],
            ("labeling.server.key_variable", "NO_K"),
        ),
        ("collect.py", ["search.corpus=no/c.jsonl"], ("search.corpus=no/c.jsonl",)),
        ("eval.py", ["methods=('rog',)"], ("'rog'", "direct, cot, rag")),
        ("eval.py", ["methods=()"], ("methods", "must not be empty")),
        ("eval.py", ["data.sets=('world/tset',)"], ("data.sets", "'tset'")),
        ("eval.py", ["data.sets=('no/q.jsonl',)"], ("data.sets=no/q.jsonl",)),
        ("eval.py:retriever", [f"engines.retriever.remote.url={CLOSED}"], ("not answer",)),
        ("eval.py:web", [], ("SERPER_API_KEY",)),
        ("simulator_report.py", ["pairs=no/heldout.jsonl"], ("pairs=no/heldout.jsonl",)),
        ("miniature.py", ["start_policies.base=no/model"], ("start_policies.base",)),
        ("miniature.py", ["arms=('zerosaerch',)", "noise_arms=()"], ("'zerosaerch'",)),
        ("miniature.py", ["baseline_seeds=(7,)"], ("baseline_seeds has [7]",)),
        ("algorithms.py", ["configs=('grpo','grop')"], ("configs/grop.py",)),
        ("compile.py", ["remat=some"], ("'some'", "none, dots, full")),
        ("bench.py:decode-gpu", ["dtype=int4"], ("'int4'",)),
    ],
)
def test_a_missing_input_is_refused_with_its_key(capsys, tmp_path, file, overrides, parts):
    error = _refusal(capsys, tmp_path, file, *overrides)
    assert all(part in error for part in parts), error


def test_a_server_that_never_replies_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PROBE_SECS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = _refusal(capsys, tmp_path, "grpo.py", f"search.simulator.url={url}")
    assert "does not answer (Timeout)" in error


def _config(file: str, changes: dict):
    config = config_flags.load(f"configs/{file}")
    config.update_from_flattened_dict(changes)
    return config_flags.typed(main.config_class(config), config)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("grpo.py", {"search.engine": "bm25", "search.simulator.model": "no/model"}),
        ("grpo.py", {"search.engine": "bm25", "search.simulator.url": CLOSED}),
        ("r1.py", {"eval.search.corpus": "no/corpus.jsonl"}),  # it has no searches
        ("collect.py", {"labeling.server.key_variable": "NO_KEY"}),
        ("eval.py:web", {"methods": ("direct", "cot")}),
    ],
)
def test_an_input_that_is_not_read_may_be_missing(file, changes):
    inputs.check_inputs(_config(file, changes))


def test_a_refused_command_does_not_import_jax(tmp_path):
    command = ["main", "--config=configs/grpo.py", "--config.data.test_split=tset"]
    command.append(f"--workdir={tmp_path / 'new'}")
    script = (
        "import sys; from zerosearch_jax import main; "
        f"status = main.cli({command!r}); "
        "sys.exit(10 * status + ('jax' in sys.modules) + ('transformers' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 20, done.stderr
    assert "has no split 'tset'" in done.stderr
