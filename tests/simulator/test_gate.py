"""Tests of the gate's weights hash. Tests with a report are in `tests/jobs`."""

import hashlib

from zerosearch_jax.simulator import gate


def test_weights_hash_covers_all_safetensors_files_in_name_order(tmp_path):
    for name, content in (("model-2.safetensors", b"two"), ("model-1.safetensors", b"one")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert gate.weights_sha256(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()
