"""Figures of re-placement while serving, from what was recorded: no server is asked here.

Axes: L layers, R ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.serving.load_generator import Answer, figures

STEP_TOKENS = 4096  # of the steps in which the way from nothing is counted


@dataclass(frozen=True)
class LoadSample:
    """What a server has computed since its start."""

    time_s: float  # since the epoch
    num_calls_L: tuple[int, ...]  # steps
    imbalance_L: tuple[float, ...]  # max/mean over ranks, mean of these steps
    pairs_LR: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, time_s: float, total: Mapping[str, Any]) -> "LoadSample":
        """The sample in the `total` of `/v1/ep/load`."""
        pairs_LR = tuple(tuple(pairs_R) for pairs_R in total["pairs_LR"])
        return cls(time_s, tuple(total["num_calls_L"]), tuple(total["imbalance_L"]), pairs_LR)

    @property
    def num_pairs(self) -> int:
        """Routed pairs, of all layers."""
        return sum(map(sum, self.pairs_LR))


class Interval(NamedTuple):
    """What a server has computed between two samples."""

    time_s: float  # of its end
    steps: float
    pairs: int
    imbalance: float  # max/mean over ranks, mean of the steps and layers
    load: float  # max/mean over ranks of the pairs of all its steps, mean over layers


def intervals(samples: Sequence[LoadSample], min_pairs: int = 1) -> list[Interval]:
    """Intervals in which every layer was called, and so many pairs were routed; shorter ones are joined to the next."""
    found = []
    before = samples[0] if samples else None
    for after in samples[1:]:
        assert before is not None
        calls_L = np.subtract(after.num_calls_L, before.num_calls_L)
        pairs_LR = np.subtract(after.pairs_LR, before.pairs_LR)
        if not calls_L.all() or pairs_LR.sum() < min_pairs:
            continue
        sums = [np.multiply(one.imbalance_L, one.num_calls_L) for one in (before, after)]
        imbalance = float(((sums[1] - sums[0]) / calls_L).mean())
        load = float((pairs_LR.max(axis=1) / pairs_LR.mean(axis=1)).mean())
        found.append(Interval(after.time_s, float(calls_L.mean()), int(pairs_LR.sum()), imbalance, load))
        before = after
    return found


def series(samples: Sequence[LoadSample]) -> list[dict[str, float]]:
    """Load over what was served: intervals of a hundredth of all pairs or more, with pairs and steps so far."""
    total = samples[-1].num_pairs - samples[0].num_pairs if samples else 0
    pairs, steps, rows = 0, 0.0, []
    for one in intervals(samples, max(total // 100, 1)):
        pairs, steps = pairs + one.pairs, steps + one.steps
        rows.append({"pairs": pairs, "steps": steps, "imbalance": one.imbalance, "load": one.load})
    return rows


def pairs_at(samples: Sequence[LoadSample], time_s: float) -> float:
    """Routed pairs since the first sample, at a time between two samples."""
    pairs = [one.num_pairs - samples[0].num_pairs for one in samples]
    return float(np.interp(time_s, [one.time_s for one in samples], pairs))


def imbalance_between(samples: Sequence[LoadSample]) -> float:
    """max/mean over ranks of single steps, mean of all steps and layers between the first and the last sample."""
    parts = intervals([*samples[:1], *samples[-1:]])
    return parts[0].imbalance if parts else 1.0


def latency(answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput, tails and losses of some requests; times in milliseconds."""
    found = figures(answers)
    gaps_s = [gap for answer in answers for gap in np.diff(answer.token_s)]
    return {
        "output_throughput": found["output_throughput"],
        "total_token_throughput": found["total_token_throughput"],
        "median_itl_ms": found.get("median_itl_ms", 0.0),
        "p99_itl_ms": found.get("p99_itl_ms", 0.0),
        "longest_gap_ms": 1e3 * max(gaps_s, default=0.0),
        "num_requests": len(answers),
        "num_lost": sum(not answer.is_complete for answer in answers),
        "errors": sorted({answer.error for answer in answers if answer.error})[:3],
        "duration_s": found["duration"],
    }


def ratio_by_round(rows: Sequence[Mapping[str, Any]], figure: str, server: str, base: str) -> float:
    """Median over rounds of the ratio of a figure of two servers in the same round."""
    by_key = {(row["server"], row["round"]): row[figure] for row in rows}
    return float(median(by_key[server, number] / by_key[base, number] for name, number in by_key if name == server))


def spread(values: Sequence[float]) -> float:
    """By which factor two successive runs of the same server differ: the noise floor of a ratio, as a median."""
    return median(max(one / other, other / one) for one, other in pairwise(values)) if len(values) > 1 else 1.0


