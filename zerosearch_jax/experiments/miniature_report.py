"""The miniature's report: Markdown tables and two plots of given results.

The report is deterministic: the same input gives the same text.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from zerosearch_jax.errors import UserError
from zerosearch_jax.experiments.claims import MARGIN

NOT_RUN = "not run"
CLAIMS_NOTE = (
    "EM is the exact match of an arm, averaged over the seeds that both arms have. The difference "
    "is arm minus against, with a 95% interval from a bootstrap over seeds and questions. A `>` "
    f"claim holds if the whole interval is above 0, a `>=` claim if it is above -{MARGIN}. A claim "
    "does not hold if the whole interval is below that bound; otherwise it is undecided. With one "
    "seed the interval covers question sampling only; with few seeds it is coarse. Each claim is "
    "tested separately, without a correction for multiple comparisons."
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

    The report says "not run" for a table without rows or a plot without curves.

    Args:
      claims_rows: the result of `claims.evaluate_claims`.
      methods_rows: "method", "engine", "em" and "f1" (mean, low, high; low and high are None
        without an interval), "searches_per_question" and "seeds" (their number).
      simulator_rows: any columns, the same in every row.
      noise_curves: training schedule → evaluation noise ("0", "0.25", …) → mean, low, high of
        exact match.
      training_curves: arm → one curve per seed → points with "step" and "em". The plot shows the
        steps that all seeds have.
      provenance: "command", "commit", "seeds", "cores", "seconds" (total) and "stage_seconds"
        (stage → seconds).

    Raises:
      UserError: matplotlib is not installed.
    """
    out = Path(out_dir)
    plots = _plots(
        out, training=(_draw_training, training_curves), noise=(_draw_noise, noise_curves)
    )
    stages = provenance["stage_seconds"].items()
    parts = [
        "# The paper in miniature",
        "## Claims",
        _table([_claim_cells(row) for row in claims_rows]),
        CLAIMS_NOTE,
        "## Methods and engines",
        _table([_method_cells(row) for row in methods_rows]),
        "Brackets hold 95% intervals: over seeds for trained policies (Student's t; none with one "
        "seed), over questions for the other rows.",
        "## Simulators",
        _table(simulator_rows),
        "## Training",
        plots["training"],
        "Exact match of the training episodes. Lines: mean over seeds. Bands: range over seeds.",
        "## Noise at evaluation",
        plots["noise"],
        "Exact match against the share of noisy searches at evaluation, one line per training "
        "schedule. Bars: 95% interval over training seeds.",
        "## Stage run times",
        _table([{"stage": stage, "seconds": f"{secs:.1f}"} for stage, secs in stages]),
        "## Provenance",
        _table(
            [
                {"item": "command", "value": f"`{provenance['command']}`"},
                {"item": "commit", "value": provenance["commit"]},
                {"item": "seeds", "value": ", ".join(map(str, provenance["seeds"]))},
                {"item": "CPU cores", "value": provenance["cores"]},
                {"item": "seconds with a running stage", "value": f"{provenance['seconds']:.1f}"},
            ]
        ),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _plots(out: Path, **plots: tuple[Callable, Mapping]) -> dict[str, str]:
    """Draws each plot that has curves to `out/NAME.png`; returns the Markdown by name."""
    try:
        from matplotlib.figure import Figure  # Without pyplot it draws with Agg on any machine.
    except ImportError as error:
        raise UserError(
            "the report's plots need matplotlib; pip install -r requirements-report.txt"
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    found = dict.fromkeys(plots, NOT_RUN)
    for name, (draw, curves) in plots.items():
        if curves:
            figure = Figure(figsize=(8, 5), layout="constrained")
            draw(figure.subplots(), curves)
            figure.savefig(out / f"{name}.png", dpi=120)
            found[name] = f"![exact match, {name}]({name}.png)"
    return found


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
    """Returns a Markdown table; floats have three decimals, None is "–"."""
    if not rows:
        return NOT_RUN
    cells = [{key: _cell(value) for key, value in row.items()} for row in rows]
    return tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


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
        shift = 0.012 * (i - (len(curves) - 1) / 2)  # keeps the bars from overlapping
        points = sorted((float(noise) + shift, *scores) for noise, scores in by_noise.items())
        noise, means, _, _ = zip(*points, strict=True)
        (line,) = axes.plot(noise, means, marker="o", label=schedule)
        for x, _, low, high in points:
            if low is not None:
                axes.plot([x, x], [low, high], color=line.get_color(), linewidth=1)
    axes.set(xlabel="noise at evaluation", ylabel="exact match")
    axes.legend()
