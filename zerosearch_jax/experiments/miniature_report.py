"""The miniature's report: tables in Markdown and two figures, of results that are given.

It works out nothing but the band of the training curves. The same input gives the same text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from zerosearch_jax.errors import UserError
from zerosearch_jax.evaluation.markdown import table
from zerosearch_jax.experiments.claims import MARGIN

NOT_RUN = "not run"
CLAIMS_NOTE = (
    "Exact match of each arm over the seeds that both have; the difference is arm minus against, "
    "with a 95% interval by a bootstrap over seeds and questions. `>` holds when the interval lies "
    f"above 0, `>=` when it lies above -{MARGIN}; below that bound the claim does not hold, across "
    "it is undecided. With one seed the interval covers questions alone; with few it is coarse. "
    "Each claim is judged by itself, without a correction for their number."
)


def write(
    out_dir: str | Path,
    *,
    claims_rows: Sequence[Mapping],
    methods_rows: Sequence[Mapping],
    simulator_rows: Sequence[Mapping],
    noise_curves: Mapping[str, Mapping[str, Sequence[float | None]]],
    training_curves: Mapping[str, Sequence[Sequence[Mapping]]],
    provenance: Mapping,
) -> Path:
    """Writes `out_dir/report.md`, `training.png` and `noise.png`; returns the report's path.

    A table without rows or a figure without curves reads "not run".

    Args:
      claims_rows: what `claims.judge` returns.
      methods_rows: "method", "engine", "em" and "f1" (each mean, low, high; low and high None
        without an interval), "searches_per_question" and "seeds" (how many).
      simulator_rows: any columns, the same in every row.
      noise_curves: training schedule → evaluation noise ("0", "0.25", …) → mean, low, high of
        exact match.
      training_curves: arm → a curve for each seed → points with "step" and "em". The band spans
        the seeds, at the steps that all of them have.
      provenance: "command", "commit", "seeds", "cores", "seconds" (in all) and "stage_seconds"
        (stage → seconds).

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: it draws with Agg, on any machine
    except ImportError as error:
        raise UserError(
            "the report's figures need matplotlib; pip install -r requirements-report.txt"
        ) from error
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    stages = provenance["stage_seconds"]
    figures = {}
    for name, draw, curves in (
        ("training", _draw_training, training_curves),
        ("noise", _draw_noise, noise_curves),
    ):
        figures[name] = NOT_RUN
        if curves:
            figure = Figure(figsize=(8, 5), layout="constrained")
            draw(figure.subplots(), curves)
            figure.savefig(out / f"{name}.png", dpi=120)
            figures[name] = f"![exact match, {name}]({name}.png)"
    parts = [
        "# The paper in miniature",
        "## Claims",
        _table([_claim_cells(row) for row in claims_rows]),
        CLAIMS_NOTE,
        "## Methods and engines",
        _table([_method_cells(row) for row in methods_rows]),
        "In brackets a 95% interval: of training runs over seeds (Student's t; one seed has "
        "none), of the other rows over questions.",
        "## Simulators",
        _table(simulator_rows),
        "## Training",
        figures["training"],
        "Exact match of the training episodes: mean over seeds; the band spans the seeds.",
        "## Noise at evaluation",
        figures["noise"],
        "Exact match by the share of noisy searches at evaluation, for each training schedule; "
        "bars: 95% interval over training seeds.",
        "## Seconds of each stage",
        _table([{"stage": stage, "seconds": f"{secs:.1f}"} for stage, secs in stages.items()]),
        "## Provenance",
        _table(
            [
                {"what": "command", "value": f"`{provenance['command']}`"},
                {"what": "commit", "value": provenance["commit"]},
                {"what": "seeds", "value": ", ".join(map(str, provenance["seeds"]))},
                {"what": "machine's cores", "value": provenance["cores"]},
                {"what": "seconds in all", "value": f"{provenance['seconds']:.1f}"},
            ]
        ),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _claim_cells(row: Mapping) -> dict:
    means = row["means"] or (None, None)
    difference = None
    if row["interval"]:
        low, high = row["interval"]
        difference = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return {
        "claim": f"({row['claim']}) {row['text']}",
        "arm": row["arm"],
        "": f"`{row['kind']}`",
        "against": row["against"],
        "EM of arm": means[0],
        "EM of against": means[1],
        "difference": difference,
        "seeds": len(row["seeds"]),
        "verdict": f"**{row['verdict']}**",
    }


def _method_cells(row: Mapping) -> dict:
    return {
        "method": row["method"],
        "engine": row["engine"],
        "EM": _with_interval(*row["em"]),
        "F1": _with_interval(*row["f1"]),
        "searches per question": f"{row['searches_per_question']:.2f}",
        "seeds": row["seeds"],
    }


def _with_interval(mean: float, low: float | None, high: float | None) -> str:
    return f"{mean:.3f}" if low is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _table(rows: Sequence[Mapping]) -> str:
    return table(rows) if rows else NOT_RUN


def _draw_training(axes, curves: Mapping[str, Sequence[Sequence[Mapping]]]) -> None:
    for arm, seeds in curves.items():
        by_step = [{point["step"]: point["em"] for point in curve} for curve in seeds]
        steps = sorted(set.intersection(*map(set, by_step)))
        values = [[one[step] for one in by_step] for step in steps]
        (line,) = axes.plot(steps, [sum(v) / len(v) for v in values], label=arm)
        axes.fill_between(
            steps, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.2
        )
    axes.set(xlabel="step", ylabel="exact match (training episodes)")
    axes.legend()


def _draw_noise(axes, curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    for i, (schedule, by_noise) in enumerate(curves.items()):
        aside = 0.012 * (i - (len(curves) - 1) / 2)  # bars stand beside one another
        points = sorted((float(noise) + aside, *figures) for noise, figures in by_noise.items())
        noise, means, _, _ = zip(*points, strict=True)
        (line,) = axes.plot(noise, means, marker="o", label=schedule)
        for x, _, low, high in points:
            if low is not None:
                axes.plot([x, x], [low, high], color=line.get_color(), linewidth=1)
    axes.set(xlabel="noise at evaluation", ylabel="exact match")
    axes.legend()
