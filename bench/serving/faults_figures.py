"""Figures of ranks that die, leave and come back, from what was recorded: no server is asked here."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from bench.serving.load_generator import Answer

WATCHED_S = 5.0  # after a kill
BIN_S = 0.25  # of the picture


def pauses_after(answers: Sequence[Answer], at_s: float) -> list[float]:
    """The longest time without a token, from a moment on, of each stream that was under way then."""
    pauses = []
    for answer in answers:
        if answer.sent_s < at_s < answer.end_s:
            times = [at_s, *(one for one in answer.token_s if at_s < one < at_s + WATCHED_S)]
            pauses.append(max((later - earlier for earlier, later in pairwise(times)), default=WATCHED_S))
    return pauses


def mean_of_each(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Mean seconds of what came between two readings, by name; readings are numbers and seconds in all."""
    means = {}
    for name, (number, seconds) in after.items():
        old_number, old_seconds = before.get(name, (0.0, 0.0))
        if number > old_number:
            means[name] = (seconds - old_seconds) / (number - old_number)
    return means


def binned(times_s: Sequence[float]) -> list[int]:
    """How many of these times fall in each `BIN_S`, from 0 on."""
    counts: list[int] = np.bincount((np.array(times_s) / BIN_S).astype(int)).tolist()
    return counts


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, tail and number of some seconds; None: there are none."""
    if not values:
        return None
    return {"median": median(values), "p90": float(np.percentile(values, 90)), "worst": max(values), "num": len(values)}


def goals(parts: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is to be reached, and what was."""
    rows = []
    for name in ("kills", "moving"):
        if name in parts:
            part = parts[name]
            survivors, lost = part["pauses_s"]["survivors"], part["pauses_s"]["lost"]
            reached = f"{part['num_failed']} failed, {part['num_wrong']} wrong of {part['num_answers']}"
            rows.append((f"{name}: {len(part['rows'])} x kill -9", "0 failed, 0 wrong", reached, "requests lost"))
            peers = "SGLang 6.2-6.8 s, EEP 11 + 8 s"
            rows.append(("pause of survivors' streams, median / worst", "1 s / 2 s", _pause(survivors), peers))
            rows.append(("pause of the lost rank's streams", "+ its prefill", _pause(lost), "requests lost"))
            rows.append(("until all ranks serve again", "", _pause(part["back_s"]), ""))
    if "restart" in parts:
        restart_s = parts["restart"]["interruption_s"]["median"]
        reached = f"{restart_s:.1f} s"
        if "kills" in parts and parts["kills"]["pauses_s"]["survivors"]:
            reached += f", {restart_s / parts['kills']['pauses_s']['survivors']['median']:.0f} x"
        rows.append(("whole-group restart, and times of a pause", ">= 10 x", reached, "6.7 x"))
    if "steady" in parts:
        part = parts["steady"]
        reached = f"{part['tokens_ratio']:.3f} (noise {part['noise']:.3f})"
        rows.append(("tokens/s, able to go on / not", ">= 0.99", reached, "EEP 0.956, SGLang 0.982"))
    if "balance" in parts:
        part = parts["balance"]
        rows.append(
            ("max/mean with a rank less, and fresh", "1 %", f"{part['with_fewer']:.3f}, {part['fresh']:.3f}", "-")
        )
        rows.append(("max/mean after its return, and before", "1 %", f"{part['after']:.3f}, {part['before']:.3f}", "-"))
    if "cycles" in parts:
        part = parts["cycles"]
        growth = ", ".join(f"{name} {value:+.1%}" for name, value in part["growth"].items())
        reached = f"{growth}; {part['num_failed']} failed, {part['num_wrong']} wrong of {part['num_answers']}"
        rows.append((f"{len(part['held'])} cycles by requests", "<= 1 %, 0 lost", reached, "-"))
    return rows


def _pause(found: Mapping[str, float] | None) -> str:
    return "none" if found is None else f"{found['median']:.2f} s / {found['worst']:.2f} s ({found['num']:.0f})"
