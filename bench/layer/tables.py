"""Tables of a result: a row for each strategy, or, over many scenarios, the LLEP paper's Figure 4."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.table import Table

from bench.layer.published import PUBLISHED, published
from rq_ep.commands.console import wide_console

Row = dict[str, Any]


def show(result: Mapping[str, Any]) -> None:
    """Print a table for each scenario and, if there are several, the speed-ups side by side."""
    console = wide_console(185)
    scenarios = list(dict.fromkeys(row["scenario"] for row in result["rows"]))
    for scenario in scenarios:
        rows = [row for row in result["rows"] if row["scenario"] == scenario]
        console.print(_scenario_table(result, scenario, rows))
        first = rows[0]
        console.print(f"ratios are to {first['label']}; perfect balance would be {1 / first['ideal_speed_up']:.3f}\n")
    if len(scenarios) > 1:
        console.print(_speed_up_table(result, scenarios))
        console.print(_footnotes(result))
    elif result["machine"]:
        console.print(f"* modelled for {result['machine']}, not measured; nothing is taken to overlap.")


def show_brief(result: Mapping[str, Any]) -> None:
    """Print one table of what a strategy is chosen by: load and compute of the slowest rank, bytes and output error."""
    first, shape, options = result["rows"][0], result["shape"], result["options"]
    sizes = (
        f"{shape['num_experts']} experts of {shape['hidden_size']} x {shape['intermediate_size']} in {options['dtype']}"
    )
    table = Table(
        title=f"{result['num_ranks']} ranks, {first['tokens_per_rank']:.0f} tokens a rank; {sizes}",
        caption=f"experts: compute of the slowest rank, p50 and p99 of {options['num_rounds']} rounds; ratio: to "
        f"{first['label']} in the same round; perfect: the ratio if all ranks had the same load and time were "
        "proportional to it; MiB: this layer's experts on the fullest rank",
    )
    columns = ["scenario", "strategy", "load\nmax/mean", "experts, ms\np50 / p99", "\nratio", "\nperfect"]
    for name in [*columns, "MiB\na rank", "borrowed\nMiB a step", "output\nerror"]:
        table.add_column(name, justify="left" if name in columns[:2] else "right", no_wrap=True)
    for scenario in dict.fromkeys(row["scenario"] for row in result["rows"]):
        table.add_section()
        rows = [row for row in result["rows"] if row["scenario"] == scenario]
        for row in rows:
            table.add_row(
                scenario_title(scenario) if row is rows[0] else "",
                row["label"],
                _number(row.get("imbalance_mean"), ".3f"),
                _times(row["compute_s"]),
                _number(row["compute_s_ratio"], ".3f"),
                f"{1 / rows[0]['ideal_speed_up']:.3f}",
                f"{max(row['resident_bytes_by_rank']) / 2**20:.0f}",
                _number(row.get("transfer_bytes_per_step"), ".1f", 2**-20),
                f"{row['output_error']:.1e}",
            )
    wide_console(120).print(table)


def scenario_title(scenario: str) -> str:
    """A scenario for a reader: `layer 3, prefill` of a recorded one, others as they are written."""
    _, _, layer = scenario.removeprefix("trace:").partition(":")
    return f"layer {layer.replace('+', ', ')}" if scenario.startswith("trace:") and layer else scenario


def speed_up(row: Row, figure: str, first: Row) -> float | None:
    """How much faster a row is than the first of its scenario."""
    if figure == "full_size":
        if not row.get("modelled_full_size"):
            return None
        return float(first["modelled_full_size"]["layer_s"] / row["modelled_full_size"]["layer_s"])
    ratio = row[f"{figure}_ratio"]
    return None if ratio is None else 1 / ratio


def _scenario_table(result: Mapping[str, Any], scenario: str, rows: list[Row]) -> Table:
    clock = "CPU" if result["device"] == "cpu" else "GPU"
    table = Table(
        title=f"{scenario}: {result['num_ranks']} ranks ({result['backend']} on {result['device']}), "
        f"{result['shape_name']} D={result['shape']['hidden_size']} F={result['shape']['intermediate_size']}, "
        f"{rows[0]['tokens_per_rank']:g} tokens a rank; times of the slowest rank, p50 / p99"
    )
    columns: list[tuple[str, Callable[[Row], Any]]] = [
        ("\nstrategy", lambda row: row["label"]),
        ("max/mean\nload", lambda row: _number(row.get("imbalance_mean"), ".3f")),
        (f"expert compute\n{clock} ms", lambda row: _times(row["compute_s"])),
        ("\nratio", lambda row: _number(row["compute_s_ratio"], ".3f")),
        *([("predicted*\nms", _predicted)] if rows[0].get("predicted_compute_s") else []),
        ("plan\nus", lambda row: _number(row["plan_s"] and row["plan_s"]["p50"] * 1e6, ".0f")),
    ]
    if result["machine"]:
        columns += [
            ("exchange*\nms", lambda row: _number(row.get("modelled_exchange_s"), ".3f", 1e3)),
            ("transfer*\nms", lambda row: _number(row.get("modelled_transfer_s"), ".3f", 1e3)),
            ("total\nms", lambda row: _times(row["total_s"])),
            ("\nratio", lambda row: _number(row["total_s_ratio"], ".3f")),
        ]
    if result["backend"] != "local":
        columns += [
            ("whole layer\nCPU ms", lambda row: _times(row["cpu_s"])),
            ("wall clock\nms", lambda row: _times(row["wall_s"])),
            ("\nratio", lambda row: _number(row["wall_s_ratio"], ".3f")),
        ]
    columns += [
        ("of\nideal", lambda row: _number(row["of_ideal"], ".2f")),
        ("rows in\npeak", lambda row: _number(row.get("received_rows_peak"), "d")),
        ("rows held\nMiB", lambda row: _number(row.get("held_bytes_peak"), ".1f", 2**-20)),
        ("MiB\na rank", lambda row: f"{max(row['resident_bytes_by_rank']) / 2**20:.1f}"),
        ("borrowed\nMiB/step", lambda row: _number(row.get("transfer_bytes_per_step"), ".1f", 2**-20)),
        ("output\nerror", lambda row: f"{row['output_error']:.1e}"),
    ]
    for title, _ in columns:
        table.add_column(title, justify="left" if title == "\nstrategy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _speed_up_table(result: Mapping[str, Any], scenarios: list[str]) -> Table:
    table = Table("", *scenarios, title=f"speed-up over {result['rows'][0]['label']}, {result['shape_name']}")
    for column in table.columns[1:]:
        column.justify = "right"
    by_name = {(row["scenario"], row["label"]): row for row in result["rows"]}
    labels = labels_of(result["rows"])

    def add(title: str, values: list[float | None]) -> None:
        if any(value is not None for value in values):
            table.add_row(title, *(_number(value, ".2f") for value in values))

    firsts = [by_name[scenario, labels[0]] for scenario in scenarios]
    add("perfect balance", [first["ideal_speed_up"] for first in firsts])
    for title, figure in {
        "{}: expert compute, measured": "compute_s",
        "{}: wall clock, measured": "wall_s",
        "{}: with modelled links": "total_s",
        "{}: all modelled, full size": "full_size",
    }.items():
        table.add_section()
        for label in labels[1:]:
            rows = [by_name[scenario, label] for scenario in scenarios]
            add(title.format(label), [speed_up(row, figure, first) for row, first in zip(rows, firsts, strict=True)])
    table.add_section()
    for label in labels[1:]:
        add(f"{label}: of ideal", [by_name[scenario, label]["of_ideal"] for scenario in scenarios])
    if "balanced" in scenarios:
        table.add_section()
        for label in labels:
            held = [by_name[scenario, label].get("held_bytes_peak") for scenario in scenarios]
            base = held[scenarios.index("balanced")]
            add(f"{label}: rows held, to balanced", [base and value / base for value in held])
    table.add_section()
    theirs = [published(result["shape_name"], scenario).get("speed_up") for scenario in scenarios]
    add("llep, published (8 H200)", theirs)
    return table


def _footnotes(result: Mapping[str, Any]) -> str:
    notes = [
        "of ideal: speed-up of planning, of the rank slowest by its own median, and of its modelled links if there are "
        "any, as a fraction of perfect balance. rows held: of other ranks, at once, on the fullest rank."
    ]
    if result["machine"]:
        notes.append(
            f"modelled: a model of {result['machine']}, nothing overlapped. 'with modelled links': planning and "
            "compute as measured here, links of the machine, in the sizes as run; 'full size': in the model's sizes."
        )
    if figures := PUBLISHED["shapes"].get(result["shape_name"]):
        notes.append(
            f"published: arXiv 2601.17111, Figure 4, {figures['tokens_per_rank']} tokens a rank; another machine, "
            "another code base, another standard EP."
        )
    return "\n".join(notes)


def labels_of(rows: Iterable[Row]) -> list[str]:
    """Labels in the order of the rows, each once."""
    return list(dict.fromkeys(row["label"] for row in rows))


def _predicted(row: Row) -> str:
    """Compute of the slowest rank as a profile of this machine expects it, and how far that is off."""
    expected_s = row.get("predicted_compute_s")
    return "-" if not expected_s else f"{expected_s * 1e3:.2f} ({expected_s / row['compute_s']['p50'] - 1:+.0%})"


def _times(quantiles_s: Mapping[str, float] | None) -> str:
    return "-" if quantiles_s is None else f"{quantiles_s['p50'] * 1e3:.2f} / {quantiles_s['p99'] * 1e3:.2f}"


def _number(value: float | None, format_: str, scale: float = 1) -> str:
    return "-" if value is None else format(value if scale == 1 else value * scale, format_)
