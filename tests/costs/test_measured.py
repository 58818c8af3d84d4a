"""A profile's arithmetic, its file, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rq_ep.core.cost import LayerShape
from rq_ep.core.errors import UserError
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.costs import MACHINES, Profile, Roofline, cost_model
from rq_ep.costs.fit import ExpertFit
from rq_ep.costs.measured import Calls, Check, Curve, LinkTimings

EXPERTS, ROWS = (1,) * 6 + (4,) * 6, (1, 2, 4, 8, 16, 32) * 2
SHAPE = LayerShape(hidden_size=10, intermediate_size=20, expert_bytes={"bf16": 1200, "int8": 600})


def calls(truth: ExpertFit) -> Calls:
    return Calls(EXPERTS, ROWS, tuple(truth.seconds(np.array(EXPERTS), np.array(ROWS)).tolist()))


PROFILE = Profile(
    device="a machine",
    dtype="float32",
    hidden_size=10,
    intermediate_size=20,
    num_experts=4,
    top_k=2,
    num_ranks=2,
    experts={"bf16": calls(ExpertFit(7.0, 2.0, 1.0, 6.0)), "int8": calls(ExpertFit(4.0, 5.0, 1.0, 3.0))},
    gather=Curve((1, 11), (0.75, 3.25)),
    link=LinkTimings("measured", latency_s=0.5, row_byte_s=0.025, transfer_byte_s=0.01),
    plan_s={"rq": 1e-4},
    plan_ranks=2,
    checks=(Check("bf16", 8, predicted_s=3.0, measured_s=2.0),),
)


def test_a_step_by_hand() -> None:
    replicas = Replicas.of([Replica(0, 0, "bf16"), Replica(0, 1, "int8"), Replica(1, 0, "bf16")])
    plan = DispatchPlan(replicas, np.array([[4, 0, 0], [4, 2, 1]]), (WeightTransfer(0, 0, 1, "bf16"),))
    cost = PROFILE.layer(SHAPE).step(plan)
    # Rank 0: 10 pairs of a second outlast 6 + 3 of streaming; 2 + 5 of overhead. Rank 1 waits for its one expert.
    # A call in bf16 is 7 more on each; 4 for int8 on rank 0 are among them.
    np.testing.assert_allclose(cost.compute_s_R, [10 + 7 + 7, 6 + 2 + 7])
    # 6 rows of 40 bytes go one way, 1.0 each over the link and 0.25 to pick them out; then back.
    np.testing.assert_allclose(cost.exchange_s_R, [2 * (6 * 1.25 + 0.5)] * 2)
    np.testing.assert_allclose(cost.transfer_s_R, [12.5, 12.5])
    assert PROFILE.checks[0].error == pytest.approx(0.5)


@pytest.mark.parametrize("model", [PROFILE, MACHINES["h200"]], ids=["measured", "roofline"])
def test_a_split_replica_is_read_twice_and_more_pairs_never_take_less(model: Any) -> None:
    cost = model.layer(SHAPE)
    one = DispatchPlan(Replicas.of([Replica(0, 0, "bf16")]), np.array([[2], [0]]))
    two = DispatchPlan(Replicas.of([Replica(0, 0, "bf16"), Replica(1, 0, "bf16")]), np.array([[1, 1], [0, 0]]))
    assert cost.compute_s_R(two).sum() == pytest.approx(2 * cost.compute_s_R(one).sum())
    seconds = [cost.compute_s_R(DispatchPlan(one.replicas, np.array([[pairs]])))[0] for pairs in range(50)]
    assert seconds[0] == 0
    assert (np.diff(seconds) >= 0).all()


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    assert Profile.load(path) == replace(PROFILE, source=str(path))
    assert cost_model(str(path)) == Profile.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "rq_ep.profile/1"}, r"rq_ep.profile/1' is not 'rq_ep.profile/2': profile again"),
        ({"experts": {}}, "at least one format"),
        ({"experts": {"bf16": {"experts": [1, 1], "rows": [1, 2], "seconds": [1.0]}}}, "experts of bf16: 2 experts, 2"),
        ({"experts": {"bf16": {"experts": 1, "rows": 7, "seconds": [1.0]}}}, "experts of bf16"),
        ({"experts": {"bf16": {"experts": [1, 2], "rows": [7, 7], "seconds": [1.0, 1.0]}}}, "two numbers of rows"),
        ({"gather": {"sizes": [2, 1], "seconds": [1.0, 1.0]}}, "must ascend"),
        ({"gather": {"sizes": [1, 2], "seconds": [0, 1]}}, "gather: seconds 0"),
        ({"link": {"latency_s": -1.0, "row_byte_s": 0, "transfer_byte_s": 0, "source": "x"}}, "link: latency_s"),
        ({"link": "fast"}, "link 'fast': must be a mapping"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"hidden_size": "wide"}, "hidden_size 'wide'"),
        ({"plan_s": {"rq": "quick"}}, "plan_s of rq"),
        ({"checks": [{"format": "bf16"}]}, "checks"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        Profile.load(path)
    assert str(path) in str(error.value)


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(UserError, match="rq-ep profile"):
        cost_model(str(path))
    path.write_text('{"format": "rq_ep.profile/2"}')
    with pytest.raises(UserError, match="lacks checks, device"):
        Profile.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="must be a mapping"):
        Profile.load(path)


def test_another_shape_or_format_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="hidden size 10 and intermediate size 20, not 10 and 24"):
        PROFILE.layer(replace(SHAPE, intermediate_size=24))
    with pytest.raises(UserError, match="no timings of fp16, only of bf16, int8"):
        PROFILE.layer(replace(SHAPE, expert_bytes={"bf16": 1, "fp16": 1}))


def test_machines_by_name_and_file(tmp_path: Path) -> None:
    assert cost_model("h200") is MACHINES["h200"]
    with pytest.raises(UserError, match="did you mean 'h200'"):
        cost_model("h2000")
    path = tmp_path / "mine.yaml"
    rates = "flops_per_s: 2.0e+9\nmemory_bytes_per_s: 3e9\nlink_bytes_per_s: 1000\nlatency_s: 0\n"
    path.write_text(rates)
    assert cost_model(str(path)) == Roofline(2e9, 3e9, 1000, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops_per_s: 1", "also needs memory_bytes_per_s, link_bytes_per_s, latency_s"),
        ("flop_per_s: 1", "did you mean 'flops_per_s'"),
        ("flops_per_s: fast\nmemory_bytes_per_s: 1\nlink_bytes_per_s: 1\nlatency_s: 0", "flops_per_s 'fast'"),
        ("- 1", "not list"),
        ("a: [", "malformed YAML"),
        ("", "not NoneType"),
    ],
)
def test_other_machine_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        cost_model(str(path))


def test_every_machine_says_where_its_rates_are_from() -> None:
    assert {"h100", "h200", "cpu"} <= set(MACHINES)
    assert all(len(machine.source) > 20 for machine in MACHINES.values())
