from pathlib import Path

from rq_ep.__main__ import main
from rq_ep.core.stats import ExpertStats


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


def test_users_mistakes_are_one_line_each(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
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
    ):
        arguments = [word for pair in {**good, flag: value}.items() for word in pair]
        assert main(["calibrate", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("rq-ep calibrate: error: ")
        assert message in error
    assert not (tmp_path / "s").exists()
