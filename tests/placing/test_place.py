"""The verb `place` and how a budget is written."""

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ExpertStats
from rq_ep.placing.place import parse_budget, place
from rq_ep.strategies import STRATEGIES, make_strategy


@pytest.fixture
def stats() -> ExpertStats:
    counts_SLE = np.tile(np.array([400, 100, 100, 50, 50, 50, 30, 20]), (4, 2, 1))
    return ExpertStats(counts_SLE, ("bf16", "int8"), "bf16", {"bf16": 1000, "int8": 504}, top_k=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ep", (4000,) * 4),
        ("EP", (4000,) * 4),
        ("5000", (5000,) * 4),
        ("80GiB", (80 * 2**30,) * 4),
        ("80 gib", (80 * 2**30,) * 4),
        ("1.5MiB", (3 * 2**19,) * 4),
        ("2GB", (2 * 10**9,) * 4),
        ("1KiB,2KiB,3000,4MB", (1024, 2048, 3000, 4_000_000)),
    ],
)
def test_budgets(stats: ExpertStats, text: str, expected: tuple[int, ...]) -> None:
    assert parse_budget(text, stats, 4) == expected


@pytest.mark.parametrize("text", ["", "lots", "80 gigs", "-5", "1e9", "0", "1KiB,,2KiB", "1,2,3", "0.1"])
def test_what_is_not_a_budget(stats: ExpertStats, text: str) -> None:
    with pytest.raises(UserError, match=f"--budget {text}"):
        parse_budget(text, stats, 4)


def test_places_from_a_file_with_defaults(stats: ExpertStats, tmp_path) -> None:  # type: ignore[no-untyped-def]
    stats.save(tmp_path / "stats.safetensors")
    placement = place(tmp_path / "stats.safetensors", 4)
    assert placement.strategy == "rq"
    assert placement.budget_bytes_R == (4000,) * 4
    assert placement.low_precision_cap == 0.25
    placement.save(tmp_path / "placement.json")
    again = Placement.load(tmp_path / "placement.json")
    assert again.certificate == dict(placement.certificate)
    assert [list(layer.replicas) for layer in again.layers] == [list(layer.replicas) for layer in placement.layers]


@pytest.mark.parametrize("budget", [4500, [4500, 4500, 4000, 4000], None])
def test_budgets_in_python(stats: ExpertStats, budget: int | list[int] | None) -> None:
    placement = place(stats, 4, budget)
    expected = None if budget is None else tuple([4500] * 4 if isinstance(budget, int) else budget)
    assert placement.budget_bytes_R == expected


@pytest.mark.parametrize("name", ["standard", "llep"])
def test_strategies_that_do_not_replicate_place_contiguous_blocks(stats: ExpertStats, name: str) -> None:
    for layer in place(stats, 4, strategy=name).layers:
        assert list(layer.replicas) == [(expert // 2, expert, "bf16") for expert in range(8)]


def test_redundant_experts_do_not_fit_the_bytes_of_standard_ep(stats: ExpertStats) -> None:
    with pytest.raises(UserError, match=r"--num-redundant-experts 4 needs more bytes than --budget ep.*to 6000"):
        place(stats, 4, strategy="eplb", num_redundant_experts=4)
    assert place(stats, 4, 6000, strategy="eplb", num_redundant_experts=4).bytes_R == (6000,) * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "eplp"}, "did you mean 'eplb'"),
        ({"num_ranks": 0}, "--num-ranks 0"),
        ({"formats": ("bf16", "int4")}, "no sizes for int4"),
        ({"formats": ("int8",)}, "must name the native format bf16"),
        ({"max_low_precision_share": 1.5}, "--max-low-precision-share 1.5"),
        ({"tokens_per_step": 0}, "--tokens-per-step 0"),
        ({"num_redundant_experts": -1, "strategy": "eplb"}, "--num-redundant-experts -1"),
        ({"num_redundant_experts": 4}, "--num-redundant-experts 4: only eplb counts replicas; strategy 'rq'"),
        ({"budget": [1, 2]}, "names 2 ranks"),
    ],
)
def test_wrong_arguments_are_named(stats: ExpertStats, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        place(stats, **{"num_ranks": 4, **wrong})


def test_nothing_to_place() -> None:
    empty = ExpertStats(np.zeros((2, 0, 4), np.int64), ("bf16",), "bf16", {"bf16": 10})
    with pytest.raises(UserError, match="0 MoE layers"):
        place(empty, 2)


def test_scaling_steps_needs_their_size() -> None:
    unknown = ExpertStats(np.ones((2, 1, 4), np.int64), ("bf16",), "bf16", {"bf16": 10})
    with pytest.raises(UserError, match="neither tokens nor top_k"):
        place(unknown, 2, tokens_per_step=8)


def test_standard_refuses_a_placement_with_replicas(stats: ExpertStats) -> None:
    placement = place(stats, 4, None)
    with pytest.raises(UserError, match="serves one replica of each expert"):
        make_strategy("standard").planner(placement.layers[0], placement.topology)


def test_strategies_are_made_by_name() -> None:
    assert {name: kind.name for name, kind in STRATEGIES.items()} == {name: name for name in STRATEGIES}
    with pytest.raises(UserError, match="did you mean 'max_tokens_factor'"):
        make_strategy("llep", max_token_factor=1.0)
