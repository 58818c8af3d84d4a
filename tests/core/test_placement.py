"""Placement: what is refused, what a file must hold, and what comes back from it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, contiguous, standard_ep_bytes
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.core.topology import Topology, home_ranks


@pytest.fixture
def placement() -> Placement:
    replicas = Replicas.of([Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "int8")])
    layer = LayerPlacement(3, 2, replicas, np.array([0.25, 0.75, 1.0]), predicted=1.2, bound=1.0, binding="mean")
    return Placement(
        layers=(layer,),
        strategy="rq",
        topology=Topology(2),
        bytes_R=(10, 15),
        budget_bytes_R=(20, 20),
        model=ModelIdentity("tiny", "abc"),
        tokens_per_step=64,
        low_precision_cap=0.25,
        low_precision_planned=0.2,
        certificate={"predicted": 1.2, "bound": 1.0},
    )


def test_a_file_gives_back_what_was_saved(placement: Placement, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "placement.json"
    placement.save(path)
    again = Placement.load(path)
    assert list(again.layers[0].replicas) == list(placement.layers[0].replicas)
    np.testing.assert_array_equal(again.layers[0].shares_P, placement.layers[0].shares_P)
    for name in ("strategy", "topology", "bytes_R", "budget_bytes_R", "model", "tokens_per_step", "certificate"):
        assert getattr(again, name) == getattr(placement, name), name
    assert (again.low_precision_cap, again.low_precision_planned) == (0.25, 0.2)
    assert again.layers[0].gap == pytest.approx(0.2)
    assert again.formats == ("bf16", "int8")
    placement.save(path)  # over itself
    assert [file.name for file in path.parent.iterdir()] == ["placement.json"]


def damage(document: dict[str, Any], path: str, value: Any) -> None:
    *keys, last = path.split(".")
    for key in keys:
        document = document[int(key) if key.isdigit() else key]  # type: ignore[index]
    if value is KeyError:
        del document[last]
    else:
        document[int(last) if last.isdigit() else last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "rq_ep.placement/9", "expected 'rq_ep.placement/1'"),
        ("layers", KeyError, "incomplete"),
        ("layers", 7, "incomplete"),
        ("num_ranks", 0, "0: must be at least 1"),
        ("num_ranks", "two", "'two': must be a whole number"),
        ("num_ranks", 1, "rank 1: must be at most 0"),
        ("num_ranks", 3, "bytes names 2 ranks, but num_ranks is 3"),
        ("num_ranks", 10**9, "1000000000: must be at most"),
        ("ranks_per_node", 0.5, "0.5: must be a whole number"),
        ("bytes", [1], "bytes names 1 ranks"),
        ("bytes", [1, "2"], "bytes '2': must be a whole number"),
        ("bytes", "12", "bytes '1': must be a whole number"),
        ("bytes", [1, 10**30], "must be at most"),
        ("bytes", None, "incomplete"),
        ("budget_bytes", [1, 2, 3], "budget_bytes names 3 ranks"),
        ("budget_bytes", [1, -2], "budget_bytes -2: must be at least 0"),
        ("tokens_per_step", 0, "tokens_per_step 0: must be at least 1"),
        ("strategy", ["rq"], "strategy .'rq'.: must be text"),
        ("certificate", 7, "incomplete"),
        ("model", {"name": "x"}, "incomplete"),
        ("model.hash", 5, "hash 5: must be text"),
        ("low_precision_share", None, "incomplete"),
        ("low_precision_share.cap", float("nan"), "cap nan: must be a number"),
        ("low_precision_share.planned", 2, "planned 2: must be at most 1"),
        ("layers", [], "at least one"),
        ("layers.0", None, "incomplete"),
        ("layers.0.layer", -1, "layer -1: must be at least 0"),
        ("layers.0.layer", [], r"layer \[\]: must be a whole number"),
        ("layers.0.num_experts", 10**12, "layer 3: num_experts 1000000000000: must be at most 3"),
        ("layers.0.num_experts", 1, "layer 3: expert 1: must be at most 0"),
        ("layers.0.num_experts", KeyError, "incomplete"),
        ("layers.0.predicted", KeyError, "incomplete"),
        ("layers.0.predicted", "1.2", "layer 3: predicted '1.2': must be a number"),
        ("layers.0.bound", 0.5, "layer 3: bound 0.5: must be at least"),
        ("layers.0.binding", {}, "layer 3: binding {}: must be text"),
        ("layers.0.replicas", [], "must be at most 0"),
        ("layers.0.replicas", {}, "must be at most 0"),
        ("layers.0.replicas.0", [0, 0, "bf16", 0.25], "incomplete"),
        ("layers.0.replicas.0.rank", -1, "rank -1: must be at least 0"),
        ("layers.0.replicas.0.rank", 0.5, "rank 0.5: must be a whole number"),
        ("layers.0.replicas.0.rank", True, "rank True: must be a whole number"),
        ("layers.0.replicas.2.rank", 2, "rank 2: must be at most 1"),
        ("layers.0.replicas.0.expert", 9, "expert 9: must be at most 1"),
        ("layers.0.replicas.0.expert", 10**30, "must be at most 1"),
        ("layers.0.replicas.0.expert", "0", "expert '0': must be a whole number"),
        ("layers.0.replicas.2.expert", 0, "two replicas"),
        ("layers.0.replicas.0.share", 0.5, "shares of expert 0 sum to 1.25"),
        ("layers.0.replicas.0.share", -0.25, "share -0.25: must be at least 0"),
        ("layers.0.replicas.0.share", None, "share None: must be a number"),
        ("layers.0.replicas.0.share", float("inf"), "share inf: must be a number"),
        ("layers.0.replicas.0.share", 10**400, "must be at most 1"),
        ("layers.0.replicas.0.share", "a lot", "share 'a lot': must be a number"),
        ("layers.0.replicas.0.format", "int8", "mix formats int8 and bf16, but its mixed_formats"),
        ("layers.0.mixed_formats", True, "True: must be a list of formats"),
        ("layers.0.mixed_formats", [8], "8: must be text"),
        ("layers.0.mixed_formats", ["int8", "int8"], "a format is named twice"),
        ("layers.0.replicas.0.format", None, "format None: must be text"),
        ("layers.0.replicas.1", {"expert": 0, "rank": 0, "format": "bf16", "share": 0.75}, "named twice"),
    ],
)
def test_hostile_files_are_user_errors(
    placement: Placement, tmp_path: Path, path: str, value: object, message: str
) -> None:
    file = tmp_path / "placement.json"
    placement.save(file)
    document = json.loads(file.read_text())
    damage(document, path, value)
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as caught:
        Placement.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"format": "rq_ep.placement/1"}',
                                     b"[" * 10**5, b"9" * 5000])  # fmt: skip
def test_truncated_and_foreign_files_are_user_errors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "placement.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"placement\.json"):
        Placement.load(file)
    with pytest.raises(UserError, match="rq-ep place --out"):
        Placement.load(tmp_path / "missing.json")
    with pytest.raises(UserError, match="not a readable"):
        Placement.load(tmp_path)


def test_every_prefix_of_a_file_is_refused(placement: Placement, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    placement.save(file)
    whole = file.read_text().rstrip()
    for length in range(0, len(whole), 37):
        file.write_text(whole[:length])
        with pytest.raises(UserError):
            Placement.load(file)


def test_layers_come_once_and_in_order(placement: Placement) -> None:
    first = placement.layers[0]
    with pytest.raises(UserError, match=r"layers \[3, 1\]"):
        replace(placement, layers=(first, replace(first, index=1)))
    with pytest.raises(UserError, match=r"layers \[3, 3\]"):
        replace(placement, layers=(first, first))


def test_bytes_are_those_of_the_replicas(placement: Placement) -> None:
    placement.check_bytes({"bf16": 10, "int8": 5})
    with pytest.raises(UserError, match="claims 15 expert bytes on rank 1, but its replicas take 16"):
        placement.check_bytes({"bf16": 10, "int8": 6})
    with pytest.raises(UserError, match="uses format int8, but only bf16"):
        placement.check_bytes({"bf16": 10})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"budget_bytes_R": (1, 2, 3)}, "--budget names 3 ranks"),
        ({"budget_bytes_R": (10**30, 1)}, "--budget 1000000000000000000000000000000: must be at most"),
        ({"budget_bytes_R": (-1, 1)}, "--budget -1: must be at least 0"),
        ({"formats": ("bf16", "int9")}, "no sizes for int9"),
        ({"formats": ("int8",)}, "must name the native format bf16"),
        ({"max_low_precision_share": float("nan")}, "--max-low-precision-share nan: must be a number"),
        ({"max_low_precision_share": 1.5}, "must be at most 1"),
        ({"tokens_per_step": 0}, "--tokens-per-step 0: must be at least 1"),
        ({"num_redundant_experts": -1}, "--num-redundant-experts -1: must be at least 0"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
    ],
)
def test_problems_out_of_range_are_refused(limits: dict[str, Any], message: str) -> None:
    stats = ExpertStats.uniform((0,), 4, {"bf16": 7, "int8": 4}, "bf16")
    with pytest.raises(UserError, match=message):
        PlacementProblem(stats, Topology(2), **limits)


@pytest.mark.parametrize("sizes", [(0,), (-1,), (2.5,), (10**9,), ("4",), (4, -1), (4, 0.5)])
def test_topologies_that_are_none_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(UserError, match=r"--(num-ranks|ranks-per-node) .*: must be "):
        Topology(*sizes)


def test_serves_only_its_ranks_and_its_model(placement: Placement) -> None:
    placement.check_serves(ModelIdentity("renamed", "abc"), 2)
    placement.check_serves(None, 2)
    with pytest.raises(UserError, match="for 2 ranks, but 4 were started"):
        placement.check_serves(None, 4)
    with pytest.raises(UserError, match="made for model 'tiny'"):
        placement.check_serves(ModelIdentity("other", "def"), 2)


def test_replicas_are_sorted_and_unique() -> None:
    replicas = Replicas.of([Replica(1, 0, "a"), Replica(0, 1, "a"), Replica(0, 0, "a")])
    assert [(replica.rank, replica.expert) for replica in replicas] == [(0, 0), (0, 1), (1, 0)]
    assert replicas.by_expert_P.tolist() == [0, 2, 1]
    assert [list(replicas.on_rank(rank)) for rank in range(3)] == [[0, 1], [2], []]
    with pytest.raises(UserError, match="two replicas of one expert"):
        Replicas.of([Replica(0, 0, "a"), Replica(0, 0, "b")])


def test_formats_are_mixed_where_the_placement_says_so(placement: Placement, tmp_path: Path) -> None:
    mixed = [Replica(0, 0, "bf16"), Replica(0, 1, "bf16"), Replica(1, 0, "int8"), Replica(2, 0, "int8")]
    with pytest.raises(UserError, match="expert 0 mix formats bf16 and int8, but its mixed_formats are \\['bf16'\\]"):
        LayerPlacement.even(3, 2, mixed, ["bf16"])
    layer = LayerPlacement.even(3, 2, mixed, ["int8", "bf16"])
    assert layer.replicas.by_expert_P.tolist() == [2, 3, 0, 1], "fewest bits first, then by rank"
    assert layer.replicas.mixing_experts == (0,)
    assert placement.layers[0].replicas.mixing_experts == ()
    path = tmp_path / "placement.json"
    replace(placement, layers=(layer,), topology=Topology(3), bytes_R=(20, 5, 5), budget_bytes_R=None).save(path)
    assert Placement.load(path).layers[0].replicas.mixed_formats == ("int8", "bf16")


def test_a_file_that_does_not_speak_of_mixing_allows_none(placement: Placement, tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placement.save(path)
    document = json.loads(path.read_text())
    del document["layers"][0]["mixed_formats"]
    path.write_text(json.dumps(document))
    assert Placement.load(path).layers[0].replicas.mixed_formats == ()


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 4), (10, 3), (3, 5), (1, 4), (7, 1)])
def test_homes_are_contiguous_blocks_of_nearly_equal_size(num_experts: int, num_ranks: int) -> None:
    homes_E = home_ranks(num_experts, num_ranks)
    assert (np.diff(homes_E) >= 0).all()
    sizes = np.bincount(homes_E, minlength=num_ranks)
    assert sizes.max() - sizes.min() <= 1
    stats = ExpertStats.uniform((0, 5), num_experts, {"bf16": 7}, "bf16")
    placement = PlacementProblem(stats, Topology(num_ranks)).placement("standard", contiguous(
        PlacementProblem(stats, Topology(num_ranks))
    ))  # fmt: skip
    assert max(placement.bytes_R) == standard_ep_bytes(stats, num_ranks) == 2 * 7 * sizes.max()


def test_replicas_come_go_and_change_their_format() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        pairs = [(int(rank), int(expert)) for rank, expert in np.argwhere(generator.random((4, 6)) < 0.4)]
        stored = {pair: ("bf16", "int8")[generator.integers(2)] for pair in pairs}
        dropped = [pair for pair in pairs if generator.random() < 0.3]
        arrived = {
            (int(rank), int(expert)): ("bf16", "fp8")[generator.integers(2)]
            for rank, expert in np.argwhere(generator.random((4, 8)) < 0.2)
            if (rank, expert) not in dropped
        }
        left = {pair: name for pair, name in (stored | arrived).items() if pair not in dropped}
        expected = Replicas.of(Replica(*pair, name) for pair, name in left.items())
        before = Replicas.of((Replica(*pair, name) for pair, name in stored.items()), ("int8", "bf16"))
        after = before.changed([Replica(*pair, name) for pair, name in arrived.items()], dropped)
        assert after.are_those_of(expected)
        assert after.mixed_formats == ("int8", "bf16")
        assert before.are_those_of(after) == (stored == left)


def test_a_mask_of_replicas_is_the_one_that_they_come_from() -> None:
    held_ER = np.random.default_rng(0).random((5, 3)) < 0.5
    assert (Replicas.from_mask(held_ER).mask(5, 3) == held_ER).all()
