"""Draws docs/images/training_curve.png from the files of a run of configs/grpo.py.

    python docs/training_curve.py runs/grpo

Needs matplotlib (requirements-report.txt).
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

IMAGE = Path(__file__).parent / "images" / "training_curve.png"
TRAINING, EVALUATION, NOISE = "#1f77b4", "#d95f02", "#888888"


def draw(run: Path, image: Path = IMAGE) -> None:
    """Writes `image` from `metrics.jsonl` and `summary.json` in `run`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    steps = [row["step"] for row in rows]
    watched = [row for row in rows if "eval/em" in row]

    figure, axes = plt.subplots(figsize=(7.5, 3.4), dpi=150, layout="constrained")
    axes.plot(
        [0, steps[-1]],
        [summary["base"]["em"], summary["trained"]["em"]],
        "D",
        color=EVALUATION,
        label=f"EM with BM25: {summary['base']['questions']} test questions",
    )
    axes.plot(
        [row["step"] for row in watched],
        [row["eval/em"] for row in watched],
        "o",
        color=EVALUATION,
        fillstyle="none",
        label="EM with BM25: validation questions",
    )
    reward = [row["reward"] for row in rows]
    axes.plot(
        steps, reward, ".-", color=TRAINING, label="training reward (F1) with the simulated engine"
    )
    noise = [row["p_noisy"] for row in rows]
    axes.plot(steps, noise, "--", color=NOISE, label="probability of a noisy search")
    axes.set(xlabel="training step (120 episodes)", xlim=(-0.2, steps[-1] + 0.3), ylim=(0, 1))
    axes.set_xticks([0, *steps])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    image.parent.mkdir(exist_ok=True)
    figure.savefig(image)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
