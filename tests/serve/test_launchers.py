"""The server under other launchers than torchrun, and without one."""

import signal
from pathlib import Path

import openai
import pytest

from tests.serve.running import Launcher, by_hand, deepspeed, running

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
