"""Tables of the README and of the pages in bench/results, from the JSON there; `python -m bench report` renews them.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is around it is written by hand.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.formats.formats_table import markdown
from bench.options import bench_parser
from bench.serving import balance, faults_figures, load, rebalance_figures, request_options
from bench.serving.serve import medians
from bench.solver.solver import speed_up_cell
from rq_ep.core.cost import LAYER_PHASES
from rq_ep.core.files.documents import read_json, replacing
from rq_ep.strategies import strategy_class

RESULTS = Path(__file__).with_name("results")
PAGES = (Path(__file__).parents[1] / "README.md", *sorted(RESULTS.glob("*.md")))
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Renew the tables of all pages."""
    bench_parser("report", __doc__).parse_args(argv)
    for page in PAGES:
        with replacing(page) as temporary:
            temporary.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)


def renewed(text: str) -> str:
    """A page with its tables as the results have them."""
    return TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", text)


def _load(name: str) -> Row:
    document: Row = read_json(RESULTS / f"{name}.json", "result", "bench/README.md has its command")
    return document


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _key(rows: Iterable[Row], *names: str) -> dict[Any, Row]:
    """Rows by some of their figures."""
    return {tuple(row[name] for name in names): row for row in rows}


def _near_ideal() -> str:
    calibrated = _key(_load("layer_local8_gpt-oss-120b_32k")["rows"], "scenario", "label")
    uncalibrated = _key(_load("layer_local8_gpt-oss-120b_32k_uncalibrated")["rows"], "scenario", "label")

    def cell(rows: dict[Any, Row], scenario: str, label: str) -> str:
        row = rows[scenario, label]
        held = row["held_rows_peak"] / rows["balanced", label]["held_rows_peak"]
        return f"{row['of_ideal']:.2f}; {held:.2f}"

    scenarios = list(dict.fromkeys(scenario for scenario, _ in calibrated))
    columns = {"standard": calibrated, "llep": calibrated, "rq": calibrated, "rq_llep": uncalibrated}
    rows = [[scenario, *(cell(rows, scenario, label) for label, rows in columns.items())] for scenario in scenarios]
    header = ["scenario", "`standard`", "`llep`", "`rq`, calibrated", "`rq_llep`, not calibrated"]
    return _table(header, rows)


def _gain() -> str:
    """One column for each measurement, as a multiple of `standard`; the figures of the README."""
    evaluated = _key(_load("demo_cpu2")["rows"], "label")
    replayed = _load("demo_latency_cpu2")["rows"]
    two_ranks = _key(_load("layer_cpu2_mixtral")["rows"], "label")
    published = _key(_load("layer_local8_gpt-oss-120b_llep")["rows"], "scenario", "label")

    def replay(label: str, figure: str) -> float:
        values = [row[figure] for row in replayed if row["label"] == label]
        return float(sum(values) / len(values))

    rows = [
        [
            f"**`{label}`**" if label == "rq" else f"`{label}`",
            f"{evaluated[label,]['imbalance_mean']:.2f}",
            f"{replay(label, 'compute_s_ratio'):.2f}",
            f"{two_ranks[label,]['wall_s_ratio']:.2f}",
            *(f"{published[scenario, label]['compute_s_ratio']:.2f}" for scenario in ("80:4", "95:1")),
        ]
        for label in ("standard", "eplb", "llep", "rq")
    ]
    ideals = [
        1 / replay("standard", "ideal_speed_up"),
        1 / two_ranks["standard",]["ideal_speed_up"],
        *(1 / published[scenario, "standard"]["ideal_speed_up"] for scenario in ("80:4", "95:1")),
    ]
    header = ["strategy", "demo: max/mean load", "demo: slowest rank", "2 ranks: whole layer"]
    header += ["8 ranks, 80:4: slowest rank", "8 ranks, 95:1: slowest rank"]
    rows.append(["perfect balance", "1.00", *(f"{ideal:.2f}" for ideal in ideals)])
    header.append("HTTP: prompts")
    speed_ups = {row["contestant"]: row["speed_up"] for row in balance.summary(_load("balance_cpu2"))}
    for row in rows:
        row.append(f"{1 / speed_ups[row[0].strip('*`')]:.2f}")
    return _table(header, rows)


