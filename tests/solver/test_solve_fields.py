"""The solver's further settings: loads, tails, error, rules, candidates, time, processes, a current placement."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rq_ep.solver.objective.denoise_steps as denoise_module
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.expert_weights import loads_SE
from rq_ep.solver.objective.precision import Formats, error_LE
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.solve import solve
from rq_ep.strategies.eplb import eplb_candidates
from rq_ep.strategies.rq import ReplicateQuantize
from tests.solver.instances import RQ, problem, skewed


def recorded(num_experts: int, num_layers: int = 2, num_steps: int = 12, pairs: int = 8000) -> np.ndarray:
    return np.stack([skewed(num_experts, pairs, seed, num_steps) for seed in range(num_layers)], axis=1)


def held_LER(placement: Placement) -> np.ndarray:
    num_ranks = placement.topology.num_ranks
    held = np.zeros((len(placement.layers), placement.layers[0].num_experts, num_ranks), bool)
    for held_ER, layer in zip(held, placement.layers, strict=True):
        held_ER[layer.replicas.experts_P, layer.replicas.ranks_P] = True
    return held


def test_a_load_is_pairs_or_bytes_or_seconds_or_by_phase() -> None:
    counts_SE = np.array([[6, 0, 2], [4, 2, 2]])
    instance = problem(counts_SE[:, None], 2)
    formats, format_E = Formats.of(instance), np.array([0, 0, 1])
    steps = LayerSteps(counts_SE, 2, np.array([0, 1]))

    def loads(**settings: object) -> list[list[float]]:
        changed = replace(instance, **settings)  # type: ignore[arg-type]
        load_SE = loads_SE(changed, formats, steps, format_E)
        np.testing.assert_allclose(load_SE.sum(axis=1), 2)
        return (load_SE / load_SE.max(axis=1, keepdims=True)).round(3).tolist()

    by_pairs, by_bytes = [[1, 0, 0.333], [1, 0.5, 0.5]], [[1, 0, 0.504], [1, 1, 0.504]]
    assert loads() == by_pairs
    assert loads(objective="decode") == by_bytes
    stats = replace(instance.stats, phase=np.array([0, 1]))
    assert loads(objective="mixed", stats=stats) == [by_pairs[0], by_bytes[1]]
    cost = LayerCost({"bf16": 1.0, "int8": 0.75}, {"bf16": 8.0, "int8": 3.0}, {}, 0.0, {"int8": 1.0})
    assert loads(cost=cost) == [[1, 0, 0.25], [1, 0.5, 0.375]]
    assert loads(cost=cost, objective="decode") == [[1, 0, 0.5], [1, 1, 0.5]]


def test_the_chosen_objective_is_what_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise_module, "NOISY", 2.0)  # to judge on the very steps that were placed for
    instance = problem(recorded(16, num_layers=1, pairs=24), 4, formats=("bf16",))  # few pairs: experts stay idle
    (steps,) = calibration_steps(instance, 64)
    variants = [replace(instance, objective=name) for name in ("prefill", "decode")]  # type: ignore[arg-type]
    held = [held_LER(solve(variant, RQ, 64, 600))[0] for variant in variants]
    for own, other in ((0, 1), (1, 0)):
        load_SE = loads_SE(variants[own], Formats.of(instance), steps, np.zeros(16, np.int64))
        assert LayerSplit.of(load_SE, held[own]).value < LayerSplit.of(load_SE, held[other]).value


def test_the_tail_is_lowered_where_it_counts() -> None:
    instance = problem(recorded(16, num_steps=24), 4, formats=("bf16",))
    worst = {weight: solve(replace(instance, tail_weight=weight), RQ, 64, 900).certificate for weight in (0.0, 1.0)}
    assert worst[1.0]["cvar90"] <= worst[0.0]["cvar90"]


def test_the_cap_on_error_is_kept() -> None:
    counts_SLE = recorded(16)
    error = np.zeros((2, 16, 2))
    error[:, :, 1] = np.linspace(0.01, 0.2, 16)
    instance = problem(counts_SLE, 4, notes={"error": error}, max_low_precision_share=0.5)
    loose, tight = (replace(instance, max_error=cap) for cap in (1.0, 0.002))
    low = {}
    for changed in (loose, tight):
        placement = solve(changed, RQ, 64, 60)
        low_LE = np.zeros((2, 16), bool)
        for at, layer in enumerate(placement.layers):
            low_LE[at, [one.expert for one in layer.replicas if one.format == "int8"]] = True
        assert error_LE(changed.stats, "int8")[low_LE].sum() <= changed.max_error
        low[changed.max_error] = int(low_LE.sum())
    assert 0 < low[0.002] < low[1.0]


@pytest.mark.parametrize("room", [0, 1000, 2600])
def test_never_worse_than_eplb_in_as_many_bytes(room: int) -> None:
    for seed in range(3):
        counts_SLE = np.stack([skewed(12, 3000, seed + layer, 8) for layer in range(2)], axis=1)
        instance = problem(counts_SLE, 4, budget=(2 * 3000 + 2 * room,) * 4, formats=("bf16",))
        steps = calibration_steps(instance, 64)
        placement = ReplicateQuantize(max_moves=30).place(instance)
        values = []
        for layers in eplb_candidates(instance):
            held = np.zeros((2, 12, 4), bool)
            for held_ER, layer in zip(held, layers, strict=True):
                held_ER[layer.replicas.experts_P, layer.replicas.ranks_P] = True
            values.append(np.mean([LayerSplit.of(of.loads_SE, held_ER).value for of, held_ER in zip(steps, held)]))
        mine = np.mean([LayerSplit.of(of.loads_SE, held_ER).value for of, held_ER in zip(steps, held_LER(placement))])
        assert mine <= max(min(values), 1.0005) + 1e-4


def test_rules_are_kept() -> None:
    rules = Rules(
        fixed=(Selection(experts=(0,), ranks=(1, 2)),), forbidden=(Selection(experts=tuple(range(8)), ranks=(3,)),),
        spread_nodes=True,
    )  # fmt: skip
    instance = replace(problem(recorded(16), 4, budget=(11_000,) * 4, rules=rules), topology=Topology(4, 2))
    placement = solve(instance, RQ, 64, 400)
    rules.check(held_LER(placement), instance.stats, instance.topology, "the placement")
    assert placement.certificate["predicted"] < placement.certificate["standard"]


def test_fixed_replicas_that_do_not_fit_are_refused_with_what_would() -> None:
    rules = Rules(fixed=(Selection(ranks=(0,)),))
    instance = problem(recorded(8), 2, formats=("bf16",), rules=rules)
    with pytest.raises(UserError, match="raise it to 16000 bytes per rank"):
        solve(instance, RQ, 64, 10)


def test_out_of_time_there_is_a_placement_all_the_same() -> None:
    instance = replace(problem(recorded(16), 4), time_limit_s=0.0)
    hurried = solve(instance, RQ, 64, 10**9)
    assert hurried.certificate["predicted"] <= hurried.certificate["standard"]


def test_workers_do_not_change_a_bit_of_the_answer(tmp_path: Path) -> None:
    instance = problem(recorded(20, num_layers=3, pairs=60), 10)
    for number in (1, 2):
        solve(replace(instance, num_workers=number), RQ, 64, 300).save(tmp_path / f"{number}.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_from_a_current_placement_no_more_moves_than_pay_or_than_may() -> None:
    before = solve(problem(recorded(16), 4), RQ, 64, 300)
    instance = problem(recorded(16)[:, ::-1].copy(), 4)  # the layers change places: much is wrong now
    held = held_LER(before)

    def again(**settings: float) -> tuple[Placement, int]:
        placement = solve(replace(instance, **settings), RQ, 64, 300, before)  # type: ignore[arg-type]
        sizes = {"bf16": 1000, "int8": 504}
        moved = sum(
            sizes[one.format]
            for at, layer in enumerate(placement.layers)
            for one in layer.replicas
            if not held[at, one.expert, one.rank]
        )
        return placement, moved

    free, much = again()
    capped, some = again(max_moved_bytes=3000)
    dear, none = again(move_price=1e3)
    assert much > 3000 >= some > 0 == none
    np.testing.assert_array_equal(held_LER(dear), held)
    values = [placement.certificate["predicted"] for placement in (free, capped, dear)]
    assert values == sorted(values)
    assert values[0] < values[2]
    # Where ranks hold nothing of it, to stay moves as much as to change.
    changed = solve(replace(instance, move_price=1e3, held=[[]] * len(before.layers)), RQ, 64, 300, before)
    assert changed.certificate["predicted"] < values[2]
    assert sum(changed.bytes_R) <= sum(before.bytes_R)


def test_experts_of_a_lost_rank_are_placed_again() -> None:
    before = solve(problem(recorded(16), 4), RQ, 64, 300)
    instance = problem(recorded(16), 4, budget=(12_000, 12_000, 12_000, 0))
    after = solve(instance, RQ, 64, 300, before)
    assert after.bytes_R[3] == 0
    assert held_LER(after).any(axis=2).all()
    with pytest.raises(UserError, match="--formats bf16: the current placement uses bf16,int8"):
        solve(replace(instance, formats=("bf16",)), RQ, 64, 300, before)
