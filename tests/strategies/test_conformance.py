"""What holds for every strategy, on every load; `pytest --strategy package.module:Class` checks another one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.strategies import make_strategy, setting_names, strategy_class
from tests.strategies.cases import CASES, EXPERT_BYTES, Case
from tests.strategies.conformance import check_planners

# Settings that make small cases lend, of the strategies that have them.
EAGER = {"min_tokens_per_gemm": 4, "fallback_ratio": 1.0}


def strategy_of(name: str) -> Strategy:
    known = setting_names(strategy_class(name))
    return make_strategy(name, **{setting: value for setting, value in EAGER.items() if setting in known})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_places_within_the_bytes_of_standard_ep_and_plans_every_pair_once(strategy_name: str, case: Case) -> None:
    strategy = strategy_of(strategy_name)
    problem = case.problem()
    placement = strategy.place(problem)
    assert placement.strategy == strategy_name
    assert max(placement.bytes_R) <= problem.budget_bytes_R[0]
    assert placement.low_precision_planned <= problem.max_low_precision_share
    sizes_R = np.zeros(case.num_ranks, np.int64)
    for layer in placement.layers:
        assert set(layer.replicas.experts_P.tolist()) == set(range(layer.num_experts))
        for replica in layer.replicas:
            sizes_R[replica.rank] += EXPERT_BYTES[replica.format]
        check_planners(strategy, layer, problem.topology, case.counts_RE)
    assert placement.bytes_R == tuple(sizes_R.tolist())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_places_redundant_experts_where_bytes_are_not_limited(strategy_name: str, case: Case) -> None:
    strategy = strategy_of(strategy_name)
    redundant = case.num_ranks if strategy.counts_replicas else 0
    problem = case.problem(unlimited=True, num_redundant_experts=redundant)
    placement = strategy.place(problem)
    if strategy.counts_replicas:
        num_experts = problem.stats.num_experts
        expected = min(num_experts + redundant, num_experts * case.num_ranks)
        assert [len(layer.replicas) for layer in placement.layers] == [expected] * len(placement.layers)
    for layer in placement.layers:
        check_planners(strategy, layer, problem.topology, case.counts_RE)


def test_places_the_same_twice_and_leaves_statistics_alone(strategy_name: str, tmp_path: Path) -> None:
    case = CASES[1]
    before = case.counts_SLE.copy()
    texts = []
    for number in range(2):
        strategy_of(strategy_name).place(case.problem()).save(tmp_path / f"{number}.json")
        texts.append((tmp_path / f"{number}.json").read_text())
    assert texts[0] == texts[1]
    np.testing.assert_array_equal(case.counts_SLE, before)
    assert Placement.load(tmp_path / "0.json").strategy == strategy_name


@st.composite
def layers_and_counts(draw: st.DrawFn) -> tuple[LayerPlacement, Topology, np.ndarray]:
    """Any layer with one or more replicas of each expert, and any counts."""
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    ranks = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    replicas = [Replica(rank, expert, "bf16") for expert in range(num_experts) for rank in sorted(draw(ranks))]
    values = st.one_of(st.integers(0, 9), st.integers(0, 10**9))
    counts = draw(st.lists(values, min_size=num_ranks * num_experts, max_size=num_ranks * num_experts))
    topology = Topology(num_ranks, draw(st.integers(0, num_ranks)))
    layer = LayerPlacement.even(0, num_experts, replicas)
    return layer, topology, np.array(counts, np.int64).reshape(num_ranks, num_experts)


@given(layers_and_counts())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_pair_is_computed_once_whatever_the_placement(
    strategy_name: str, drawn: tuple[LayerPlacement, Topology, np.ndarray]
) -> None:
    layer, topology, counts_RE = drawn
    strategy = strategy_of(strategy_name)
    if not strategy.serves_replicas:
        first = {replica.expert: replica for replica in reversed(list(layer.replicas))}
        layer = LayerPlacement.even(0, layer.num_experts, first.values())
    check_planners(strategy, layer, topology, counts_RE)


PROGRAM = """
import sys
import numpy as np
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from tests.strategies.test_conformance import strategy_of
counts_RE = np.random.default_rng(0).integers(0, 200, (3, 7)) ** 2
for name in sys.argv[1:]:
    strategy = strategy_of(name)
    copies = 2 if strategy.serves_replicas else 1
    replicas = [Replica((e + n) % 3, e, "bf16") for e in range(7) for n in range(copies if e % 2 else 1)]
    plan = strategy.planner(LayerPlacement.even(0, 7, replicas), Topology(3))(counts_RE)
    print(name, plan.pairs_RP.tolist(), plan.transfers)
"""


@pytest.mark.slow
def test_processes_with_other_hash_seeds_derive_the_same_plans(request: pytest.FixtureRequest) -> None:
    from rq_ep.strategies import STRATEGIES

    names = request.config.getoption("--strategy") or list(STRATEGIES)
    plans = [plans_of_a_process(names, seed) for seed in ("1", "2")]
    assert plans[0] == plans[1]
    assert plans[0].count("\n") == len(names)


def plans_of_a_process(names: list[str], hash_seed: str) -> str:
    """The plans of a fixed step by a process of its own, as text."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROGRAM, *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
