"""The README's table of formats, out of what two benches have written: what a format costs, and what it does."""

from typing import Any

from rq_ep.core.files.documents import read_json

NATIVE = "bf16"
SHARE, CHOSEN = 0.25, "least important"
NUM_ROWS = (1, 256)  # of each expert


def markdown(costs_path: str, fidelity_path: str) -> str:
    """A row for each format.

    Args:
        costs_path: written by `python -m bench formats --json`.
        fidelity_path: written by `python -m bench fidelity --json`.
    """
    costs: list[dict[str, Any]] = read_json(costs_path, "formats", "`python -m bench formats --json` writes it")["rows"]
    fidelity = read_json(fidelity_path, "fidelity", "`python -m bench fidelity --json` writes it")
    kl = {
        row["format"]: row["kl"]["mean"] for row in fidelity["rows"] if (row["share"], row["chosen"]) == (SHARE, CHOSEN)
    }
    shapes = list(dict.fromkeys(row["shape"] for row in costs))
    by_key = {(row["shape"], row["format"], row["rows_per_expert"]): row for row in costs}
    columns = ["format", "bytes per weight", "output error", "KL / 1e-6", *map(_rows, NUM_ROWS)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in dict.fromkeys(row["format"] for row in costs):
        native, own = (by_key[shapes[0], each, NUM_ROWS[0]]["bytes_per_full_expert"] for each in (NATIVE, name))
        cells = [
            f"`{name}`",
            f"{2 * own / native:.2f}",
            _number(fidelity["output_error"].get(name), "{:.1%}"),
            _number(kl.get(name), "{:,.0f}", 1e6) + _number(kl.get(f"{name}:calibrated"), " ({:,.0f})", 1e6, ""),
            *(" / ".join(f"{by_key[shape, name, number]['ratio']:.2f}" for shape in shapes) for number in NUM_ROWS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(number: int) -> str:
    return f"time, {number} row{'s' * (number > 1)}"


def _number(value: float | None, template: str, unit: float = 1, missing: str = "-") -> str:
    return missing if value is None else template.format(value * unit)