def _demo_latency() -> str:
    rows = [
        [
            re.sub(r".*:(\d+).*", r"\1", row["scenario"]),
            f"`{row['label']}`",
            f"{row['imbalance_mean']:.2f}",
            *(f"{1000 * row['compute_s'][figure]:.1f}" for figure in ("p50", "p99")),
            f"{row['compute_s_ratio']:.2f}",
        ]
        for row in _load("demo_latency_cpu2")["rows"]
    ]
    header = ["layer", "strategy", "max/mean load", "slowest rank, p50 ms", "p99 ms", "ratio to `standard`"]
    return _table(header, rows)


def _two_ranks() -> str:
    def cell(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            f"`{row['label']}`",
            cell(row.get("imbalance_mean")),
            cell(row["compute_s_ratio"]),
            cell(row["wall_s_ratio"]),
            f"{row['transfer_bytes_per_step'] / 2**20:.0f} MiB" if row.get("transfer_bytes_per_step") else "",
        ]
        for row in _load("layer_cpu2_mixtral")["rows"]
    ]
    header = ["strategy", "max/mean load", "expert compute, CPU time", "whole layer, wall clock", "borrowed in a step"]
    return _table(header, rows)


def _published_scenarios() -> str:
    rows = _key(_load("layer_local8_gpt-oss-120b_llep")["rows"], "scenario", "label")
    scenarios = [name for name in dict.fromkeys(scenario for scenario, _ in rows) if name != "balanced"]

    def modelled(scenario: str, label: str) -> float:
        layer_s: float = rows[scenario, label]["modelled_full_size"]["layer_s"]
        return layer_s

    ideal = ["perfect balance", *(f"{rows[scenario, 'standard']['ideal_speed_up']:.2f}" for scenario in scenarios)]
    lines = [ideal]
    for label in ("eplb", "llep", "rq"):
        measured = (1 / rows[scenario, label]["compute_s_ratio"] for scenario in scenarios)
        lines.append([f"`{label}`, measured", *(f"{speed_up:.2f}" for speed_up in measured)])
    for label in ("eplb", "llep", "rq"):
        speed_ups = (modelled(scenario, "standard") / modelled(scenario, label) for scenario in scenarios)
        lines.append([f"`{label}`, modelled", *(f"{speed_up:.2f}" for speed_up in speed_ups)])
    return _table(["", *scenarios], lines)


def _distinct() -> str:
    """Compute of the slowest rank as a ratio to `standard`, and max/mean in brackets."""
    rows = _key(_load("layer_local8_olmoe_distinct")["rows"], "scenario", "label")
    labels = ("eplb", "llep", "rq", "rq_llep")

    def cell(row: Row) -> str:
        return f"{row['compute_s_ratio']:.2f} ({row['imbalance_mean']:.2f})"

    lines = [
        [
            f"`{scenario}`", f"{rows[scenario, 'standard']['imbalance_mean']:.2f}",
            f"{1 / rows[scenario, 'standard']['ideal_speed_up']:.2f}",
            *(cell(rows[scenario, label]) for label in labels),
        ]
        for scenario in dict.fromkeys(scenario for scenario, _ in rows)
    ]  # fmt: skip
    header = ["scenario", "`standard`: max/mean", "perfect balance", *(f"`{label}`" for label in labels)]
    return _table(header, lines)


def _plan() -> str:
    calibrated, uncalibrated = (
        _key(_load(name)["rows"], "num_experts", "num_ranks", "strategy")
        for name in ("plan_cpu2", "plan_cpu2_uncalibrated")
    )

    def cell(row: Row) -> str:
        moved = f" ({row['transfers']:.1f})" if strategy_class(row["strategy"]).lends else ""
        return f"{1e6 * row['plan_p50_s']:.0f}{moved}"

    sizes = list(dict.fromkeys(key[:2] for key in calibrated))
    rows = [
        [
            f"{experts} x {ranks}",
            *(cell(calibrated[experts, ranks, name]) for name in ("llep", "rq", "rq_llep")),
            *(cell(uncalibrated[experts, ranks, name]) for name in ("rq", "rq_llep")),
        ]
        for experts, ranks in sizes
    ]
    return _table(["experts x ranks", "`llep`", "`rq`", "`rq_llep`", "uncalibrated: `rq`", "`rq_llep`"], rows)


