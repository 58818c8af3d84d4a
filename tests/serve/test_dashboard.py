"""The dashboard, drawn by a real browser from a service with loads; skips where there is no Chromium."""

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.views.membership_view import MembershipView
from tests.serve.http.ranks.fake_group import FakeGroup
from tests.serve.http.test_app import LOADS, Bench

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PLACEMENT = {
    "strategy": "rq",
    "num_ranks": 2,
    "layers": [
        {
            "layer": layer,
            "replicas": [
                {"expert": 0, "rank": 0, "format": "bf16", "share": 0.6},
                {"expert": 0, "rank": 1, "format": "bf16", "share": 0.4},
                {"expert": 1, "rank": 0, "format": "int8", "share": 1.0},
                {"expert": 2, "rank": 1, "format": "int8", "share": 1.0},
            ],
        }
        for layer in (3, 4)
    ],
}

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="no Chromium here"), pytest.mark.slow]


@pytest.fixture
def url() -> Iterator[str]:
    bench = Bench()
    bench.service.begin(bench.limits, PLACEMENT, {})
    bench.service.load_view.add(LOADS)
    router = FakeGroup(2).router
    router.on_loss(1, "rank 1 died")
    bench.service.members = MembershipView(router.membership, router)
    for num_unfinished in (1, 4):
        bench.complete()
        bench.service.metrics.loads(LOADS)
        bench.service.history.sample(num_unfinished)
    app = make_app(bench.service, max_body_bytes=2000)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/dashboard"
    server.should_exit = True
    thread.join(10)


def test_it_draws_ranks_experts_and_times(url: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    picture = tmp_path / "dashboard.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=1500",
    ]
    dumped = subprocess.run([BROWSER, *options, "--dump-dom", url], capture_output=True, text=True, timeout=120).stdout
    assert 'data-ready="yes"' in dumped
    for shown in (
        "org/tiny",
        "layer 3",
        "layer 4",
        "1.50",
        "live",
        "int8",
        "rank 0: 30 pairs",
        "rank 1: lost",
        "1 of 2",
    ):
        assert shown in dumped, dumped[-3000:]
    assert dumped.count('<path d="M') == 7, "four charts, seven lines"
    draw = [BROWSER, *options, f"--screenshot={picture}", "--window-size=1200,900", url]
    subprocess.run(draw, capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000
