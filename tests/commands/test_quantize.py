from pathlib import Path

from rq_ep.__main__ import main


def test_experts_are_written_then_calibrated_and_evaluated(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    model, text = str(tiny_checkpoint), str(tiny_checkpoint / "text" / "train")
    out, stats, placement = (str(tmp_path / name) for name in ("experts", "stats.safetensors", "placement.json"))
    assert main(["quantize", "--model", model, "--formats", "int8", "--text", text, "--out", out]) == 0
    assert "2 layers" in capsys.readouterr().out
    sample = ["--max-tokens", "1024", "--sequence-length", "64"]
    assert main(["calibrate", "--model", model, "--text", text, "--experts", out, "--out", stats, *sample]) == 0
    assert main(["place", "--stats", stats, "--num-ranks", "2", "--formats", "bf16,int8", "--out", placement]) == 0
    assert main([
        "eval", "--model", model, "--text", text, "--placement", placement, "--strategies", "rq", "--experts", out,
        "--greedy-tokens", "0", "--no-noise-floor", *sample,
    ]) == 0  # fmt: skip
    assert "rq" in capsys.readouterr().out


def test_users_mistakes_are_one_line_each(tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    start = ["quantize", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "experts")]
    for more, message in (
        (["--formats", "int9"], "did you mean 'int8'"),
        (["--formats", "int8", "--rounding", "none"], "unknown --rounding 'none'"),
        (["--placement", str(tmp_path / "none.json")], "no such file"),
    ):
        assert main([*start, *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
