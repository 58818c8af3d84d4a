"""Placing where a placement serves already: staying, moving within limits, ranks that come, go or are lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.moves import Moves
from rq_ep.core.placement import Placement
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.placing.place import place
from rq_ep.solver.migration.warm_start import LOW_SLACK, moves_to
from tests.solver.instances import skewed

SIZES = {"bf16": 1000, "int8": 504}
NATIVE = {"max_low_precision_share": 0.0, "budget": 5500}


def recorded(seed: int = 0, num_steps: int = 20) -> ExpertStats:
    counts = np.stack([skewed(8, 900, 10 * seed + layer, num_steps) for layer in range(2)], axis=1)
    return ExpertStats(counts, ("bf16", "int8"), "bf16", SIZES, layers=(3, 7), top_k=2)


def placed(stats: ExpertStats, num_ranks: int = 4, **options: Any) -> Placement:
    return place(stats, num_ranks, **{**NATIVE, **options})


def same(one: Placement, other: Placement) -> bool:
    return [list(layer.replicas) for layer in one.layers] == [list(layer.replicas) for layer in other.layers]


def migration(placement: Placement) -> dict[str, Any]:
    choice: dict[str, Any] = placement.certificate["replaced"]
    return choice


def test_the_same_load_moves_nothing(tmp_path: Path) -> None:
    stats = recorded()
    current = placed(stats)
    current.save(tmp_path / "current.json")
    again = placed(stats, current=tmp_path / "current.json")
    assert same(again, current)
    assert (migration(again)["choice"], migration(again)["moved_bytes"]) == ("stayed", 0)
    assert moves_to(again, current, stats).layers == ()


def test_a_new_load_is_worth_moving_for_and_what_moves_is_counted() -> None:
    current, stats = placed(recorded(0)), recorded(1)
    new = placed(stats, current=current)
    assert migration(new)["choice"] != "stayed"
    assert new.certificate["predicted"] <= migration(new)["staying"] - 0.01
    moves = moves_to(new, current, stats)
    assert moves.received_bytes_R(SIZES).sum() == migration(new)["moved_bytes"] > 0


def test_an_expert_in_two_formats_does_not_stay_where_the_strategy_does_not_split_it() -> None:
    stats = recorded(0)
    current = place(stats, 4, strategy="rq_paper", max_low_precision_share=1.0)
    assert any(layer.replicas.mixing_experts for layer in current.layers)
    after = place(stats, 4, max_low_precision_share=1.0, current=current)
    assert not any(layer.replicas.mixing_experts for layer in after.layers)
    assert migration(after)["refused"] == "it stores an expert in several formats, which rq does not split"


def test_staying_is_preferred_where_the_gain_or_the_price_says_so() -> None:
    current, stats = placed(recorded(0)), recorded(1)
    for options in ({"min_gain": 10.0}, {"move_price": 1000.0, "min_gain": 0.0}):
        again = placed(stats, current=current, **options)
        assert migration(again)["choice"] == "stayed"
        assert same(again, current)


@pytest.mark.slow
def test_no_more_moves_than_allowed_and_more_bytes_never_hurt() -> None:
    current, stats = placed(recorded(0)), recorded(1)
    predicted = []
    for cap in (0, 2000, 6000, 20_000):
        new = placed(stats, current=current, max_moved_bytes=cap, min_gain=0.0)
        assert moves_to(new, current, stats).received_bytes_R(SIZES).sum() <= cap
        predicted.append(new.certificate["predicted"])
    assert predicted == sorted(predicted, reverse=True)
    assert predicted[0] > predicted[-1]


def test_the_cap_on_low_pairs_holds_on_the_new_load_for_few_bytes() -> None:
    current, before = place(recorded(0), 4), recorded(0)
    counts = before.counts.copy()
    for at, layer in enumerate(current.layers):
        counts[:, at, sorted({one.expert for one in layer.replicas if one.format == "int8"})] *= 4  # they warm up
    stats = replace(before, counts=counts)
    assert _low_share(current, stats) > 0.3
    whole = place(stats, 4, current=current, min_gain=0.0)
    cheap = place(stats, 4, current=current, move_price=2.0)
    for new in (whole, cheap):
        assert "in low precision" in migration(new)["refused"]
        assert _low_share(new, stats) == pytest.approx(new.low_precision_planned)
        assert new.low_precision_planned <= 0.25 + LOW_SLACK
        moves_to(new, current, stats)
    assert migration(cheap)["moved_bytes"] < migration(whole)["moved_bytes"] / 2
    assert cheap.certificate["predicted"] >= whole.certificate["predicted"]


def _low_share(placement: Placement, stats: ExpertStats) -> float:
    pairs_LE = stats.counts.sum(axis=0)
    low = sum(layer.low_pairs(pairs_E, "bf16") for layer, pairs_E in zip(placement.layers, pairs_LE, strict=True))
    return low / int(pairs_LE.sum())


@pytest.mark.parametrize("num_ranks", [3, 5, 8])
def test_other_numbers_of_ranks(num_ranks: int, tmp_path: Path) -> None:
    stats, current = recorded(), placed(recorded())
    new = placed(stats, num_ranks, budget=8000, current=current)
    moves = moves_to(new, current, stats)
    assert new.topology.num_ranks == moves.num_ranks == num_ranks
    assert moves.previous_ranks == {3: (), 5: (0, 1, 2, 3, None), 8: (0, 1, 2, 3, *[None] * 4)}[num_ranks]
    moves.save(tmp_path / "moves.json")
    assert Moves.load(tmp_path / "moves.json") == moves
    fresh = placed(stats, num_ranks, budget=8000)
    assert moves.received_bytes_R(SIZES).sum() <= moves_to(fresh, current, stats).received_bytes_R(SIZES).sum()


def test_a_lost_ranks_experts_are_found_again() -> None:
    stats, current = recorded(), placed(recorded())
    new = placed(stats, 3, budget=8000, current=current, lost_ranks=[1])
    moves = moves_to(new, current, stats, [1])
    assert moves.previous_ranks == (0, 2, 3)
    left = [{one.expert for one in layer.replicas if one.rank != 1} for layer in current.layers]
    assert any(len(experts) < 8 for experts in left), "some were nowhere else"
    for layer in moves.layers:
        for move in layer.moves:
            if move.do == "receive":
                gone = move.expert not in left[stats.layers.index(layer.index)]
                assert (move.source is None) == gone, "the checkpoint is read only where no replica is left"


def test_a_budget_too_small_for_the_current_placement_moves() -> None:
    stats = recorded()
    current = placed(stats, budget=8000)
    new = placed(stats, budget=4200, current=current)
    assert migration(new)["staying"] is None
    assert "exceed its budget of 4200" in migration(new)["refused"]


def test_rules_are_kept_and_a_current_placement_that_breaks_them_goes() -> None:
    stats = recorded()
    current = place(stats, 4, strategy="standard")
    rules = Rules(fixed=(Selection((3,), (0,), (0,)),))
    assert migration(place(stats, 4, strategy="standard", current=current, rules=rules))["choice"] == "stayed"
    with pytest.raises(UserError, match="expert 0 of layer 3 on rank 0 is not allowed"):
        place(stats, 4, strategy="standard", current=current, rules=Rules(forbidden=(Selection((3,), (0,), (0,)),)))


def test_a_strategy_without_replicas_does_not_keep_those_of_another() -> None:
    stats = recorded()
    current = place(stats, 4, 6000, strategy="eplb", num_redundant_experts=4)
    again = place(stats, 4, 6000, strategy="standard", current=current)
    assert migration(again)["staying"] is None
    assert "standard serves one replica of each expert" in migration(again)["refused"]
    assert (
        migration(place(stats, 4, 6000, strategy="eplb", num_redundant_experts=4, current=current))["choice"]
        == "stayed"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lost_ranks": [4]}, "--lost-ranks 4: the current placement has ranks 0 to 3"),
        ({"lost_ranks": [0, 1, 2, 3]}, "all 4 ranks are lost"),
        ({"min_gain": -1.0}, "--min-gain -1.0: must be at least 0"),
        ({"current": None, "move_price": 1.0}, "speak of the way from --current"),
        ({"current": None, "lost_ranks": [1]}, "speak of the way from --current"),
        ({"budget": 4100, "max_moved_bytes": 1}, "--max-moved-bytes 1: no placement found .* the nearest takes"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    stats = recorded()
    current = placed(stats, budget=9000, formats=("bf16",))
    with pytest.raises(UserError, match=message):
        placed(stats, **{"current": current, **options})


def test_a_placement_of_another_model_is_refused() -> None:
    stats, current = recorded(), placed(recorded())
    other = replace(stats, model=ModelIdentity("b", "2"))
    with pytest.raises(UserError, match="the current placement was made for model 'a'"):
        placed(other, current=replace(current, model=ModelIdentity("a", "1")))
    with pytest.raises(UserError, match="experts per layer"):
        placed(replace(stats, layers=(3, 8)), current=current)
    with pytest.raises(UserError, match=r"claims \d+ expert bytes"):
        placed(replace(stats, expert_bytes={"bf16": 999, "int8": 504}), current=current)
