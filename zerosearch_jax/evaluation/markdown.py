"""Tables of reports."""

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping]) -> str:
    """A Markdown table of at least one row; all have the keys of the first, its header.

    Numbers that are no integers get three decimals, None is "–".
    """
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([row[key] for key in header] for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
