"""Damages the files of a model directory: it is read, or refused with one line that names it."""

import copy
import json
import resource
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerosearch_jax.errors import UserError
from zerosearch_jax.models import weights
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.models.generation_config import write_configs
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.models.weights import save_params
from zerosearch_jax.text.tokenizer import encode_prompt
from zerosearch_jax.training.factory import stop_table

INDEX = "model.safetensors.index.json"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}policy:"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    INDEX,
)
ODD_VALUES = (
    *(None, True, False, [], {}, [[]], [[1]], {"a": {}}, "", "2", "x" * 5000, "\0", "\ud800"),
    *(-1, 0, 1, 5, 0.5, -0.0, float("nan"), float("inf"), 1e300, 2**31, 2**32, 2**63, 10**30),
    *("../outside.safetensors", "/outside.safetensors", "a/../../x", ".", "..", "a" * 300),
    *(
        "llama3",
        "BPE",
        "Unigram",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "<eos>",
    ),
)
CONTENTS = (
    *(b"", b"[]", b"null", b"{}", b"1", b'"text"', b"\xff\xfe", b"\0" * 64, b"{" * 10, b"PK\3\4"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"vocab_size": ' + b"9" * 5000 + b"}"),
)


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny_tokenizer, tiny_config) -> dict[str, bytes]:
    """The files of a small valid model directory with two shards of weights, by name."""
    directory = tmp_path_factory.mktemp("fuzzed-model")
    tiny_tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_model(tiny_config)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MAX_FILE_BYTES", 20_000)
        save_params(directory, params, tiny_config, generation={"eos_token_id": 0})
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (directory / "added_tokens.json").write_text('{"<|endoftext|>": 0}')
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@st.composite
def damages(draw, name: str, content: bytes):
    """Returns the damaged content of a file; None: the file is missing; a Path: a link to it."""
    kinds = [_cut, _flipped, _inserted, _replaced]
    if name in JSON_FILES or name.endswith(".safetensors"):
        kinds += [_changed] * 8
    return draw(draw(st.sampled_from(kinds))(name, content))


def _cut(name, content):
    return st.integers(0, max(0, len(content) - 1)).map(lambda end: content[:end])


def _flipped(name, content):
    # The first bytes of safetensors are the header's length and the header.
    places = st.integers(0, min(400, len(content) - 1)) | st.integers(0, len(content) - 1)

    def flip(changes):
        data = bytearray(content)
        for place, value in changes:
            data[place] = value
        return bytes(data)

    return st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(flip)


def _inserted(name, content):
    pieces = st.sampled_from(
        [b"\0", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"{", b"]", b"\xef\xbb\xbf"]
    )
    places = st.integers(0, len(content))
    return st.tuples(places, pieces).map(lambda at: content[: at[0]] + at[1] + content[at[0] :])


def _replaced(name, content):
    others = [None, Path("missing"), Path(name), Path("."), Path("/etc")]
    return st.sampled_from([*CONTENTS, *others])


@st.composite
def _changed(draw, name, content):
    """Sets, removes or adds one value of a JSON document or of a safetensors header."""
    size = int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else 0
    tree = json.loads(content[8 : 8 + size] if size else content)
    for _ in range(draw(st.integers(1, 2))):
        _change(draw, tree)
    text = json.dumps(tree).encode()
    if not size:
        return text
    length = draw(st.sampled_from([len(text)] * 4 + [len(text) + 1, 10**10, 2**63]))
    return length.to_bytes(8, "little") + text + content[8 + size :]


def _change(draw, tree):
    parent = tree
    while True:
        keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        child = parent[key]
        if isinstance(child, dict | list) and child and draw(st.integers(0, 3)):
            parent = child
            continue
        break
    action = draw(st.sampled_from(["set"] * 6 + ["drop", "copy"]))
    if action == "set":
        parent[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
    elif action == "drop":
        del parent[key]
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from(["<new>", "auto_map", "head_dim", "chat_template"]))] = child
    else:
        parent.append(copy.deepcopy(child))


def write(directory: Path, files: dict[str, bytes | Path | None]) -> None:
    directory.mkdir()
    for name, content in files.items():
        if isinstance(content, Path):
            (directory / name).symlink_to(content)
        elif content is not None:
            (directory / name).write_bytes(content)


def start(directory: Path) -> None:
    """Uses all files of a model directory except the weights, as a job does until its export."""
    files = read_model_files(directory)
    stop_table(files, ("</search>",))
    for system in (None, ""):
        encode_prompt(files.tokenizer, "Who is it?", system=system)
    files.tokenizer.save_pretrained(directory / "export")
    write_configs(directory / "export", files.config, "float32", files.generation)


@pytest.mark.parametrize("tries", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_model_directory_is_read_or_refused_by_name(model, tmp_path, tally, tries):
    numbers = count()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(settings.get_profile("fuzz"), max_examples=tries)
    @given(st.data())
    def damage(data):
        name = data.draw(st.sampled_from(sorted(model)))
        content = data.draw(damages(name, model[name]))
        directory = tmp_path / str(next(numbers))
        write(directory, model | {name: content})
        failures = 1
        try:
            start(directory)
            failures = 0
        except UserError as error:
            assert str(directory) in str(error) and "\n" not in str(error)
            failures = 0
        finally:
            tally("damaged model directory", 1, failures)
            shutil.rmtree(directory)

    damage()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # in KiB
    assert grown < 2**20


@pytest.mark.slow
def test_one_huge_id_is_refused_within_one_gigabyte(model, tmp_path, tally):
    content = json.loads(model["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    for piece in (max(vocabulary, key=vocabulary.get), "<new>"):
        changed = copy.deepcopy(content)
        changed["model"]["vocab"][piece] = 2**31
        directory = tmp_path / str(len(piece))
        write(directory, model | {"tokenizer.json": json.dumps(changed).encode()})
        done = subprocess.run([sys.executable, "-c", LIMITED, str(directory)], capture_output=True)
        tally("token id of 2^31", 1, int(done.returncode != 2))
        assert done.returncode == 2 and b"ids up to 2147483648" in done.stdout, done.stderr


LIMITED = """
import resource, sys
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.models.generation_config import write_configs

size = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)
try:
    read_model_files(sys.argv[1])
except UserError as error:
    print(error)
    sys.exit(2)
"""
