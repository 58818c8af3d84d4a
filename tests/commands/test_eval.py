import json
from pathlib import Path

import pytest

from rq_ep.__main__ import main
from rq_ep.commands.common import parse_strategies
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.placing.place import place
from rq_ep.strategies.llep import Llep


@pytest.fixture(scope="module")
def placement(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placement") / "placement.json"
    stats = calibrate(tiny_checkpoint, tiny_checkpoint / "text" / "train", max_tokens=4096)
    place(stats, 2).save(path)
    return path


def arguments(model: Path, *more: str | Path) -> list[str]:
    fixed = ["--max-tokens", "1024", "--sequence-length", "64", "--batch-size", "4"]
    return ["eval", "--model", str(model), "--text", str(model / "text" / "held-out"), *fixed, *map(str, more)]


def test_table_figures_and_picture(tiny_checkpoint: Path, placement: Path, tmp_path: Path, capsys) -> None:
    profile = tmp_path / "profile.json"
    sizes = ["--model", str(tiny_checkpoint), "--repeat-seconds", "0", "--device", "cpu"]
    assert main(["profile", "--out", str(profile), *sizes]) == 0
    capsys.readouterr()
    figures, picture = tmp_path / "eval.json", tmp_path / "loads.png"
    settings = ["--set", "llep.min_tokens_per_gemm=8", "--set", "llep.fallback_ratio=1.0"]
    assert main(arguments(
        tiny_checkpoint, "--placement", placement, *settings, "--json", figures, "--plot", picture,
        "--machine", profile, "--device", "cpu",
    )) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "2 ranks" in printed  # the placement's
    assert "standard, eplb, llep, rq_llep: no --placement was given" in printed
    document = json.loads(figures.read_text())
    rows = {row["label"]: row for row in document["rows"]}
    assert list(rows) == ["standard", "eplb", "llep", "rq", "rq_llep"]
    assert all(label in printed for label in [*rows, "dense"])
    assert rows["standard"]["agreement"]["mean"] == 1
    assert rows["rq"]["bytes_R"] == list(Placement.load(placement).bytes_R)
    assert document["strategies"]["llep"]["min_tokens_per_gemm"] == 8
    assert "predicted" in printed
    for row in rows.values():
        assert row["predicted_s_p50"] > 0
        assert row["prediction_error"] >= 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_users_mistakes_are_one_line_each(tiny_checkpoint: Path, placement: Path, tmp_path: Path, capsys) -> None:
    for more, message in (
        (["--strategies", "standrad"], "did you mean 'standard'"),
        (["--set", "llep.min_tokens=16"], "min_tokens"),
        (["--set", "llep=16"], "expected NAME.SETTING=VALUE"),
        (["--strategies", "rq", "--set", "llep.fallback_ratio=2"], "unknown strategy in --set 'llep'"),
        (["--placement", tmp_path / "none.json"], "none.json: no such file"),
        (["--placement", placement, "--num-ranks", "3"], "2 ranks, but 3 were started"),
        (["--dtype", "float8"], "--dtype"),
        (["--machine", tmp_path / "none.json"], "write one with `rq-ep profile`"),
        (["--num-ranks", "0"], "--num-ranks 0: must be at least 1"),
        (["--strategies", ","], "--strategies: name at least one"),
        (["--set", "rq.name=x"], "unknown setting of strategy 'rq' 'name'"),
        (["--set", "standard.x=1"], "'standard' has no settings"),
        (["--set", "llep.fallback_ratio=[1"], "'[1' is not a value"),
        (["--set", "llep.min_tokens_per_gemm=many"], "min_tokens_per_gemm 'many': must be a whole number"),
        (["--set", "rq.max_steps=0"], "max_steps 0: must be at least 1"),
        (["--sequence-length", "1"], "--sequence-length 1: must be at least 2"),
        (["--sequence-length", "9999"], "reads at most 512 tokens"),
        (["--json", tmp_path], "is a directory"),
        (["--device", "gpu"], "unknown --device 'gpu'"),
    ):
        assert main(arguments(tiny_checkpoint, *more)) == 2, more
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("rq-ep eval: error: "), error
        assert message in error


def test_settings_of_strategies() -> None:
    strategies = parse_strategies(["rq", "llep"], ["llep.min-tokens-per-gemm=16", "llep.fallback_on=expert"])
    assert list(strategies) == ["rq", "llep"]
    assert strategies["llep"] == Llep(min_tokens_per_gemm=16, fallback_on="expert")
    with pytest.raises(UserError, match="setting of strategy 'llep'"):
        parse_strategies(["llep"], ["llep.alpha=1"])
