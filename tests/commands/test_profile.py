"""`rq-ep profile` from options to a file that prices plans."""

from pathlib import Path

import numpy as np
import pytest

from rq_ep.__main__ import main
from rq_ep.core.stats import ExpertStats
from rq_ep.costs import Profile
from rq_ep.costs.shapes import SHAPES
from tests.parallel.processes import exit_codes

pytestmark = pytest.mark.slow

SMALL = ["--hidden-size", "16", "--intermediate-size", "24", "--num-experts", "4", "--repeat-seconds", "0"]


def test_writes_what_simulate_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", "--out", str(out), "--device", "cpu", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "figures of a CPU" in printed
    assert "link not measured, that of machine 'cpu'" in printed
    profile = Profile.load(out)
    assert (profile.hidden_size, profile.intermediate_size, profile.num_experts, profile.top_k) == (16, 24, 4, 2)
    assert list(profile.experts) == ["bf16", "int8"]

    counts_SLE = np.random.default_rng(0).integers(0, 50, (3, 1, 4))
    sizes = {"bf16": 2304, "int8": 1408}
    stats = tmp_path / "stats.safetensors"
    command = ["simulate", "--stats", str(stats), "--num-ranks", "2", "--machine", str(out)]
    ExpertStats(counts_SLE, tuple(sizes), "bf16", sizes, hidden_size=16, intermediate_size=24).save(stats)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "ms/step" in printed
    assert profile.device in printed
    ExpertStats(counts_SLE, tuple(sizes), "bf16", sizes, hidden_size=16, intermediate_size=32).save(stats)
    assert main(command) == 2
    assert "hidden size 16 and intermediate size 24, not 16 and 32" in capsys.readouterr().err


def test_takes_the_sizes_of_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    small = ["--hidden-size", "16", "--intermediate-size", "24", "--repeat-seconds", "0", "--formats", "bf16"]
    assert main(["profile", "--out", str(out), "--device", "cpu", "--shape", "gpt_oss_120b", *small]) == 0
    profile = Profile.load(out)
    assert (profile.hidden_size, profile.intermediate_size, profile.num_experts, profile.top_k) == (16, 24, 128, 4)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(SHAPES) <= set(words)


def test_takes_the_sizes_of_a_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = str(tmp_path / "profile.json")
    options = ["--formats", "int8", "--dtype", "bfloat16", "--device", "cpu", "--repeat-seconds", "0"]
    assert main(["profile", "--out", out, "--model", str(tiny_checkpoint), *options]) == 0
    profile = Profile.load(out)
    assert (profile.hidden_size, profile.intermediate_size, profile.num_experts, profile.top_k) == (64, 32, 8, 2)
    assert (profile.dtype, list(profile.experts)) == ("bfloat16", ["int8"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "int9"], "did you mean 'int8'"),
        (["--formats", ","], "name at least one"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--device", "gpu"], "unknown --device 'gpu'"),
        (["--hidden-size", "0"], "--hidden-size 0: must be at least 1"),
        (["--shape", "mixtrl"], "unknown --shape 'mixtrl': did you mean 'mixtral'"),
        (["--shape", "mixtral", "--model", "nowhere"], "the model has its own shape"),
        (["--top-k", "9"], "--top-k 9: more than the 8 experts"),
        (["--link-machine", "h2000"], "did you mean 'h200'"),
        (["--repeat-seconds", "-1"], "--repeat-seconds -1.0: must be at least 0"),
        (["--model", "nowhere", "--top-k", "2"], "the model has its own top_k"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["profile", "--out", str(tmp_path / "profile.json"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.dist
def test_two_ranks_time_their_link(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    command = ["rq_ep", "profile", "--out", str(out), "--device", "cpu", *SMALL]
    codes, printed = exit_codes(2, command, tmp_path, timeout_s=120)
    assert codes == [0, 0], printed
    assert printed.count("figures of a CPU") == 1  # rank 0 speaks
    profile = Profile.load(out)
    assert profile.num_ranks == 2
    assert profile.link.source == "measured between 2 ranks, gloo"
    assert profile.link.latency_s > 0
