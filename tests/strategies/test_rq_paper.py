"""R&Q as published: which expert is replicated, who pays, and how its pairs are split."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.strategies import make_strategy

SIZES = {"bf16": 1000, "int8": 504}
LOADS = [40, 90, 20, 10, 15, 30]  # ranks 0 to 2: 130, 30, 45


def problem(loads: list[int], num_ranks: int = 3, share: float = 1.0, sizes: dict[str, int] | None = None, **fields):  # type: ignore[no-untyped-def]
    stats = ExpertStats(np.array([[loads]], np.int64), ("bf16", "int8"), "bf16", sizes or SIZES, **fields)
    budget = (standard_ep_bytes(stats, num_ranks),) * num_ranks
    return PlacementProblem(stats, Topology(num_ranks), budget, ("bf16", "int8"), max_low_precision_share=share)


def placed(given: PlacementProblem) -> Placement:
    return make_strategy("rq_paper").place(given)


def formats(placement: Placement) -> dict[tuple[int, int], str]:
    return {(replica.expert, replica.rank): replica.format for replica in placement.layers[0].replicas}


def test_the_top_expert_is_replicated_on_the_least_loaded_rank_which_pays_with_its_least_important() -> None:
    # Int8 saves 496 bytes and the replica takes 504: rank 1 stores both of its experts in it.
    placement = placed(problem(LOADS))
    assert formats(placement) == {
        (0, 0): "bf16", (1, 0): "bf16", (1, 1): "int8", (2, 1): "int8", (3, 1): "int8", (4, 2): "bf16", (5, 2): "bf16",
    }  # fmt: skip
    assert placement.bytes_R == (2000, 3 * 504, 2000)
    assert placement.layers[0].replicas.mixed_formats == ("int8", "bf16")
    assert placement.certificate["importance"] == "pairs"
    assert placement.certificate["layers_without_replica"] == []


def test_a_quarter_of_the_bytes_asks_for_one_expert_and_importance_names_it() -> None:
    sizes = {"bf16": 1000, "int8": 250}
    assert [key for key, name in formats(placed(problem(LOADS, sizes=sizes))).items() if name == "int8"] == [
        (1, 1),
        (3, 1),
    ]
    importance = np.array([[5.0, 5, 1, 2, 0, 0]])  # expert 3 has fewer pairs, expert 2 matters less
    placement = placed(problem(LOADS, sizes=sizes, importance=importance))
    assert [key for key, name in formats(placement).items() if name == "int8"] == [(1, 1), (2, 1)]
    assert placement.certificate["importance"] == "importance"


def test_a_rank_with_room_pays_nothing() -> None:
    placement = placed(problem([40, 90, 20, 10, 0]))  # ranks hold 2, 2 and 1
    assert Replica(2, 1, "int8") in list(placement.layers[0].replicas)
    assert [name for name in formats(placement).values() if name == "int8"] == ["int8"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (problem([9, 1, 1], 3), "one expert cannot pay for the replica"),
        (problem([9, 1, 1, 1], 1), "there is no other rank"),
        (problem(LOADS, 3, share=0.3), "half of the top expert and two others have 75 of 205 pairs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_that_cannot_stays_as_it_is_and_is_named(given: PlacementProblem, why: str) -> None:
    placement = placed(given)
    assert set(formats(placement).values()) == {"bf16"}, why
    assert placement.certificate["layers_without_replica"] == [0]


def test_formats_without_few_bits_are_refused() -> None:
    with pytest.raises(UserError, match=r"'rq_paper' stores replicas in few bits, but --formats bf16 .*: add int8"):
        placed(replace(problem(LOADS), formats=("bf16",)))
    with pytest.raises(UserError, match="--max-low-precision-share 0 allow none"):
        placed(problem(LOADS, share=0.0))


def test_pairs_are_split_evenly_by_index_over_all_sources() -> None:
    placement = placed(problem(LOADS))
    layer = placement.layers[0]
    planner = make_strategy("rq_paper").planner(layer, placement.topology)
    counts_RE = np.zeros((3, 6), np.int64)
    counts_RE[:, 1] = [3, 4, 2]
    plan = planner(counts_RE)
    at = {(replica.rank, replica.expert): p for p, replica in enumerate(plan.replicas)}
    # Nine pairs in turns, the int8 replica on rank 1 first: 1 0 1 | 0 1 0 1 | 0 1
    assert plan.pairs_RP[:, at[1, 1]].tolist() == [2, 2, 1]
    assert plan.pairs_RP[:, at[0, 1]].tolist() == [1, 2, 1]


def test_the_file_says_that_formats_mix(tmp_path: Path) -> None:
    placed(problem(LOADS)).save(tmp_path / "placement.json")
    again = Placement.load(tmp_path / "placement.json")
    assert again.layers[0].replicas.mixing_experts == (1,)
    document = json.loads((tmp_path / "placement.json").read_text())
    document["layers"][0]["mixed_formats"] = []
    (tmp_path / "placement.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="replicas of expert 1 mix formats bf16 and int8"):
        Placement.load(tmp_path / "placement.json")
