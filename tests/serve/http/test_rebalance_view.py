"""Rebalancing over HTTP, in process: its state, commands and their refusals, metrics, and the naming of a stall."""

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rq_ep.core.moves import Move
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.engine.progress import MoverProgress
from rq_ep.rebalancing.rebalancer import Decision
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.views import placement_view
from rq_ep.serve.http.views.rebalance_view import RebalanceView
from rq_ep.serve.messages import (
    MigrationPlanned,
    PlacementServed,
    RebalanceAnswer,
    RebalanceCommand,
    RebalanceStatus,
    RoundServed,
)
from rq_ep.serve.rank.rebalance.rebalance_controller import described
from tests.serve.http.test_app import Bench, conforming, error

MOVE = {"round": 0, "layer": 3, **Move("receive", 1, 0, "bf16", 0)._asdict()}
PLANNED = described(Decision(None, "max/mean 1.400 -> 1.050", moved_bytes=100))
DECISION = {**PLANNED, "time": 1.5}
DRY_RUN = {**PLANNED, "moves": [MOVE]}


def status(state: str = "moving", progress_s: float = 0.5, **changes: Any) -> RebalanceStatus:
    fields: dict[str, Any] = {
        "generation": 3, "decision": DECISION, "results": {"committed": 2}, "moved_bytes": 700, "done_bytes": 40,
        "left_bytes": 60, "problem": "",
    }  # fmt: skip
    return RebalanceStatus(state=state, progress_s=progress_s, **{**fields, **changes})


