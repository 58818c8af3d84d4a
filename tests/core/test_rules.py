"""Rules files, what they allow and fix, and how a placement that breaks them is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.files.yaml_files import MAX_YAML_BYTES
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.replicas import Replica
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology, nodes_of_groups

STATS = ExpertStats.uniform((3, 5), 8, {"bf16": 10, "int8": 5}, "bf16")
FOUR = Topology(4, ranks_per_node=2)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "rules.yaml"
    file.write_text(text)
    return file


def test_a_file_says_what_is_fixed_and_forbidden(tmp_path: Path) -> None:
    rules = Rules.load(
        written(
            tmp_path,
            "spread_nodes: true\n"
            "fixed:\n- {layer: 3, expert: 7, rank: 0}\n"
            "forbidden:\n- {expert: 0-1, rank: [2, 3]}\n- {layer: 5, rank: 1}\n",
        )
    )
    assert rules.spread_nodes
    assert not rules.whole_groups
    fixed_LER, allowed_LER = rules.fixed_LER(STATS, FOUR), rules.allowed_LER(STATS, FOUR)
    assert np.argwhere(fixed_LER).tolist() == [[0, 7, 0]]
    assert not allowed_LER[:, :2, 2:].any()
    assert not allowed_LER[1, :, 1].any()
    assert int((~allowed_LER).sum()) == 2 * 2 * 2 + 8


def test_no_rules_allow_everything() -> None:
    assert Rules().allowed_LER(STATS, FOUR).all()
    assert not Rules().fixed_LER(STATS, FOUR).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "rules are a mapping"),
        ("", "rules are a mapping"),
        ("spread_node: true", "unknown rule 'spread_node': did you mean 'spread_nodes'"),
        ("spread_nodes: 1", "spread_nodes 1: must be true or false"),
        ("fixed: {layer: 3}", "fixed: must be a list"),
        ("fixed: [3]", "fixed, entry 0: must name a layer"),
        ("fixed: [{}]", "fixed, entry 0: must name a layer"),
        ("fixed: [{rnk: 3}]", "unknown key in fixed, entry 0 'rnk': did you mean 'rank'"),
        ("fixed: [{rank: many}]", "fixed, entry 0: rank 'many': must be a number, a list, or a range"),
        ("fixed: [{rank: 7-3}]", "rank '7-3': the range is empty"),
        ("fixed: [{rank: 0-99999999999999999999999}]", "must be at most 65536"),
        ("fixed: [{rank: -1}]", "rank -1: must be at least 0"),
        ("fixed: [{rank: 1.5}]", "must be a whole number"),
        ("fixed: [{rank: [[1]]}]", "must be a whole number"),
        ("a: b: c", "line 1: malformed YAML"),
        ("!!python/object/apply:os.system [ls]", "malformed YAML"),
        ("[" * 20000, "nested too deeply"),
        ("#" * (MAX_YAML_BYTES + 1), "not a rules file: it has 1048577 bytes"),
    ],
)
def test_bad_files_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError, match=message) as raised:
        Rules.load(file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_no_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; --rules names a YAML file"):
        Rules.load(tmp_path / "none.yaml")
    file = tmp_path / "rules.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a readable rules file"):
        Rules.load(file)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(fixed=(Selection((4,), None, None),)), "fixed: layer 4: there are 2, 3 to 5"),
        (Rules(forbidden=(Selection(None, (8,), None),)), "forbidden: expert 8: there are 8, 0 to 7"),
        (Rules(forbidden=(Selection(None, None, (4,)),)), "forbidden: rank 4: there are 4, 0 to 3"),
        (Rules(forbidden=(Selection(None, (2,), None),)), "expert 2 of layer 3 is allowed on no rank"),
        (
            Rules((Selection((5,), (1,), (2,)),), (Selection(None, (1,), (2,)),)),
            "expert 1 of layer 5 on rank 2 is fixed, but it is not allowed there",
        ),
        (Rules(whole_groups=True), "names no expert groups for 8 experts"),
    ],
)
def test_rules_that_nobody_can_keep_are_refused_at_once(rules: Rules, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlacementProblem(STATS, FOUR, rules=rules)


def test_whole_groups_share_a_node_in_every_layer() -> None:
    counts = np.ones((1, 2, 8), np.int64)
    counts[0, 0, :2] = 50  # group 0 is the heaviest of the first layer, group 3 of the second
    counts[0, 1, 6:] = 50
    stats = replace(STATS, counts=counts, expert_groups=4)
    allowed_LER = Rules(whole_groups=True).allowed_LER(stats, FOUR)
    nodes_LE = allowed_LER[:, :, 2].astype(int)
    assert (allowed_LER.sum(axis=2) == 2).all()
    assert (nodes_LE.reshape(2, 4, 2).std(axis=2) == 0).all()
    assert nodes_LE[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert nodes_LE[1].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_groups_go_to_the_least_loaded_node_with_room() -> None:
    assert nodes_of_groups(np.array([9.0, 1, 8, 2]), 2).tolist() == [0, 0, 1, 1]
    assert nodes_of_groups(np.array([5.0, 4, 3]), 2).tolist() == [0, 1, 0]
    assert np.bincount(nodes_of_groups(np.ones(5), 3), minlength=3).tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(forbidden=(Selection((3,), (0,), (0,)),)), "expert 0 of layer 3 on rank 0 is not allowed"),
        (Rules(fixed=(Selection((5,), (0,), (3,)),)), "expert 0 of layer 5 on rank 3 is missing"),
    ],
)
def test_a_placement_that_breaks_a_rule_is_refused(rules: Rules, message: str) -> None:
    problem = PlacementProblem(STATS, FOUR, rules=rules)
    with pytest.raises(UserError, match=message):
        problem.placement("standard", contiguous(problem))


def test_replicas_on_one_node_are_refused_where_they_must_spread() -> None:
    problem = PlacementProblem(STATS, FOUR, rules=Rules(spread_nodes=True))
    home = [Replica(expert // 2, expert, "bf16") for expert in range(8)]

    def placed(extra_rank: int) -> None:
        layers = [LayerPlacement.even(layer, 8, [*home, Replica(extra_rank, 0, "bf16")]) for layer in (3, 5)]
        problem.placement("eplb", layers)

    placed(2)
    with pytest.raises(UserError, match="spread_nodes: 2 replicas of expert 0 of layer 3 on node 0, at most 1"):
        placed(1)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"objective": "speed"}, "unknown --objective 'speed'"),
        ({"objective": "mixed"}, "does not say which steps are prefill"),
        ({"tail_weight": 1.5}, "--tail-weight 1.5: must be at most 1"),
        ({"max_error": -1.0}, "--max-error -1.0: must be at least 0"),
        ({"max_error": 0.1}, "holds no measured errors"),
        ({"time_limit_s": -1.0}, "--time-limit -1.0: must be at least 0"),
        ({"num_workers": 0}, "--workers 0: must be at least 1"),
        ({"max_moved_bytes": -1}, "--max-moved-bytes -1: must be at least 0"),
        ({"move_price": float("inf")}, "--move-price inf: must be a number"),
    ],
)
def test_search_settings_out_of_range_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlacementProblem(STATS, FOUR, **limits)
