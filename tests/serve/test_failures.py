"""What happens when something is wrong: one line for a user's error, a quick end of all when a rank dies."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from bench.serving.ports import free_port
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ModelIdentity
from rq_ep.core.topology import Topology
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.serve.__main__ import main
from tests.serve.running import SERVE, running, torchrun

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def write_placement(path: Path, num_ranks: int, model: ModelIdentity | None = None) -> str:
    layers = tuple(
        LayerPlacement.even(layer, 8, [Replica(expert % num_ranks, expert, "bf16") for expert in range(8)])
        for layer in range(2)
    )
    Placement(layers, "standard", Topology(num_ranks), (0,) * num_ranks, model=model).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m", "--prot", "80"], "unrecognized arguments: --prot 80"),
        (["--model", "m", "--port", "eighty"], "--port 'eighty': must be a whole number"),
        ([], "--model is needed"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rq_ep.serve: error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("case", ["model", "strategy", "setting", "ranks", "foreign", "records", "length", "tokenizer"])
def test_what_a_user_can_put_right_is_printed_in_one_line(
    case: str, tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint)
    other = ModelIdentity("other", "0" * 64)
    arguments, message = {
        "model": (["--model", "/nowhere"], "/nowhere: no such directory"),
        "strategy": (["--model", model, "--strategy", "rqq"], "unknown strategy 'rqq': did you mean 'rq'?"),
        "setting": (["--model", model, "--strategy", "{name: llep, nope: 1}"], "'nope'"),
        "ranks": (
            ["--model", model, "--placement", write_placement(tmp_path / "p", 4)],
            "is for 4 ranks, but 1 were started",
        ),
        "foreign": (
            ["--model", model, "--placement", write_placement(tmp_path / "foreign", 1, other)],
            "was made for model 'other'",
        ),
        "records": (["--model", model, "--record-dir", "/nowhere"], "--record-dir /nowhere: no such directory"),
        "length": (["--model", model, "--max-model-len", "600"], "--max-model-len 600: the model was made for 512"),
        "tokenizer": (["--model", str(tmp_path / "mute")], "no tokenizer; copy tokenizer.json"),
    }[case]
    if case == "tokenizer":
        shutil.copytree(tiny_checkpoint, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*", "text"))
    assert main([*arguments, "--port", "0", "--device", "cpu", "--log-level", "error"]) == 2
    printed = [line for line in capfd.readouterr().err.splitlines() if line and "WARNING" not in line]
    assert len(printed) == 1, printed
    assert printed[0].startswith("rq_ep.serve: error: ")
    assert message in printed[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "rqq"], "unknown strategy 'rqq'"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: not readable"),
    ],
)
def test_what_needs_no_model_is_refused_before_torch_is_imported(
    arguments: list[str], message: str, tiny_checkpoint: Path
) -> None:
    code = "import sys; from rq_ep.serve.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--model", str(tiny_checkpoint), "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert message in done.stderr
    assert done.returncode == 0, "torch was imported"


def test_a_dry_run_prints_settings_placement_and_bytes(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tiny_checkpoint), "--dry-run", "--max-num-seqs", "5", "--local_rank=0"]) == 0
    printed = capsys.readouterr().out
    assert "max_num_seqs: 5" in printed
    assert "2 MoE layers of 8 experts on 1 ranks" in printed
    layout = ExpertLayout({"gate_up_proj": (2 * 32, 64), "down_proj": (64, 32)})
    assert f"experts {2 * 8 * get_format('bf16').nbytes(layout):,} (" in printed
    token_bytes = 2 * 2 * 64 * 2  # keys and values, layers, all heads, bf16
    assert (
        f"paged KV cache: {token_bytes:,} bytes a token; 16,384 tokens, {16384 * token_bytes:,} bytes a rank" in printed
    )
    assert "bytes for rows on their way and the KV cache" in printed


def test_mistakes_end_every_rank_with_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    placement = write_placement(tmp_path / "placement.json", 4)
    arguments = ["--model", str(tiny_checkpoint), "--placement", placement, "--port", "0", "--device", "cpu"]
    with free_port() as port:
        command = [*torchrun(2, port), *SERVE[torchrun], *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    printed = [line for line in done.stderr.splitlines() if line.startswith("rq_ep.serve: error: ")]
    assert len(printed) == 1, done.stderr
    assert "is for 4 ranks, but 2 were started" in printed[0]
    assert "exitcode  : 2" in done.stderr
    assert "rq_ep/serve" not in done.stderr, "no traceback"


def test_a_killed_rank_ends_the_group_and_is_named(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    arguments = ["--model", str(tiny_checkpoint), "--device", "cpu", "--on-rank-failure", "stop"]
    with running(log, 2, *arguments) as server:
        processes = server.tree()
        body = {"model": str(tiny_checkpoint), "prompt": "a", "max_tokens": 480, "stream": True, "ignore_eos": True}
        port = server.url.rpartition(":")[2]

        assert main(["--model", str(tiny_checkpoint), "--port", port, "--device", "cpu"]) == 2
        assert f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port" in (
            capfd.readouterr().err
        )

        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.rank(1).kill()
            killed_s = time.monotonic()
            last = [line for line in lines if line][-1]
        assert time.monotonic() - killed_s < 60, "long before the collectives of the other ranks time out"
        assert "the server failed: rank 1 died" in last
        assert server.wait(processes, 120) != 0
        with pytest.raises(httpx.ConnectError):
            server.client.get("/health")
    assert "the group has failed: rank 1 died" in log.read_text()
