"""The compile report: its rows, its table, and advice for a program that does not fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from zerosearch_jax.errors import UserError
from zerosearch_jax.tpu_aot.config import CompileConfig
from zerosearch_jax.tpu_aot.programs import Sizes, mesh_text

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """Measurements of one compiled program: bytes per chip, seconds per call.

    Attributes:
      peak: arguments, temporaries, code, and outputs that do not reuse donated arguments.
      also_resident: bytes that stay in memory during the call but are not its arguments.
      hbm: size of the chip's memory.
      collectives: for each kind, how often it runs and how many bytes one chip sends.
    """

    name: str
    fits: bool
    arguments: int
    temporaries: int
    outputs: int
    peak: int
    also_resident: int
    hbm: int
    flops: float
    hbm_bytes: float
    compute_secs: float
    hbm_secs: float
    ici_secs: float
    bound: str
    collectives: dict[str, dict[str, float]]
    compile_secs: float

    @property
    def total(self) -> int:
        """Bytes per chip during the call."""
        return self.peak + self.also_resident


def heading(summary: dict) -> str:
    """Preset, topology, meshes and batch, and the bytes that stay in memory."""
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in summary["resident"].items())
    return (
        f"{summary['preset']} on {summary['slices']} × {summary['topology']}: policy "
        f"{mesh_text(summary['mesh'])}, simulator {mesh_text(summary['simulator_mesh'])}; "
        f"{summary['microbatches']} microbatches of {summary['rows']} × {summary['row_tokens']} "
        "tokens\n\n"
        f"Resident GiB per chip: {held}; total {sum(summary['resident'].values()) / GIB:.2f}"
    )


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per program."""
    lines = [_cells(row) for row in rows]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _cells(row: Row) -> dict[str, str]:
    sent = sum(kind["wire_bytes"] for kind in row.collectives.values())
    gib = {
        "arguments": row.arguments,
        "temporaries": row.temporaries,
        "peak": row.peak,
        "+ resident": row.total,
        "of": row.hbm,
    }
    return {
        "program": row.name,
        "fits": "yes" if row.fits else "NO",
        **{name: f"{size / GIB:.2f}" for name, size in gib.items()},
        "TFLOP": f"{row.flops / 1e12:.2f}",
        "GB moved": f"{row.hbm_bytes / 1e9:.1f}",
        "GB sent": f"{sent / 1e9:.2f}",
        "compute s": f"{row.compute_secs:.3g}",
        "HBM s": f"{row.hbm_secs:.3g}",
        "links s": f"{row.ici_secs:.3g}",
        "bound": row.bound,
        "compile s": f"{row.compile_secs:.0f}",
    }


def check_fits(
    rows: Sequence[Row], config: CompileConfig, sizes: Sizes, resident: dict[str, int]
) -> None:
    """Raises a UserError with advice if a program does not fit."""
    too_large = [row for row in rows if not row.fits]
    if too_large:
        names = ", ".join(row.name for row in too_large)
        worst = max(too_large, key=lambda row: row.total)
        raise UserError(
            f"{names}: {worst.total / GIB:.1f} GiB do not fit the {worst.hbm / GIB:.0f} GiB of a "
            f"{config.topology} chip; {advice(config, sizes, resident, worst)}"
        )


def advice(config: CompileConfig, sizes: Sizes, resident: dict[str, int], row: Row) -> str:
    """A change of the config that makes `row` fit. Changes that cost no speed come first."""
    split = resident["learner state"] + resident["reference"]
    whole = sum(resident.values()) - split
    over = row.total - row.hbm
    if row.name == "learner step" and config.remat != "full":
        return "--config.remat=full recomputes the layers instead of keeping their activations"
    in_learner = row.name in ("learner step", "reference log-probs")
    if in_learner and config.rows_each > 1 and row.temporaries / 2 > over:
        return f"--config.rows_each={config.rows_each // 2} halves a microbatch"
    times = next((n for n in (2, 4, 8, 16) if split - split / n > over), None)
    if times:
        mesh = sizes.mesh | {"fsdp": sizes.mesh["fsdp"] * times}
        return f"use {times} times the chips, with config.mesh {mesh_text(mesh)}"
    return (
        f"{whole / GIB:.1f} GiB of that are the generators': set int8_simulator, lower slots_each "
        "or max_tokens, or raise tensor in config.simulator_mesh"
    )
