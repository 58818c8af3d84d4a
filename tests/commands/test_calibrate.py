from pathlib import Path

import numpy as np
import pytest

from rq_ep.__main__ import main
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.evaluation import evaluate
from tests.parallel.processes import exit_codes


def test_writes_statistics_and_prints_a_row_for_each_layer(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "stats.safetensors"
    text = tiny_checkpoint / "text" / "train"
    command = ["calibrate", "--model", str(tiny_checkpoint), "--out", str(out), "--max-tokens", "4096",
               "--sequence-length", "64", "--batch-size", "4", "--formats", "bf16,int8", "--text"]  # fmt: skip
    assert main([*command, str(text / "prose"), str(text / "code")]) == 0
    printed = capsys.readouterr().out
    assert "int8 error" in printed
    assert "4096 tokens of code, prose" in printed
    stats = ExpertStats.load(out)
    assert (stats.num_tokens, stats.num_layers, stats.domains) == (4096, 2, ("code", "prose"))


def test_a_file_gives_what_flags_leave_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "stats.safetensors", tmp_path / "calibrate.yaml"
    text = tiny_checkpoint / "text" / "train"
    config.write_text(
        f"model: {tiny_checkpoint}\ntext: [{text}/prose, {text}/code]\nmax_tokens: 4096\nsequence-length: 32\n"
    )
    assert main(["calibrate", "--config", str(config), "--out", str(out), "--max-tokens", "2048"]) == 0
    stats = ExpertStats.load(out)
    assert (stats.num_tokens, stats.domains) == (2048, ("code", "prose"))


@pytest.mark.dist
def test_two_ranks_write_what_one_process_writes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = str(tiny_checkpoint / "text" / "train" / "prose")
    command = ["calibrate", "--model", str(tiny_checkpoint), "--text", text, "--max-tokens", "2048", "--dtype",
               "float32", "--sequence-length", "32", "--device", "cpu", "--formats", "int4_g32", "--out"]  # fmt: skip
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert main([*command, str(one)]) == 0
    codes, printed = exit_codes(2, ["rq_ep", *command, str(two)], tmp_path, timeout_s=120)
    assert codes == [0, 0], printed
    assert printed.count("int4_g32 error") == printed.count("2048 tokens of prose") == 1
    expected, sharded = (ExpertStats.load(path) for path in (one, two))
    assert np.array_equal(sharded.counts, expected.counts)
    for name in ("importance", "gate_mass", "error"):
        assert np.allclose(getattr(sharded, name), getattr(expected, name), rtol=1e-4), name
    assert sharded.model == expected.model


def test_users_mistakes_are_one_line_each_before_weights_are_read(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "open", lambda *_, **__: pytest.fail("weights are read"))
    good = {"--model": str(tiny_checkpoint), "--text": str(tiny_checkpoint / "text"), "--out": str(tmp_path / "s")}
    for flag, value, message in (
        ("--model", str(tmp_path / "nowhere"), "no such directory"),
        ("--text", str(tmp_path / "nothing.txt"), "nothing.txt: no such file"),
        ("--formats", "int7", "did you mean 'int8'"),
        ("--dtype", "floa32", "did you mean 'float32'"),
        ("--max-tokens", "100", "--max-tokens 100"),
        ("--sequence-length", "0", "--sequence-length 0: must be at least 1"),
        ("--sequence-length", "9999", "reads at most 512 tokens"),
        ("--seed", "-1", "--seed -1: must be at least 0"),
        ("--out", str(tmp_path), "is a directory"),
        ("--trace", str(tmp_path / "s"), "reads or writes this file already"),
        ("--experts", str(tmp_path / "nowhere"), "nowhere"),
    ):
        arguments = [word for pair in {**good, flag: value}.items() for word in pair]
        assert main(["calibrate", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("rq-ep calibrate: error: ")
        assert message in error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "command", ["quantize --formats int4_g32 --out experts", "eval --num-ranks 2 --strategies eplb"]
)
def test_too_little_text_is_refused_before_weights_are_read(
    command: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LoadedModel, "open", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr(evaluate, "load_whole_model", lambda *_, **__: pytest.fail("weights are read"))
    text = str(tiny_checkpoint / "text")
    assert main([*command.split(), "--model", str(tiny_checkpoint), "--text", text, "--max-tokens", "100"]) == 2
    assert "--max-tokens 100: 4 domains (c, code, prose, table) need" in capsys.readouterr().err