class RebalancingBench(Bench):
    """An app over a rank 0 that answers commands from a script."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.refusal: str | None = None
        self.commands: list[RebalanceCommand] = []
        self.view = self.service.rebalancing = RebalanceView(self.obey, lambda: self.now_s)

    def obey(self, command: RebalanceCommand) -> int:
        self.commands.append(command)
        decision = DRY_RUN if command.action == "dry_run" else None
        self.view.take(RebalanceAnswer(command.number, self.refusal, decision))
        return 0

    def get(self, path: str = "/v1/ep/rebalance") -> httpx.Response:
        return self.call("GET", path)

    def command(self, body: Any) -> httpx.Response:
        return self.call("POST", "/v1/ep/rebalance", json=body)


@pytest.fixture
def bench() -> RebalancingBench:
    return RebalancingBench()


def test_the_state_is_shown_as_rank_0_has_sent_it(bench: RebalancingBench) -> None:
    conforms = conforming(bench)
    body = bench.get().json()
    assert body["state"] == "loading"
    assert conforms(body, "Rebalancing")
    bench.view.take(status())
    bench.now_s += 2
    body = bench.get().json()
    assert (body["state"], body["generation"], body["decision"]) == ("moving", 3, DECISION)
    assert (body["done_bytes"], body["left_bytes"], body["seconds_since_progress"]) == (40, 60, 2.5)
    bench.view.take(status("idle"))
    assert bench.get().json()["seconds_since_progress"] == 0
    assert conforms(body, "Rebalancing")


def test_a_command_reaches_rank_0_and_its_answer_the_client(bench: RebalancingBench) -> None:
    assert bench.command({"action": "start"}).json() == {"action": "start"}
    assert bench.command({"action": "dry_run"}).json() == {"action": "dry_run", "decision": DRY_RUN}
    assert bench.commands == [RebalanceCommand(1, "start"), RebalanceCommand(2, "dry_run")]
    assert conforming(bench)({"action": "dry_run", "decision": DRY_RUN}, "RebalanceAnswer")
    bench.refusal = "moving: wait for its end, or abort it"
    assert error(bench.command({"action": "start"}), 409)["message"] == f"start: {bench.refusal}"


def test_a_command_to_a_rank_that_is_lost_is_refused() -> None:
    async def scene() -> None:
        view = RebalanceView(lambda command: 1)
        task = asyncio.ensure_future(view.command("dry_run"))
        await asyncio.sleep(0)
        view.forget(0)
        await asyncio.sleep(0)
        assert not task.done()
        view.forget(1)
        with pytest.raises(ApiError, match="rank 1, which led, was lost: ask again"):
            await asyncio.wait_for(task, 5)

    asyncio.run(scene())


@pytest.mark.parametrize("body", [{"action": "stop"}, {}, {"action": "start", "now": True}])
def test_another_action_is_refused_by_name(bench: RebalancingBench, body: Any) -> None:
    assert error(bench.command(body), 400)["param"] == ("now" if "now" in body else "action")
    assert bench.commands == []


def test_a_server_that_keeps_its_placement_says_so() -> None:
    bench = Bench()
    assert bench.call("GET", "/v1/ep/rebalance").json()["state"] == "off"
    answer = bench.call("POST", "/v1/ep/rebalance", json={"action": "start"})
    assert "--rebalance auto" in error(answer, 409)["message"]
    assert "rq_ep_rebalance" not in bench.call("GET", "/metrics").text


def test_a_mover_without_progress_is_named_within_ten_seconds_and_serving_goes_on(
    bench: RebalancingBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.service.metrics.add_rebalancing(lambda: bench.view.seconds_since_progress)
    for rank, staged in enumerate([(3 << 20) + 1, 3 << 20, (3 << 20) + 1]):
        bench.view.on_progress(rank, MoverProgress(staged))
    bench.view.take(status(progress_s=6.0))
    assert bench.get("/health").json() == {"status": "ok"}
    bench.now_s += 2.5
    health = bench.get("/health")
    assert health.status_code == 200
    assert health.json()["rebalance"] == "re-placement 3 has made no progress for 8 s: rank 1 is behind"
    assert bench.get().json()["stall"] == health.json()["rebalance"]
    for _ in range(3):  # it is logged once
        bench.view.log_stall()
    assert [record.getMessage() for record in caplog.records] == [f"{health.json()['rebalance']}; serving goes on"]
    assert "rq_ep_rebalance_seconds_since_progress" in (metrics := bench.get("/metrics").text)
    assert metrics.partition('rq_ep_rebalance_seconds_since_progress{model_name="org/tiny"} ')[2].startswith("8.5\n")
    bench.now_s += 6
    for rank, staged in enumerate([(3 << 20) + 1, 3 << 20]):
        bench.view.on_progress(rank, MoverProgress(staged))
    assert bench.get("/health").json()["rebalance"].endswith("rank 2 is silent")
    bench.view.take(status("planning", 12.0))
    assert bench.get("/health").json()["rebalance"] == "the planner has not answered for 12 s"


def test_a_stall_is_named_by_what_the_ranks_do_that_are_behind(bench: RebalancingBench) -> None:
    stalls = {
        0: MoverProgress(3 << 20, 5, "exchanges experts with rank 2", True),
        1: MoverProgress((3 << 20) + 1, 5),
        2: MoverProgress(3 << 20, 4, "reads expert 3 of layer 5 from the checkpoint"),
    }
    for rank, mover in stalls.items():
        bench.view.on_progress(rank, mover)
    bench.view.take(status(progress_s=9.0))
    assert (bench.view.stall() or "").endswith(
        ": rank 2 reads expert 3 of layer 5 from the checkpoint; rank 0 exchanges experts with rank 2"
    )


def test_a_round_that_takes_long_is_not_stuck_while_pieces_of_experts_move(bench: RebalancingBench) -> None:
    for second in range(40):
        bench.view.on_progress(0, MoverProgress(3 << 20, second // 5))
        bench.view.on_progress(1, MoverProgress(3 << 20, 7))
        bench.view.take(status(progress_s=float(second)))
        assert bench.view.stall() is None
        bench.now_s += 1
    bench.now_s += 8
    assert bench.view.stall() is not None


def test_what_failed_and_when_it_is_tried_again_is_shown(bench: RebalancingBench) -> None:
    bench.view.take(status("idle", 0.0, problem="rank 1: no space", num_failures=2, retry_s=20.0))
    bench.now_s += 5
    body = bench.get().json()
    assert (body["problem"], body["failures_in_a_row"], body["seconds_until_retry"]) == ("rank 1: no space", 2, 15.0)


def test_metrics_count_what_was_decided_and_moved(bench: RebalancingBench) -> None:
    metrics = bench.service.metrics
    metrics.add_rebalancing(lambda: 2.5)
    first, second = ({"committed": 1}, 300), ({"committed": 2, "stayed": 1}, 700)
    of_another_leader = ({}, 0), ({"committed": 1}, 50)
    for results, moved in (first, second, *of_another_leader):
        metrics.rebalancing(status(results=results, moved_bytes=moved))
    text = bench.get("/metrics").text
    model = 'model_name="org/tiny"'
    for line in (
        f"rq_ep_placement_generation{{{model}}} 3.0",
        f'rq_ep_rebalance_total{{{model},result="committed"}} 3.0',
        f'rq_ep_rebalance_total{{{model},result="stayed"}} 1.0',
        f"rq_ep_rebalance_moved_bytes_total{{{model}}} 750.0",
        f"rq_ep_rebalance_seconds_since_progress{{{model}}} 2.5",
    ):
        assert line in text


def test_a_placement_amid_a_migration_is_made_out_beside_the_event_loop(
    bench: RebalancingBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_out(*_: Any) -> dict[str, bool]:
        return {"beside": threading.current_thread() is not threading.main_thread()}

    monkeypatch.setattr(placement_view, "_amid", make_out)
    bench.service.begin(bench.limits, {}, {})
    bench.service.placement.take(MigrationPlanned(4, {}, [[[], []]], {}))
    bench.service.placement.take(RoundServed(4, 1))
    assert asyncio.run(bench.service.placement.document()) == {"beside": True}


def test_a_placement_that_is_saved_amid_a_migration_can_be_served(bench: RebalancingBench, tmp_path: Path) -> None:
    sizes = {"bf16": 100, "int8": 60}

    def placed(*replicas: Replica) -> Placement:
        layers = (LayerPlacement.even(3, 2, replicas), LayerPlacement.even(5, 2, replicas[:2]))
        bytes_R = tuple(bytes_by_rank(layers, 2, sizes).tolist())
        return Placement(layers, "rq", Topology(2), bytes_R, (300, 300), certificate={"predicted": 1.0})

    def sent(placement: Placement) -> Any:
        return json.loads(json.dumps(placement.to_dict()))

    def shown() -> Placement:
        assert conforming(bench)(bench.get("/v1/ep/placement").json(), "Placement")
        saved = tmp_path / "placement.json"
        saved.write_text(bench.get("/v1/ep/placement").text)
        Placement.load(saved).check_bytes(sizes)
        return Placement.load(saved)

    first, second, third = (Replica(1, 0, "bf16"), Replica(0, 1, "bf16"), Replica(1, 1, "bf16"))
    before = placed(Replica(0, 0, "bf16"), third)
    amid = placed(Replica(0, 0, "bf16"), third, first)
    after = placed(Replica(0, 0, "bf16"), third, first, second)
    rounds = [[[(0, Move("receive", one.rank, one.expert, one.format, 0))], []] for one in (first, second)]
    view = bench.service.placement
    bench.service.begin(bench.limits, sent(before), {})
    assert shown().to_dict() == before.to_dict()
    view.take(MigrationPlanned(4, sent(after), rounds, sizes))
    assert shown().to_dict() == before.to_dict()
    view.take(RoundServed(4, 1))
    assert shown().to_dict() == replace(amid, certificate={}).to_dict()
    view.take(RoundServed(3, 2))
    assert shown().to_dict() == replace(amid, certificate={}).to_dict(), "an earlier migration's"
    view.take(RoundServed(4, 2))
    assert [list(layer.replicas) for layer in shown().layers] == [list(layer.replicas) for layer in after.layers]
    view.take(PlacementServed(4, sent(after), [{"bf16": 100}] * 2))
    assert shown().to_dict() == after.to_dict()
