"""A placement that follows the load, on a real server: what it gains, what it costs, and whether anything is lost.

    python -m bench rebalance --model runs/demo/model --json OUT.json --png OUT.png
    python -m bench rebalance --model runs/demo/model --num-ranks 2 --parts cost --json OUT.json
    python -m bench rebalance --model runs/demo/model --quick

Four parts; `--parts` runs some of them, and keeps the others of an earlier `--json FILE`:

domains  Traffic whose text changes its domain, the same requests to one server after another: `standard`; `rq`
         calibrated on the first domain; the same, and `eplb`, with `--rebalance auto`; `rq` that begins with no
         statistics at all.
armed    A server that plans by the default rule and never moves, in short turns with two that are off: what they
         differ by among themselves is the noise.
cost     Traffic that changes so often that the placement is replaced again and again, on a model of large experts
         (`bench.serving.large_experts`): planning as often and never moving, moving, and the moves made while the
         whole group waits (`bench.serving.stop_the_world`); each in turns with a server that is off.
answers  Greedy answers in fp32 across re-placements, each compared with the dense model's as `soak` does.

The last two let `rq` move as often as it can to whatever it has planned (`bench.serving.restless`), without its gate.
A server decides on fewer steps here than it would by default (`--window`, `--interval`, and EPLB's in the same
proportion), because a phase has some hundred steps. Of large experts, at most two servers are up at a time.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.table import Table

from bench.options import bench_parser
from bench.serving.large_experts import large_experts
from bench.serving.load_generator import Job
from bench.serving.parts import read_options, run_parts
from bench.serving.rebalance_figure import draw
from bench.serving.rebalance_figures import (
    STEP_TOKENS,
    first_within,
    goals,
    imbalance_between,
    latency,
    pairs_at,
    ratio_by_round,
    series,
    share_of_gain,
    spread,
)
from bench.serving.rebalance_workload import Served, Workload, warm_up
from bench.serving.soak import dense_answer, is_right
from rq_ep.commands.console import wide_console
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.topology import Topology
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.rebalancing.replan import moved_bytes

AUTO = ("--rebalance", "auto")
NEVER = ("--rebalance-min-gain", "1000")
PARTS = ("domains", "armed", "cost", "answers")
STOP_THE_WORLD = "bench.serving.stop_the_world"
RESTLESS = "bench.serving.restless:Restless"
LARGE_TOKENS = 2048  # of the calibration of large experts
LARGE_WINDOW = 64  # steps that their placements are planned for: in fewer, few of many experts have tokens
NUM_MIGRATIONS = 20  # that are to happen beside the requests
MORE_ROUNDS = 8  # times as many rounds as asked for, at most, until they have
STRETCHES = 8  # of the part on cost: how often the domain changes in a run
COMPARED = ("p99_itl_ms", "median_itl_ms", "output_throughput")  # figures of two servers that take turns
SLACK = 0.02  # within which a placement counts as good as the calibrated one
QUICK = {
    "num_ranks": 2, "domains": "code,table", "num_prompts": 48, "turns": 2, "rounds": 1, "num_requests": 200,
    "calibration_tokens": 8192, "num_experts": 8, "intermediate_size": 512,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = bench_parser("rebalance", __doc__)
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--text", default=None, help="with a folder for each domain (default: MODEL/text/train)")
    made.add_argument("--domains", default="code,prose,c,table", help="by commas; the first is calibrated on")
    made.add_argument("--parts", default=",".join(PARTS), help="by commas")
    made.add_argument("--num-ranks", type=int, default=4, help="processes of each server")
    made.add_argument("--formats", default="bf16,int8", help="of rq, the native one first")
    made.add_argument("--window", type=int, default=32, help="steps that rq decides on")
    made.add_argument("--interval", type=int, default=16, help="steps between its decisions")
    made.add_argument("--eplb-window", type=int, default=63, help="steps that eplb decides on: 1000 / 16")
    made.add_argument("--eplb-interval", type=int, default=188, help="steps between its decisions: 3000 / 16")
    made.add_argument("--num-prompts", type=int, default=320, help="requests of a domain")
    made.add_argument("--turns", type=int, default=40, help="of each server in the part on a server that is armed")
    made.add_argument(
        "--rounds",
        type=int,
        default=3,
        help=f"of the part on cost; where experts move, until they have {NUM_MIGRATIONS} times",
    )
    made.add_argument("--num-requests", type=int, default=2000, help="of the part on answers")
    made.add_argument("--calibration-tokens", type=int, default=32_768, help="of each domain")
    made.add_argument("--num-experts", type=int, default=256, help="of a layer, in the part on cost")
    made.add_argument("--intermediate-size", type=int, default=4096, help="of experts in the part on cost")
    made.add_argument("--seed", type=int, default=0, help="of the requests")
    made.add_argument("--quick", action="store_true", help=f"does it run? {QUICK}")
    made.add_argument("--json", default=None, help="write every figure there")
    made.add_argument("--png", default=None, help="draw imbalance over what was served there")
    return made


def main(argv: Sequence[str]) -> None:
    """Run the parts; print the table.

    Raises:
        UserError: an option makes no sense, or a server does not start.
    """
    positive = ("num_ranks", "num_prompts", "turns", "rounds", "num_requests")
    options, asked = read_options(parser(), argv, PARTS, positive, QUICK)
    bench = Workload(options)
    parts = {"domains": domains, "armed": armed, "cost": cost, "answers": answers}
    result = run_parts("rebalance", argv, options, asked, {name: partial(parts[name], bench) for name in PARTS})
    show(result)
    if options.png and "domains" in result["parts"]:
        draw(result, options.png)


def domains(bench: Workload) -> dict[str, Any]:
    """Traffic that changes its domain, to one server after another."""
    options, first = bench.options, bench.domains[0]
    stats_file = bench.folder / "first.safetensors"
    bench.stats(first).save(stats_file)
    rq = ["--strategy", "rq", "--placement", bench.calibrated("rq")]
    eplb = ["--strategy", "eplb", "--placement", bench.calibrated("eplb")]

    def live(window: int, interval: int) -> list[str]:
        return [*AUTO, "--rebalance-window", str(window), "--rebalance-interval", str(interval)]

    follows = live(options.window, options.interval)
    jobs = {
        domain: bench.jobs(domain, options.num_prompts, 160, 16, seed=number)
        for number, domain in enumerate(bench.domains)
    }
    rows: list[dict[str, Any]] = []
    ends: dict[str, list[int]] = {}
    states: dict[str, dict[str, Any]] = {}
    servers: dict[str, Served] = {}
    for name, arguments in {
        "standard": ["--strategy", "standard"],
        "rq": rq,
        "eplb live": [*eplb, *live(options.eplb_window, options.eplb_interval)],
        "rq live": [*rq, "--formats", options.formats, "--stats", str(stats_file), *follows],
        "rq live from nothing": ["--strategy", "rq", "--formats", options.formats, *follows],
    }.items():
        with bench.start(name, options.model, *arguments) as served:
            servers[name], ends[name] = served, []
            warm_up(bench, served)
            for domain in bench.domains:
                rows.append({"server": name, "domain": domain, **phase(served, jobs[domain])})
                ends[name].append(served.samples[-1].num_pairs - served.samples[0].num_pairs)
                bench.console.print(f"{name}: {domain}: {brief(rows[-1])}")
            states[name] = served.state()
    moving = [state for state in states.values() if state.get("moved_bytes")]
    sent = sum(state["moved_bytes"] for state in moving)
    planned = sum(one["moved_bytes"] or 0 for state in moving for one in state["commits"])
    nothing = "rq live from nothing"
    return {
        "domains": bench.domains,
        "rows": rows,
        "phase_ends": ends["standard"],
        "series": {name: series(served.samples) for name, served in servers.items()},
        "commits": {
            name: [{**one, "pairs": pairs_at(servers[name].samples, one["time"])} for one in state.get("commits", ())]
            for name, state in states.items()
        },
        "results": {name: state.get("results", {}) for name, state in states.items()},
        "sent_by_planned": sent / planned if planned else 1.0,
        "value": value_after_change(bench, servers["rq live"], rows, ends["rq live"][-2]),
        "from_nothing": way_from_nothing(bench, servers[nothing], ends[nothing][0]),
    }


def phase(served: Served, jobs: Sequence[Job]) -> dict[str, Any]:
    """The figures of a server that gets these requests."""
    first_sample, committed = max(len(served.samples) - 1, 0), len(served.commits)
    found = latency(served.ask(jobs, 16))
    new = served.commits[committed:]
    imbalance = imbalance_between(served.samples[first_sample:])
    moved = sum(one["moved_bytes"] or 0 for one in new)
    return {**found, "imbalance": imbalance, "num_committed": len(new), "moved_bytes": moved}


def value_after_change(
    bench: Workload, served: Served, rows: Sequence[Mapping[str, Any]], change_pairs: float
) -> dict[str, Any]:
    """What the live placement has gained after the last change of domain, for which bytes (R4)."""
    before_domain, domain = bench.domains[-2:]
    planned, held_out = bench.halves(domain)
    moved_by_phase = [row["moved_bytes"] for row in rows if row["server"] == served.name]
    placements = [placement for _, placement in served.placements]
    is_before = [pairs_at(served.samples, at_s) <= change_pairs for at_s, _ in served.placements]
    before, after = placements[max(is_before.count(True) - 1, 0)], placements[-1]
    best = bench.place("rq", planned)
    eplb = [bench.place("eplb", bench.halves(name)[0]) for name in (before_domain, domain)]
    num_ranks = bench.options.num_ranks
    budget_bytes_R = (standard_ep_bytes(planned, num_ranks),) * num_ranks
    problem = PlacementProblem(planned, Topology(num_ranks), budget_bytes_R, bench.formats)
    eplb_bytes = moved_bytes(problem, *eplb)
    figures = [bench.imbalance("rq", placement, held_out) for placement in (before, after, best)]
    return {
        "from": before_domain, "to": domain, "before": figures[0], "after": figures[1], "best": figures[2],
        "share_of_gain": share_of_gain(*figures), "moved_bytes": moved_by_phase[-1], "eplb_bytes": eplb_bytes,
        "fresh_bytes": moved_bytes(problem, before, best),
        "share_of_bytes": moved_by_phase[-1] / eplb_bytes,
        "eplb": [bench.imbalance("eplb", placement, held_out) for placement in eplb],
    }  # fmt: skip


def way_from_nothing(bench: Workload, served: Served, end_pairs: float) -> dict[str, Any]:
    """How soon a server without statistics comes as near to balance as the calibrated placement, in its first phase."""
    planned, held_out = bench.halves(bench.domains[0])
    calibrated = bench.imbalance("rq", bench.place("rq", planned), held_out)
    points = [
        (pairs_at(served.samples, at_s), bench.imbalance("rq", placement, held_out))
        for at_s, placement in served.placements
    ]
    points = [(0.0, points[0][1]), *(point for point in points[1:] if point[0] <= end_pairs)]
    reached = first_within(points, calibrated, SLACK)
    pairs_per_token = (planned.top_k or 1) * planned.num_layers
    return {
        "calibrated": calibrated, "points": points, "last": points[-1][1],
        "steps_of_4096": None if reached is None else reached / pairs_per_token / STEP_TOKENS,
    }  # fmt: skip


def armed(bench: Workload) -> dict[str, Any]:
    """A server that is ready to move, and stays, in short turns with two that are off."""
    options, draw_order = bench.options, random.Random(bench.options.seed)
    rq = ["--strategy", "rq", "--placement", bench.calibrated("rq", bench.formats[:1])]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        settings = {"off": [], "off again": [], "armed": [*AUTO, *NEVER]}
        servers = [stack.enter_context(bench.start(name, options.model, *rq, *more)) for name, more in settings.items()]
        for served in servers:
            warm_up(bench, served)
        for number in range(options.turns):
            jobs = bench.jobs(bench.domains[number % len(bench.domains)], 32, 24, 32, seed=number)
            for served in draw_order.sample(servers, len(servers)):
                rows.append({"server": served.name, "round": number, **latency(served.ask(jobs, 16))})
                bench.console.print(f"turn {number}: {served.name}: {brief(rows[-1])}")
        last = servers[-1]
        return {
            "rows": rows,
            "ratios": {
                figure: {name: ratio_by_round(rows, figure, name, "off") for name in settings} for figure in COMPARED
            },
            "results": last.state()["results"],
            "planner_share": last.planner_s / last.busy_s,
            "num_lost": sum(row["num_lost"] for row in rows),
        }


def cost(bench: Workload) -> dict[str, Any]:
    """Traffic that has the placement replaced again and again, each server in turns with one that never moves.

    Short prompts, as the prefill of long ones reads all experts: a step would take as long as a few moves.
    """
    options = bench.options
    large, placement = bench.folder / "large", bench.folder / "large.json"
    large_experts(large, options.num_experts, options.intermediate_size)
    native = bench.formats[:1]  # low bits may have to move, whatever it gains, when they exceed their cap
    stats = bench.calibrate(large, bench.domains[0], native, LARGE_TOKENS)
    bench.place("rq", stats, native).save(placement)
    rq, restless = (["--strategy", name, "--placement", str(placement)] for name in ("rq", RESTLESS))
    plans_often = [*restless, *AUTO, "--rebalance-window", str(LARGE_WINDOW)]
    ends = (bench.domains[0], bench.domains[-1])
    jobs = [
        job
        for stretch in range(STRETCHES)
        for job in bench.jobs(ends[stretch % 2], max(options.num_prompts // 40, 1), 8, 40, seed=stretch)
    ]
    rows: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    planner_share: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    with bench.start("off", str(large), *rq) as off:
        warm_up(bench, off)
        for name, arguments, module in (
            ("planning", [*plans_often, *NEVER], "rq_ep.serve"),
            ("moving", plans_often, "rq_ep.serve"),
            ("stop-the-world", plans_often, STOP_THE_WORLD),
        ):
            with bench.start(name, str(large), *arguments, module=module) as served:
                warm_up(bench, served)
                for number in range(options.rounds * MORE_ROUNDS):
                    if number >= options.rounds and (name != "moving" or served.num_committed >= NUM_MIGRATIONS):
                        break
                    for one in (off, served) if number % 2 == 0 else (served, off):
                        found = latency(one.ask(jobs, 4))
                        rows.append({"server": one.name, "beside": name, "round": number, **found})
                        bench.console.print(f"{name}, round {number}: {one.name}: {brief(rows[-1])}")
                states[name] = served.state()
                planner_share[name] = served.planner_s / served.busy_s
                peak_bytes[name] = served.peak_bytes
    ratios = {
        figure: {
            name: ratio_by_round([row for row in rows if row["beside"] == name], figure, name, "off") for name in states
        }
        for figure in COMPARED
    }
    offs = [row for row in rows if row["server"] == "off"]
    return {
        "rows": rows,
        "results": {name: state["results"] for name, state in states.items()},
        "num_committed": {name: state["results"].get("committed", 0) for name, state in states.items()},
        "moved_bytes": {name: state["moved_bytes"] for name, state in states.items()},
        "ratios": ratios,
        "noise": {figure: spread([row[figure] for row in offs]) for figure in ratios},
        "longest_gap_ms": {
            name: median(row["longest_gap_ms"] for row in rows if row["server"] == name) for name in ("off", *states)
        },
        "planner_share": planner_share,
        "peak_bytes": peak_bytes,
        "room_bytes": max(stats.expert_bytes.values()),
        "num_lost": sum(row["num_lost"] for row in rows),
    }


def answers(bench: Workload) -> dict[str, Any]:
    """Greedy answers in fp32 across re-placements, compared with the dense model's."""
    options = bench.options
    model = load_whole_model(options.model, torch.float32, torch.device("cpu"))
    model.generation_config.eos_token_id = None  # clients ask to go on after end tokens
    ends = (bench.domains[0], bench.domains[-1])
    kinds = {name: bench.jobs(name, max(min(options.num_requests // 40, 50), 1), 24, 12) for name in ends}
    bench.console.print("answering as the dense model")
    expected = {job: dense_answer(model, job) for jobs in kinds.values() for job in jobs}
    draw_job, stretch = random.Random(options.seed), max(options.num_requests // 40, 1)
    jobs = [draw_job.choice(kinds[ends[at // stretch % 2]]) for at in range(options.num_requests)]
    settings = ["--dtype", "float32", "--strategy", RESTLESS, "--formats", "fp32", "--rebalance", "auto"]
    with bench.start("answers", options.model, *settings) as served:
        got = served.ask(jobs, 16)
        wrong = [answer for answer in got if answer.is_complete and not is_right(answer, expected, bench.tokenizer)]
        return {
            "num_requests": len(jobs), "num_committed": served.num_committed,
            "num_lost": sum(not answer.is_complete for answer in got), "num_wrong": len(wrong),
            "results": served.state().get("results", {}), "moved_bytes": served.state().get("moved_bytes", 0),
            **latency(got),
        }  # fmt: skip


def brief(row: Mapping[str, Any]) -> str:
    shown = f"{row['output_throughput']:.0f} tokens/s, ITL p99 {row['p99_itl_ms']:.0f} ms, longest gap "
    shown += f"{row['longest_gap_ms']:.0f} ms, {row['num_lost']} lost"
    if "imbalance" in row:
        shown = f"max/mean {row['imbalance']:.3f}, {shown}, {row['num_committed']} re-placements"
    return shown


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    parts = result["parts"]
    console = wide_console(140)
    if "domains" in parts:
        table = Table(title="by domain: max/mean, tokens/s, ITL ms p50 / p99 / longest, re-placements")
        for name in ("server", *parts["domains"]["domains"]):
            table.add_column(name)
        for name in parts["domains"]["series"]:
            table.add_row(name, *(cell(row) for row in parts["domains"]["rows"] if row["server"] == name))
        console.print(table)
    table = Table(title=f"{result['options']['num_ranks']} ranks")
    for name in ("", "goal", "reached", "peers"):
        table.add_column(name)
    for goal in goals(parts):
        table.add_row(*goal)
    console.print(table)


def cell(row: Mapping[str, Any]) -> str:
    """The figures of a server in a domain."""
    return (
        f"{row['imbalance']:.3f}, {row['output_throughput']:.0f}, {row['median_itl_ms']:.0f} / {row['p99_itl_ms']:.0f} "
        f"/ {row['longest_gap_ms']:.0f}, {row['num_committed']}"
    )
