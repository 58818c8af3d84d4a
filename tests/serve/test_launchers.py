"""The server under other launchers than torchrun, and without one."""

import signal
import subprocess
from pathlib import Path

import openai
import psutil
import pytest

from tests.serve.running import ROOT, Launcher, by_hand, by_ones, deepspeed, running, until

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("launcher", "num_ranks"), [(deepspeed, 2), (by_hand, 1)])
def test_it_serves_and_ends(launcher: Launcher, num_ranks: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_checkpoint), "--served-model-name", "tiny", "--device", "cpu"]
    with running(tmp_path / "log", num_ranks, *arguments, launcher=launcher) as server:
        processes = server.tree()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.completions.create(model="tiny", prompt="import", max_tokens=5, extra_body={"ignore_eos": True})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        server.signal(0, signal.SIGTERM)
        assert server.wait(processes, 30) == 0


def test_it_begins_with_the_rank_that_is_there_and_the_other_joins_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(tiny_checkpoint),
        "--served-model-name",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    arguments += ["--min-ranks", "1", "--wait-for-ranks", "0"]
    body = {"model": "tiny", "prompt": "import", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with running(tmp_path / "log", 2, *arguments, launcher=by_ones) as server:

        def answer() -> str:
            text: str = server.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            return text

        alone = answer()
        reason = "1 of 2 ranks serve: rank 1 is expected (it has not come yet)"
        assert server.client.get("/health").json() == {"status": "degraded", "reason": reason}
        first = psutil.Process(server.process.pid)
        with (tmp_path / "late").open("wb") as log:
            environment = first.environ() | {"RANK": "1", "LOCAL_RANK": "1"}
            late = subprocess.Popen(first.cmdline(), env=environment, cwd=ROOT, stdout=log, stderr=log)
        try:
            until(lambda: server.client.get("/health").json() == {"status": "ok"})
            assert answer() == alone
            server.signal(0, signal.SIGTERM)
            assert (server.wait(server.tree(), 30), late.wait(30)) == (0, 0)
        finally:
            late.kill()
            late.wait()
