"""A server of two ranks that was started without calibration, and replaces its placement while it answers."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rq_ep.config import ServeConfig
from rq_ep.core.placement import Placement
from rq_ep.serve.rank.dry_run import preview
from rq_ep.sim.traces import RoutingTrace
from tests.serve.running import Server, restarting, running, until

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_a_server_becomes_balanced_by_itself_and_loses_no_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "served.json"
    text = "".join(path.read_text() for path in sorted((tiny_checkpoint / "text/train/c").iterdir()))
    settings = {
        "model": str(tiny_checkpoint), "strategy": "rq", "formats": ["bf16", "int8"], "dtype": "float32",
        "rebalance": "auto", "rebalance_window": 32, "rebalance_interval": 16, "placement_out": str(saved),
        "record_dir": str(tmp_path),
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(settings))  # which is YAML too
    with running(tmp_path / "log", 2, "--config", str(tmp_path / "config.yaml")) as server:
        first = server.client.get("/v1/ep/placement").json()
        assert {replica["format"] for layer in first["layers"] for replica in layer["replicas"]} == {"fp32"}
        assert first["bytes"] == first["budget_bytes"], "it starts in the bytes of standard EP"
        server.client.post("/v1/ep/record/start")
        statuses: list[int] = []
        is_over = threading.Event()

        def ask(number: int) -> None:
            model = server.client.get("/v1/models").json()["data"][0]["id"]
            for at in range(number, 10**6, 4):
                if is_over.is_set():
                    return
                prompt = text[100 * at % 10_000 :][:100]
                body = {"model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
                statuses.append(server.client.post("/v1/completions", json=body).status_code)

        def state() -> dict[str, Any]:
            return server.client.get("/v1/ep/rebalance").json()

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: state().get("results", {}).get("committed", 0) >= 1)  # none before the first report
            until(saved.exists)
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        assert set(statuses) == {200}
        recorded = server.client.post("/v1/ep/record/stop").json()
        # Another one may follow on the last steps.
        until(lambda: json.loads(saved.read_text()) == server.client.get("/v1/ep/placement").json())
        until(lambda: state()["state"] == "idle")
        placement = Placement.load(saved)
        assert placement.budget_bytes_R is not None
        assert all(held <= most for held, most in zip(placement.bytes_R, placement.budget_bytes_R, strict=True))
        assert state()["moved_bytes"] > 0
        metrics = server.client.get("/metrics").text
        assert 'result="committed"' in metrics
        trace = RoutingTrace.load(recorded["path"])
        shown_LE = trace.counts(2).sum(axis=(0, 2))  # logical experts, whatever moved

        def total_LE() -> np.ndarray:
            return np.array(server.client.get("/v1/ep/load").json()["total"]["counts_LE"])

        until(lambda: total_LE().sum() >= shown_LE.sum())  # the figures come once a second
        counts_LE = total_LE()
        shares_LE, all_LE = (array / array.sum(axis=1, keepdims=True) for array in (shown_LE, counts_LE))
        np.testing.assert_allclose(shares_LE, all_LE, atol=0.03)
    again = ServeConfig(str(tiny_checkpoint), str(saved), formats=("bf16", "int8"), dtype="float32", rebalance="auto")
    assert "placement: made by rq, served by rq" in preview(again, 2, 2)


def test_answers_in_the_native_format_are_the_same_before_amid_and_after_many_re_placements(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    text = "".join(path.read_text() for path in sorted((tiny_checkpoint / "text/train/c").iterdir()))
    settings = [
        "--model", str(tiny_checkpoint), "--strategy", "eplb", "--dtype", "float32",
        "--rebalance", "auto", "--rebalance-window", "32", "--rebalance-interval", "8",
    ]  # fmt: skip
    with running(tmp_path / "log", 2, *settings) as server:
        model = server.client.get("/v1/models").json()["data"][0]["id"]
        answers: dict[str, set[str]] = {}
        num_committed = 0
        while num_committed < 5:  # eplb takes whatever it plans
            for at in range(8):
                body = {"model": model, "prompt": text[100 * at :][:100], "max_tokens": 16, "ignore_eos": True}
                answer = server.client.post("/v1/completions", json=body | {"temperature": 0}).json()
                answers.setdefault(body["prompt"], set()).add(answer["choices"][0]["text"])
            num_committed = server.client.get("/v1/ep/rebalance").json().get("results", {}).get("committed", 0)
        assert all(len(of_prompt) == 1 for of_prompt in answers.values())


@contextmanager
def changing_traffic(server: Server, text: str) -> Iterator[None]:
    """Requests that go on whatever becomes of them, from one part of a text and then from another."""
    is_over = threading.Event()

    def ask(number: int) -> None:
        at = number
        while not is_over.is_set():
            at += 1
            prompt = text[300 * (at // 20) + number :][:60]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "ignore_eos": True}
            try:
                server.client.post("/v1/completions", json=body)
            except httpx.TransportError:
                is_over.wait(0.2)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def rebalancing(server: Server) -> dict[str, Any]:
    try:
        state: dict[str, Any] = server.client.get("/v1/ep/rebalance").json()
    except (httpx.TransportError, ValueError):
        return {}
    return state


def test_a_rank_killed_amid_moves_brings_back_the_last_placement_and_a_shutdown_amid_moves_drains(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "served.json"
    text = "".join(path.read_text() for path in sorted((tiny_checkpoint / "text/train/c").iterdir()))
    settings = [
        "--model", str(tiny_checkpoint), "--served-model-name", "tiny", "--strategy", "eplb", "--dtype", "float32",
        "--rebalance", "auto", "--rebalance-window", "32", "--rebalance-interval", "8", "--placement-out", str(saved),
        "--rebalance-bytes-per-step", "2KiB", "--device", "cpu",
        "--on-rank-failure", "stop",
    ]  # fmt: skip
    with running(tmp_path / "log", 2, *settings, launcher=restarting) as server:
        with changing_traffic(server, text):
            until(lambda: rebalancing(server).get("results", {}).get("committed", 0) >= 1)
            until(lambda: rebalancing(server).get("state") == "moving")
            rank = server.rank(1)
            rank.kill()
            until(lambda: "the group has failed: rank 1 died" in server.log.read_text(), 60)
        kept = json.loads(saved.read_text())
        until(lambda: rebalancing(server).get("state") == "idle", 240)
        assert rank.pid != server.rank(1).pid
        answer = server.client.get("/v1/ep/placement").json()
        assert answer["layers"] == kept["layers"], "the placement that was saved last"
        with changing_traffic(server, text):
            until(lambda: rebalancing(server).get("state") == "moving")
            processes = server.tree()
            server.signal(0, signal.SIGTERM)
            assert server.wait(processes, 60) == 0