def share_of_gain(before: float, after: float, best: float) -> float:
    """The share of the gain from `before` to `best` that `after` has; 1 where there is nothing to gain."""
    return (before - after) / (before - best) if before > best else 1.0


def first_within(points: Sequence[tuple[float, float]], goal: float, slack: float) -> float | None:
    """Where a curve comes within `slack` of the goal to stay; None: it does not.

    Args:
        points: (where, value), in their order.
        goal: smaller is better.
        slack: by which it may be missed.
    """
    reached = None
    for where, value in points:
        if value > goal + slack:
            reached = None
        elif reached is None:
            reached = where
    return reached


class Goal(NamedTuple):
    """A line of the table: what was to be reached, and what was."""

    name: str
    goal: str
    reached: str
    peers: str


def goals(parts: Mapping[str, Any]) -> list[Goal]:
    """The lines for those parts of the bench that were run."""
    return [
        *(_armed_goals(parts["armed"]) if "armed" in parts else ()),
        *(_cost_goals(parts["cost"]) if "cost" in parts else ()),
        *(_answer_goals(parts["answers"]) if "answers" in parts else ()),
        *(_domain_goals(parts["domains"]) if "domains" in parts else ()),
    ]


def _armed_goals(part: Mapping[str, Any]) -> list[Goal]:
    throughput = part["ratios"]["output_throughput"]
    turns = 1 + max(row["round"] for row in part["rows"])
    return [
        Goal(
            f"R1 tokens/s, armed and idle / off, median of {turns} turns",
            ">= 0.99",
            f"{throughput['armed']:.3f}; another server that is off / off {throughput['off again']:.3f}",
            "vLLM: one all-reduce a step",
        )
    ]


def _cost_goals(part: Mapping[str, Any]) -> list[Goal]:
    itl, noise, gaps_ms = part["ratios"]["p99_itl_ms"], part["noise"], part["longest_gap_ms"]
    return [
        Goal(
            f"R1 p99 ITL while {part['num_committed']['moving']} re-placements happen / without moves",
            "<= 1.10",
            f"{itl['moving']:.2f}; planning alone {itl['planning']:.2f}, so moves "
            f"{itl['moving'] / itl['planning']:.2f}; two runs of the same server differ by {noise['p99_itl_ms']:.2f}",
            "vLLM async 0.96-1.03",
        ),
        Goal(
            "R1 longest gap / stop-the-world's",
            "<= 0.1",
            f"{gaps_ms['moving'] / gaps_ms['stop-the-world']:.2f} ({gaps_ms['moving']:.0f} / "
            f"{gaps_ms['stop-the-world']:.0f} ms), and {gaps_ms['off'] / gaps_ms['stop-the-world']:.2f} without moves "
            f"({gaps_ms['off']:.0f} ms): moves add "
            f"{(gaps_ms['moving'] - gaps_ms['off']) / gaps_ms['stop-the-world']:.2f}",
            "vLLM sync stalls 0.9 s",
        ),
        Goal(
            "R3 memory of the rank that has most, beside that of one that plans as often and stays",
            f"<= {part['room_bytes'] / 2**20:.0f} MiB",
            f"{(part['peak_bytes']['moving'] - part['peak_bytes']['planning']) / 2**20:+.0f} MiB",
            "one whole layer's experts",
        ),
        Goal("planner's CPU, of one core, deciding every 16 steps", "-", f"{part['planner_share']['moving']:.1%}", "-"),
    ]


def _answer_goals(part: Mapping[str, Any]) -> list[Goal]:
    return [
        Goal(
            f"R2 answers in fp32, {part['num_requests']:,} requests across {part['num_committed']} re-placements",
            "0 lost, 0 wrong",
            f"{part['num_lost']} lost, {part['num_wrong']} wrong",
            "-",
        )
    ]


def _domain_goals(part: Mapping[str, Any]) -> list[Goal]:
    value, nothing = part["value"], part["from_nothing"]
    steps = nothing["steps_of_4096"]
    return [
        Goal("R3 bytes sent / planned", "1", f"{part['sent_by_planned']:.3f}", "one whole layer's experts"),
        Goal(
            f"R4 after {value['from']} -> {value['to']}: share of a fresh solve's gain, for the share of the bytes "
            "of EPLB's map change",
            ">= 90 % for <= 20 %",
            f"{value['share_of_gain']:.0%} for {value['share_of_bytes']:.0%}",
            "19 % (INET4AI'25)",
        ),
        Goal(
            f"from nothing to within 0.02 of the calibrated placement ({nothing['calibrated']:.3f})",
            "<= 200 steps of 4,096 tokens",
            f"not reached ({nothing['last']:.3f})" if steps is None else f"{steps:.0f} steps",
            "R&Q: a calibration set",
        ),
    ]