def _overhead() -> str:
    lines = []
    for rank, row in enumerate(_load("overhead_cpu2")["ranks"]):
        times = row["layer"]
        cells = (f"{1e3 * times[name]:.0f}" for name in ("layer_s", "products_s", "collectives_s", "around_s"))
        share, telemetry_us = times["around_s"] / times["layer_s"], 1e6 * times["telemetry_s"]
        lines.append([str(rank), *cells, f"{share:.1%}", f"{telemetry_us:.1f}"])
    header = ["rank", "layer, ms", "products", "collectives", "around", "of the layer", "telemetry, us"]
    return _table(header, lines)


def _borrowing() -> str:
    times = _load("overhead_cpu2")["ranks"][1]["transfer"]
    lines = []
    for name, label in (("plain", "plain send"), ("borrow", "borrowed"), ("verified", "and verified")):
        cells = (
            f"{1e3 * times[f'{name}_{clock}_s']:.2f}"
            + (f" ({times[f'borrow_{clock}_ratio']:.2f})" if name == "borrow" else "")
            for clock in ("wall", "cpu")
        )
        lines.append([label, *cells])
    return _table([f"an expert of {times['expert_bytes'] / 2**20:.0f} MiB", "wall clock, ms", "CPU time, ms"], lines)


def _solver() -> str:
    rows = _load("solver_cpu")["rows"]
    by_case = _key(rows, "num_experts", "num_ranks", "cap", "tokens", "low")
    lines = []
    for experts, ranks, cap, tokens in dict.fromkeys(key[:4] for key in by_case):
        of_case = {low: by_case[experts, ranks, cap, tokens, low] for low in ("int8", "int8:504", "int4")}
        first = of_case["int8"]
        lines.append(
            [
                f"{experts}, {ranks}", f"{cap:.0%}", f"{tokens:,}",
                *(f"{row['fractional']:.3f} ({row['integer']:.3f})" for row in of_case.values()),
                f"{first['eplb_even']:.3f}", f"{first['eplb_plus_1_even']:.3f}", f"{first['eplb_plus_1']:.3f}",
                f"{first['bound']:.3f}", f"{max(row['cpu_s'] for row in of_case.values()):.1f}",
            ]
        )  # fmt: skip
    header = ["experts, ranks", "cap", "tokens", "int8", "int8:504", "int4", "EPLB, same bytes"]
    return _table([*header, "EPLB, +1 slot per rank", "+1, exact split", "bound", "CPU s"], lines)


def _solver_58_layers() -> str:
    rows = [
        [
            f"{row['num_experts']}, {row['num_ranks']}", f"{row['cap']:.0%}", f"{row['tokens']:,}",
            f"{row['fractional']:.3f}", f"{row['bytes_used']:.1%}",
            f"{row['first_s']:.1f}" if "first_s" in row else "-", f"{row['cpu_s']:.1f}", speed_up_cell(row),
        ]
        for row in _load("solver_cpu_58_layers")["rows"]
    ]  # fmt: skip
    header = ["experts, ranks", "cap", "tokens", "max/mean", "bytes used", "s to the first placement", "CPU s"]
    return _table([*header, "times as fast with 2 workers"], rows)


