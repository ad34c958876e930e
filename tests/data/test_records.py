"""Records survive a kill at any byte and any moment, without loss or duplicates."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zerosearch_jax.data.records import Records
from zerosearch_jax.errors import UserError

ROOT = Path(__file__).parents[2]
ROWS = [{"id": f"r{i}", "t": "é" * (i % 2) + '"\n'} for i in range(4)]


def test_appended_records_are_read_back_without_duplicate_ids(tmp_path):
    path = tmp_path / "records.jsonl"
    records = Records(path)
    assert (len(records), list(records), path.exists()) == (0, [], False)
    records.append(ROWS[:2])
    records.append([{"id": "r1", "t": "other"}, ROWS[2], ROWS[2], ROWS[3]])
    for opened in (records, Records(path)):
        assert list(opened) == ROWS
        assert list(opened.ids) == ["r0", "r1", "r2", "r3"]
        assert len(opened) == 4
    assert len(path.read_text().splitlines()) == 4
    before = path.read_bytes()
    Records(path).append(ROWS)
    assert path.read_bytes() == before


def test_the_first_of_two_lines_with_the_same_id_counts(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"name": "a", "n": 1}\n{"name": "a", "n": 2}\n{"name": "b", "n": 3}\n')
    records = Records(path, key="name")
    assert [record["n"] for record in records] == [1, 3]
    assert len(records) == 2


def test_truncation_at_any_byte_loses_only_the_cut_line(tmp_path):
    path = tmp_path / "records.jsonl"
    Records(path).append(ROWS)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        records = Records(path)
        assert list(records) == ROWS[: whole[:cut].count(b"\n")]
        records.append(ROWS)
        assert path.read_bytes() == whole, cut


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"id": 3}', "\udcff"], ids=["cut", "list", "no", "int", "ff"]
)
def test_a_broken_line_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "records.jsonl"
    text = '{"id": "a"}\n' + line + '\n{"id": "b"}\n'
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"records\.jsonl: row 2: .*delete this line"):
        Records(path)


def test_opening_changes_nothing_and_a_record_without_a_key_is_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    content = b'{"id": "a", "n": 1}\n{"id": "b"}\n{"id": "c", "n'
    path.write_bytes(content)
    assert list(Records(path).ids) == ["a", "b"]
    with pytest.raises(UserError, match="row 2: n is missing"):
        Records(path, {"n": int})
    assert path.read_bytes() == content


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('\ufeff{"id": "a"}\n\n{"id": "b"}\n\n')
    records = Records(path)
    records.append([{"id": "b"}, {"id": "c"}])
    assert [record["id"] for record in records] == ["a", "b", "c"] == list(records.ids)


WRITER = """
import sys
from zerosearch_jax.data.records import Records
records = Records(sys.argv[1])
for start in range(0, 300, 10):
    ids = [f"r{i}" for i in range(start, start + 10)]
    if not set(ids) <= records.ids:
        sys.stdin.readline()
        records.append([{"id": id, "text": "x" * 20_000} for id in ids])
        print(start, flush=True)
"""


def test_sigkill_at_random_moments_loses_and_duplicates_nothing(tmp_path):
    path, rng = tmp_path / "records.jsonl", random.Random(0)
    command = [sys.executable, "-c", WRITER, str(path)]
    acknowledged = set()
    for last in [False] * 6 + [True]:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        writer = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        if not last:  # The writer writes one to three batches and is killed meanwhile.
            writer.stdin.write("go\n" * rng.randint(1, 3))
            writer.stdin.flush()
            acknowledged.add(int(writer.stdout.readline()))
            time.sleep(rng.uniform(0.0, 0.005))
            os.kill(writer.pid, signal.SIGKILL)
        out, errors = writer.communicate("go\n" * 30 if last else None)
        assert (errors, writer.returncode) == ("", 0 if last else -signal.SIGKILL)
        acknowledged |= {int(line) for line in out.split()}
        # Acknowledged records are in the file before any repair.
        found = {json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]}
        assert {f"r{i}" for start in acknowledged for i in range(start, start + 10)} <= found
    lines = path.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"r{i}" for i in range(300)]
    assert all(len(json.loads(line)["text"]) == 20_000 for line in lines)
