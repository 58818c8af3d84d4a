"""Rules, uneven budgets and caps reach the search, and what comes out is checked against them."""

from typing import Any

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.stats import ExpertStats
from rq_ep.placing.place import place
from tests.solver.instances import skewed

SIZES = {"bf16": 1000, "int8": 504}


def recorded(**notes: Any) -> ExpertStats:
    counts = np.stack([skewed(16, 900, layer, 20) for layer in range(2)], axis=1)
    return ExpertStats(counts, ("bf16", "int8"), "bf16", SIZES, layers=(3, 7), top_k=2, **notes)


def held_LER(placement: Placement) -> np.ndarray:
    held = np.zeros((len(placement.layers), placement.layers[0].num_experts, placement.topology.num_ranks), bool)
    for at, layer in enumerate(placement.layers):
        held[at, layer.replicas.experts_P, layer.replicas.ranks_P] = True
    return held


def test_replicas_stand_on_different_nodes_and_outlive_one() -> None:
    spread = place(recorded(), 8, 5000, ranks_per_node=2, rules=Rules(spread_nodes=True), formats=["bf16"])
    per_node = held_LER(spread).reshape(2, 16, 4, 2).sum(axis=3)
    copies = per_node.sum(axis=2)
    assert (copies > 1).any()
    assert (per_node <= -(-copies // 4)[:, :, None]).all()
    assert (per_node[copies > 1] < copies[copies > 1][:, None]).all(), "no node holds all of a replicated expert"


def test_what_is_fixed_is_there_and_what_is_forbidden_is_not() -> None:
    rules = Rules(
        fixed=(Selection((3,), (0, 5), (2,)), Selection((7,), (1,), (0, 3))),
        forbidden=(Selection(None, tuple(range(8, 16)), (1,)),),
    )
    held = held_LER(place(recorded(), 4, 9000, rules=rules))
    assert held[0, [0, 5], 2].all()
    assert held[1, 1, [0, 3]].all()
    assert not held[:, 8:, 1].any()


def test_whole_groups_share_a_node() -> None:
    placement = place(recorded(expert_groups=4), 4, 9000, ranks_per_node=2, rules=Rules(whole_groups=True))
    on_node = held_LER(placement).reshape(2, 4, 4, 2, 2).any(axis=(2, 4))  # layer, group, node
    assert (on_node.sum(axis=2) == 1).all()


@pytest.mark.parametrize("strategy", ["rq", "rq_llep"])
def test_a_drained_rank_holds_nothing_and_the_bound_knows(strategy: str) -> None:
    placement = place(recorded(), 4, "12KB,12KB,0,10KB", strategy=strategy)
    assert placement.bytes_R[2] == 0
    assert placement.certificate["bound"] >= 4 / 3 - 1e-9
    assert placement.certificate["load"][2] == 0
    assert all(used <= limit for used, limit in zip(placement.bytes_R, (12_000, 12_000, 0, 10_000), strict=True))


def test_a_cap_on_error_holds() -> None:
    generator = np.random.default_rng(0)
    stats = recorded(
        error=np.stack([np.zeros((2, 16)), generator.random((2, 16)) * 0.1], axis=2),
        importance=generator.random((2, 16)),
    )
    shares = []
    for cap in (0.0, 0.002, 1.0):
        placement = place(stats, 4, 9000, max_error=cap, max_low_precision_share=0.5)
        low_LE = np.zeros((2, 16), bool)
        for at, layer in enumerate(placement.layers):
            low_LE[at, [one.expert for one in layer.replicas if one.format == "int8"]] = True
        weighted = stats.importance * stats.error[:, :, 1]  # type: ignore[operator,index]
        assert weighted[low_LE].sum() / stats.importance.sum() <= cap + 1e-12  # type: ignore[union-attr]
        shares.append(low_LE.sum())
    assert shares == sorted(shares)
    assert shares[0] == 0


def test_rules_that_cannot_be_kept_are_refused() -> None:
    rules = Rules(fixed=(Selection(None, None, (0,)),))
    with pytest.raises(UserError, match=r"--budget .*too small|exceed its budget"):
        place(recorded(), 4, rules=rules)