def _solver_more() -> str:
    rows = [*_load("solver_cpu_many_ranks")["rows"], *_load("solver_cpu_laws")["rows"]]
    lines = [
        [
            row["law"], f"{row['num_experts']}, {row['num_ranks']}", f"{row['tokens']:,}", row["low"],
            f"{row['fractional']:.3f}", f"{row['eplb']:.3f}", f"{row['cpu_s']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["popularity", "experts, ranks", "tokens", "low", "max/mean", "EPLB, same bytes, exact split", "CPU s"]
    return _table(header, lines)


ENGINE_NAMES = {
    "stay": "nobody",
    "vllm": "vLLM",
    "sglang_deepseek": "SGLang `deepseek`",
    "sglang_deepseek_vec": "SGLang `deepseek_vec`",
    "rq_in_vllm": "**`rq_ep` in vLLM**",
    "rq_in_sglang": "**`rq_ep` in SGLang**",
    "rq_in_vllm_sums": "`rq_ep` in vLLM, sums alone",
    "place": "`place --for`",
    "place_sums": "`place --for`, sums alone",
}


def _engines() -> str:
    """Held-out max/mean: a row for each size, a column for everyone who places."""
    size = ("num_experts", "num_ranks", "num_extras", "scenario", "tokens")
    rows = _key(_load("engines_cpu")["rows"], *size, "placed_by")
    lines = [
        [
            ", ".join(map(str, case[:3])), case[3], f"{case[4]:,}",
            *(f"{rows[*case, name]['held_out']:.3f}" for name in ENGINE_NAMES),
        ]
        for case in dict.fromkeys(key[:5] for key in rows)
    ]  # fmt: skip
    return _table(["experts, ranks, extra slots", "scenario", "tokens", *ENGINE_NAMES.values()], lines)


def _engine_moves() -> str:
    """What a placement of the larger sizes costs, and what the mean load looks like under it."""
    lines = [
        [
            f"{row['num_experts']}, {row['num_ranks']}", row["scenario"], ENGINE_NAMES[row["placed_by"]],
            f"{row['held_out']:.3f}", f"{row['of_mean_load']:.4f}", f"{row['moves_per_layer']:.0f}",
            "" if row["moves_per_unit"] is None else f"{row['moves_per_unit']:.0f}",
        ]
        for row in _load("engines_cpu")["rows"]
        if row["num_ranks"] >= 32 and row["tokens"] == 4096
    ]  # fmt: skip
    header = ["experts, ranks", "scenario", "placed by", "held-out max/mean", "max/mean of the mean load"]
    return _table([*header, "moves per layer", "moves per unit of max/mean removed"], lines)


def _engines_58_layers() -> str:
    lines = [
        [ENGINE_NAMES[row["placed_by"]], row["scenario"], f"{row['held_out']:.3f}", f"{row['cpu_s']:.1f}"]
        for row in _load("engines_cpu_58_layers")["rows"]
        if row["placed_by"] != "stay"
    ]
    return _table(["placed by", "scenario", "held-out max/mean", "CPU s"], lines)


def _low_formats() -> str:
    lines = [
        [
            row["case"].replace("x", ", "), f"{row['budget']:.0%}", " + ".join(f"`{name}`" for name in row["formats"]),
            f"{row['max_share']:.1%}", "-" if row["max_error"] is None else f"{row['max_error']:.2%}",
            f"{row['max_over_mean']:.3f}", f"{row['error']:.2%}",
            *(f"{row['pairs'].get(name, 0):.0%}" for name in ("int8:504", "int4")), f"{row['cpu_s']:.1f}",
        ]
        for row in _load("low_formats_cpu")["rows"]
    ]  # fmt: skip
    header = ["experts, ranks", "bytes", "low formats", "cap on pairs", "cap on error", "max/mean", "predicted error"]
    return _table([*header, "pairs in `int8:504`", "in `int4`", "CPU s"], lines)


def _replan() -> str:
    lines = []
    for row in _load("replan_cpu_58_layers")["rows"]:
        experts, ranks = row["change"].split()[0].split("x")
        lines.append(
            [
                f"{experts}, {ranks}", f"{row['price']:g}",
                *(f"{row[key]:.3f}" for key in ("stale", "replanned", "fresh")),
                *(f"{row[key]:.0%}" for key in ("gain_share", "moved_of_eplb")), str(row["rounds"]),
                " / ".join(f"{row[f'half_step{order}']:,}" for order in ("", "_low_first", "_native_first")),
                *(f"{row[key]:.1f}" for key in ("cpu_s", "fresh_cpu_s")),
            ]
        )  # fmt: skip
    header = ["experts, ranks", "price", "stale", "planned again", "placed anew", "gain", "bytes, of EPLB's map change"]
    return _table([*header, "rounds", "steps to half of the gain", "CPU s, again", "CPU s, anew"], lines)


def _replan_demo() -> str:
    lines = [
        [
            row["change"], *(f"{row[key]:.3f}" for key in ("stale", "replanned", "fresh")),
            *(f"{row[key]:.0%}" for key in ("gain_share", "moved_of_eplb", "least_bytes")),
            f"{row['found']:.3f} for {row['found_bytes']:.0%}",
        ]
        for row in _load("replan_demo")["rows"]
        if "least_bytes" in row
    ]  # fmt: skip
    header = ["change", "stale", "planned again", "placed anew", "gain", "bytes, of EPLB's map change"]
    return _table([*header, "90 % of the gain takes at least", "on single steps"], lines)


def _drift() -> str:
    rows = _key(_load("drift_h200_gpt-oss-120b")["rows"], "tokens_per_rank", "drift", "row")
    columns = ("standard", "llep", "llep auto", "rq", "rq_llep")

    def cell(row: Row) -> str:
        return f"{1e6 * row['layer_s']:,.0f}" + (f" ({row['transfers']:.1f})" if row["transfers"] else "")

    lines = [
        [f"{tokens:,}", f"{drift:g}", *(cell(rows[tokens, drift, name]) for name in columns)]
        for tokens, drift in dict.fromkeys(key[:2] for key in rows)
    ]
    return _table(["tokens per rank", "drift", *(f"`{name}`" for name in columns)], lines)


def _breakeven() -> str:
    rows = _key(_load("breakeven_h200_llep")["break_even"], "tokens_per_rank", "row")
    columns = ("llep", "llep auto", "rq_llep", "rq_llep int8")
    lines = [
        [f"{tokens:,}", *(f"{row['excess']:.2f} ({row['excess_with_planning']:.2f})" for row in of_size)]
        for tokens in dict.fromkeys(key[0] for key in rows)
        for of_size in [[rows[tokens, name] for name in columns]]
    ]
    return _table(["tokens per rank", *(f"`{name}`" for name in columns)], lines)


def _breakeven_speed_up() -> str:
    rows = _key(_load("breakeven_h200_gpt-oss-120b")["rows"], "scenario", "tokens_per_rank", "row")
    columns = ("llep", "rq_llep uncalibrated", "rq calibrated")
    lines = []
    for scenario, tokens in dict.fromkeys(key[:2] for key in rows):
        ideal = rows[scenario, tokens, "standard"]["ideal_speed_up"]
        speed_ups = [rows[scenario, tokens, name]["speed_up"] for name in columns]
        lines.append([scenario, f"{tokens:,}", f"{ideal:.2f}", *(f"{x:.2f} ({x / ideal:.2f})" for x in speed_ups)])
    return _table(["scenario", "tokens per rank", "max/mean", *(f"`{name}`" for name in columns)], lines)


FORMATS = ("int8", "fp8", "int4_g32", "int4_g32:calibrated", "mxfp4")


def _format_titles(names: Iterable[str]) -> list[str]:
    return [f"`{name.removesuffix(':calibrated')}`" + ", GPTQ" * name.endswith(":calibrated") for name in names]


def _kl(row: Row) -> str:
    return f"{1e6 * row['kl']['mean']:,.0f} ({row['agreement']['mean']:.2%})"


def _estimate(estimate: Row) -> str:
    return f"{estimate['mean']:.2f} +- {estimate['error']:.2f}"


def _fidelity() -> str:
    document = _load("fidelity_demo")
    rows = _key(document["rows"], "format", "chosen", "share")
    halves = _key(document["mixed_replicas"], "format", "low_half")
    lines = [
        [f"{chosen}, {share:.0%}", *(_kl(rows[name, chosen, share]) for name in FORMATS)]
        for share in (0.25, 0.5)
        for chosen in ("least important", "coldest", "by chance")
    ]
    every = [rows[name, "all", 1.0] for name in FORMATS]
    lines.append(["all", *map(_kl, every)])
    lines.append(["all: routers' choices that change", *(f"{row['routing_shift']['mean']:.2%}" for row in every)])
    lines += [
        [f"half of every expert's pairs: {half}", *(_kl(halves[name, half]) for name in FORMATS)]
        for half in ("lowest gates", "by chance")
    ]
    return _table(["experts of each layer in low bits", *_format_titles(FORMATS)], lines)


def _ratios(document: Row, names: Sequence[str]) -> str:
    ratios = _key(document["ratios"], "format", "what", "share")
    lines = [
        [f"{what}, {share:.0%}", *(_estimate(ratios[name, what, share]["kl_ratio"]) for name in names)]
        for what, share in dict.fromkeys(key[1:] for key in ratios)
    ]
    return _table(["ratio of KL", *_format_titles(names)], lines)


def _fidelity_routers() -> str:
    names = ("int8", "int4_g32", "int4_g32:calibrated", "int4_g128", "int4_g128:calibrated")
    rows = _key(_load("fidelity_demo")["routers"], "routers", "format")
    lines = [
        [
            routers,
            *(f"{_kl(rows[routers, name])}, {rows[routers, name]['routing_shift']['mean']:.2%}" for name in names),
        ]
        for routers in dict.fromkeys(key[0] for key in rows)
    ]
    return _table(["all experts low, routers", *_format_titles(names)], lines)


def _placements(name: str) -> str:
    lines = [
        [
            row["label"], f"{row['imbalance_mean']:.3f}", f"{row['imbalance_worst']:.2f}",
            f"{1e6 * row['kl']['mean']:.1f} +- {1e6 * row['kl']['error']:.1f}",
            f"{row['agreement']['mean']:.3%} +- {row['agreement']['error']:.3%}",
        ]
        for row in _load(name)["rows"]
    ]  # fmt: skip
    return _table(["placement", "load, max/mean", "worst step", "KL / 1e-6", "next token as dense"], lines)


def _formats() -> str:
    rows = _load("formats_cpu")["rows"]
    by_key = _key(rows, "format", "rows_per_expert", "shape")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    sizes = [size for size in dict.fromkeys(row["rows_per_expert"] for row in rows) if size != 64]
    lines = []
    for name in dict.fromkeys(row["format"] for row in rows):
        first = [by_key[name, sizes[0], shape] for shape in shapes]
        ratios = (" / ".join(f"{by_key[name, size, shape]['ratio']:.2f}" for shape in shapes) for size in sizes)
        mebibytes = " / ".join(f"{row['bytes_per_full_expert'] / 2**20:.1f}" for row in first)
        lines.append(
            [f"`{name}`", mebibytes, f"{first[0]['weight_error']:.1%}", f"{first[0]['output_error']:.1%}", *ratios]
        )
    header = ["format", "MiB", "error of weights", "of output", *(f"{size:,} rows" for size in sizes)]
    return _table(header, lines)


def _formats_overview() -> str:
    return markdown(str(RESULTS / "formats_cpu.json"), str(RESULTS / "fidelity_demo.json"))


def _serve(name: str) -> str:
    lines = []
    for entry in medians(_load(name)):
        cells = [
            f"{entry[key]:.{digits}f} ({entry[f'{key}_ratio']:.2f})" if key in entry else ""
            for key, digits in (("output_throughput", 0), ("p99_ttft_ms", 1), ("p99_itl_ms", 1))
        ]
        lines.append([str(entry["max_concurrency"]), entry["contestant"], *cells])
    return _table(["at once", "contestant", "output tokens/s", "p99 TTFT, ms", "p99 ITL, ms"], lines)


def _step() -> str:
    parts = ("agreement", *LAYER_PHASES, "attention, router, ...", "rest")
    lines = []
    for row in _load("step_cpu2")["rows"]:
        totals = [f"{row[f'{key}_ms']:.1f} ({row[f'{key}_ratio']:.2f})" for key in ("step", "cpu")]
        cells = [totals[0], f"{row['p99_ms']:.0f}", totals[1], *(f"{row[f'{part}_ms']:.1f}" for part in parts)]
        lines.append([str(row["at_once"]), row["way"], *cells])
    return _table(["at once", "way", "step, ms", "p99", "CPU, ms", *parts], lines)


def _rebalance_goals() -> str:
    return _table(["", "goal", "reached", "peers"], rebalance_figures.goals(_load("rebalance_cpu2")["parts"]))


def _load_model() -> str:
    return _table(["", "goal", "reached"], load.goals(_load("load_cpu2")["parts"]))


def _balance() -> str:
    return _table(balance.HEADER, map(balance.cells, balance.summary(_load("balance_cpu2"))))


def _faults() -> str:
    return _table(["", "goal", "reached", "peers"], faults_figures.goals(_load("faults_cpu2")["parts"]))


def _rebalance_domains() -> str:
    part = _load("rebalance_cpu2")["parts"]["domains"]
    rows = _key(part["rows"], "server", "domain")

    def cell(row: Row) -> str:
        return (
            f"{row['imbalance']:.2f}; {row['output_throughput']:.0f}; {row['p99_itl_ms']:.0f}; {row['num_committed']}"
        )

    lines = [[name, *(cell(rows[name, domain]) for domain in part["domains"])] for name in part["series"]]
    return _table(["server", *part["domains"]], lines)


def _rebalance_cost() -> str:
    part = _load("rebalance_cpu2")["parts"]["cost"]
    lines = []
    for name, gap_ms in part["longest_gap_ms"].items():
        p99_ms = median(row["p99_itl_ms"] for row in part["rows"] if row["server"] == name)
        ratios = (part["ratios"][figure].get(name, 1.0) for figure in ("output_throughput", "p99_itl_ms"))
        moves, peak_bytes = part["num_committed"].get(name, 0), part["peak_bytes"].get(name)
        shown = [f"{p99_ms:.0f}", f"{gap_ms:.0f}", str(moves)]
        shown.append("-" if peak_bytes is None else f"{peak_bytes / 2**20:,.0f}")
        lines.append([name, *(f"{ratio:.2f}" for ratio in ratios), *shown])
    header = [
        "server",
        "tokens/s / off",
        "p99 ITL / off",
        "p99 ITL, ms",
        "longest gap, ms",
        "re-placements",
        "MiB of a rank",
    ]
    return _table(header, lines)


TABLES: dict[str, Callable[[], str]] = {
    "gain": _gain,
    "demo_latency": _demo_latency,
    "two_ranks": _two_ranks,
    "published_scenarios": _published_scenarios,
    "distinct": _distinct,
    "near_ideal": _near_ideal,
    "plan": _plan,
    "overhead": _overhead,
    "borrowing": _borrowing,
    "solver": _solver,
    "solver_58_layers": _solver_58_layers,
    "solver_more": _solver_more,
    "low_formats": _low_formats,
    "placements_formats": lambda: _placements("eval_demo_8_ranks_formats"),
    "engines": _engines,
    "engine_moves": _engine_moves,
    "engines_58_layers": _engines_58_layers,
    "replan": _replan,
    "replan_demo": _replan_demo,
    "drift": _drift,
    "breakeven": _breakeven,
    "breakeven_speed_up": _breakeven_speed_up,
    "fidelity": _fidelity,
    "fidelity_ratios": lambda: _ratios(_load("fidelity_demo"), FORMATS),
    "fidelity_ratios_64k": lambda: _ratios(_load("fidelity_demo_64k"), ("int4_g32", "int4_g32:calibrated")),
    "fidelity_routers": _fidelity_routers,
    "placements_int8": lambda: _placements("eval_demo_int8"),
    "placements_int4": lambda: _placements("eval_demo_8_ranks_int4"),
    "formats": _formats,
    "formats_overview": _formats_overview,
    "serve": lambda: _serve("serve_cpu2"),
    "cache": lambda: _serve("cache_cpu2"),
    "options": lambda: _table(request_options.HEADER, request_options.goals(_load("options_cpu2")["parts"])),
    "step": _step,
    "faults": _faults,
    "load": _load_model,
    "balance": _balance,
    "rebalance_goals": _rebalance_goals,
    "rebalance_domains": _rebalance_domains,
    "rebalance_cost": _rebalance_cost,
}
