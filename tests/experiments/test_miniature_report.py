"""The miniature's report: its rows, its plots, and its determinism."""

import re
import struct
import sys

import pytest

from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments import claims, miniature_report

RUNS = [{"arm": "zerosearch", "seed": seed, "em": [1, 1, 1, 0], "noise": {}} for seed in (0, 1)] + [
    {"arm": "base", "seed": 0, "em": [0, 0, 1, 0], "noise": {}}
]


@pytest.fixture
def inputs() -> dict:
    return dict(
        claims_rows=claims.evaluate_claims(RUNS),
        methods_rows=[
            dict(
                method="GRPO on the simulator",
                engine="bm25",
                em=(0.5, 0.4125, 0.6),
                f1=(0.61, None, None),
                searches_per_question=1.256,
                seeds=2,
            )
        ],
        simulator_rows=[
            {"simulator": "fine-tuned", "useful EM": 0.87654, "questions": 40},
            {"simulator": "prompted", "useful EM": None, "questions": 41},
        ],
        noise_curves={
            "rising": {"0.25": (0.5, 0.45, 0.55), "0": (0.6, 0.55, 0.65)},
            "constant": {"0": (0.55, None, None), "0.75": (0.2, None, None)},
        },
        training_curves={
            "zerosearch": [
                [{"step": 1, "em": 0.1}, {"step": 2, "em": 0.3}],
                [{"step": 1, "em": 0.2}, {"step": 2, "em": 0.5}, {"step": 3, "em": 0.9}],
            ]
        },
        provenance=dict(
            command="main --config=a|b.py",
            commit="abc123",
            seeds=[0, 1],
            cores=2,
            seconds=61.25,
            stage_seconds={"collect": 10.04, "train": 51.21},
        ),
    )


def test_the_report_contains_every_row(inputs, tmp_path):
    pytest.importorskip("matplotlib")
    path = miniature_report.write(tmp_path / "out", **inputs)
    lines = [_without_padding(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for claim in claims.CLAIMS:
        (line,) = [line for line in lines if line.startswith(f"| ({claim.name}) {claim.text} |")]
        ran = (claim.arm, claim.against) == ("zerosearch", "base")
        assert ("**not run**" in line) == (not ran)
        if ran:
            assert "| 0.750 | 0.250 | +0.500 [+0.000, +1.000] | 2 | **undecided** |" in line
        else:
            assert "| – | – | – | 0 |" in line
    for line in (
        "| GRPO on the simulator | bm25 | 0.500 [0.412, 0.600] | 0.610 | 1.26 | 2 |",
        "| simulator | useful EM | questions |",
        "| fine-tuned | 0.877 | 40 |",
        "| prompted | – | 41 |",
        "| collect | 10.0 |",
        "| command | `main --config=a\\|b.py` |",
        "| commit | abc123 |",
        "| seeds | 0, 1 |",
        "| CPU cores | 2 |",
        "| seconds with a running stage | 61.2 |",
        "![exact match, training](training.png)",
        "![exact match, noise](noise.png)",
    ):
        assert line in lines, line


def _without_padding(line: str) -> str:
    return re.sub(" +", " ", line)


def test_the_same_input_gives_the_same_text_and_plots_are_drawn(inputs, tmp_path):
    pytest.importorskip("matplotlib")
    texts = {miniature_report.write(tmp_path / name, **inputs).read_bytes() for name in "ab"}
    assert len(texts) == 1
    for name in ("training.png", "noise.png"):
        data = (tmp_path / "a" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == (960, 600)
        assert len(data) > 10_000  # an empty page of this size compresses to less


def test_plots_show_mean_and_range_over_seeds_and_noise_intervals(inputs):
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().subplots()
    miniature_report._draw_training(axes, inputs["training_curves"])
    (line,) = axes.lines
    assert list(line.get_xdata()) == [1, 2]  # only one seed has step 3
    assert list(line.get_ydata()) == pytest.approx([0.15, 0.4])
    corners = axes.collections[0].get_paths()[0].vertices.round(6).tolist()
    assert {tuple(corner) for corner in corners} == {(1, 0.1), (1, 0.2), (2, 0.3), (2, 0.5)}

    axes = figure.Figure().subplots()
    miniature_report._draw_noise(axes, inputs["noise_curves"])
    drawn = [[*map(tuple, line.get_xydata().round(6).tolist())] for line in axes.lines]
    curves = [(-0.006, 0.6), (0.244, 0.5)], [(0.006, 0.55), (0.756, 0.2)]  # shifted by 0.006
    assert curves[0] in drawn and curves[1] in drawn
    assert [(0.244, 0.45), (0.244, 0.55)] in drawn and [(-0.006, 0.55), (-0.006, 0.65)] in drawn
    assert len(drawn) == 4  # one seed has no bar


def test_empty_tables_and_plots_read_not_run(inputs, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("methods_rows", "simulator_rows", "noise_curves", "training_curves"):
        inputs[name] = type(inputs[name])()
    path = miniature_report.write(tmp_path, **inputs)
    assert path.read_text(encoding="utf-8").splitlines().count("not run") == 4
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_missing_matplotlib_names_the_requirements_file(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="requirements-report.txt"):
        miniature_report.write(tmp_path / "out", **inputs)
    assert not (tmp_path / "out").exists()
