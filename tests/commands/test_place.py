"""`rq-ep place` from file to file."""

from pathlib import Path

import numpy as np
import pytest

from rq_ep.__main__ import main
from rq_ep.core.moves import Moves
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ExpertStats
from rq_ep.interchange import export


@pytest.fixture
def stats(tmp_path: Path) -> str:
    popularity = 1 / np.arange(1, 9)
    counts_SLE = np.random.default_rng(0).multinomial(800, popularity / popularity.sum(), size=(6, 2))
    file = tmp_path / "stats.safetensors"
    sizes = {"bf16": 1000, "int8": 504}
    ExpertStats(counts_SLE, ("bf16", "int8"), "bf16", sizes, layers=(1, 2), top_k=2).save(file)
    return str(file)


def test_writes_a_placement_and_a_picture_and_says_what_it_did(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "placement.json"
    options = ["--budget", "4KB,4KB", "--formats", "bf16,int8", "--tokens-per-step", "64", "--seed", "3"]
    arguments = ["place", "--stats", stats, "--num-ranks", "2", *options, "--out", str(out)]
    assert main(arguments) == 2
    assert "too small" in capsys.readouterr().err
    assert not out.exists()
    arguments[arguments.index("4KB,4KB")] = "8KB,7KB"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("predicted", "bound", "gap", "binding", "8,000", "7,000", "low precision", "standard EP"):
        assert word in printed
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = out.read_text()
    assert main(arguments) == 0  # over itself
    assert out.read_text() == first
    placement = Placement.load(out)
    assert placement.budget_bytes_R == (8000, 7000)
    assert placement.tokens_per_step == 64
    assert [layer.index for layer in placement.layers] == [1, 2]
    assert sorted(file.name for file in out.parent.iterdir()) == ["placement.json", "placement.png"]


def test_a_file_gives_what_flags_leave_out(stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, config = tmp_path / "placement.json", tmp_path / "place.yaml"
    config.write_text(
        f"stats: {stats}\nnum_ranks: 2\nbudget: 9KB\nformats: [bf16, int8]\nplot: false\nworkers: 1\n"
        "max-low-precision-share: 0.1\nstrategy: standard\nmax_moved_bytes: 4000\n"
    )
    assert main(["place", "--config", str(config), "--out", str(out)]) == 2
    assert "speak of the way from --current" in capsys.readouterr().err
    config.write_text(config.read_text().replace("max_moved_bytes: 4000", "max_moved_bytes:"))
    assert main(["place", "--config", str(config), "--out", str(out), "--strategy", "rq", "--num-ranks", "4"]) == 0
    placement = Placement.load(out)
    assert (placement.strategy, placement.topology.num_ranks, placement.low_precision_cap) == ("rq", 4, 0.1)
    assert placement.budget_bytes_R == (9000,) * 4
    assert not out.with_suffix(".png").exists()
    for line, message in (
        ("tail_weight: 2", "place.yaml: --tail-weight 2: must be at most 1"),
        ("wrokers: 2", "did you mean 'workers'"),
        ("lost_ranks: [1, x]", "--lost-ranks 'x': must be a whole number"),
        ("max_moved_bytes: 4 cows", "--max-moved-bytes 4 cows: '4 cows' is not a size"),
    ):
        config.write_text(f"stats: {stats}\nnum_ranks: 2\n{line}\n")
        assert main(["place", "--config", str(config), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["standard", "eplb", "llep", "rq_paper", "rq_llep"])
def test_other_strategies(stats: str, tmp_path: Path, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "placement.json"
    arguments = ["place", "--stats", stats, "--num-ranks", "3", "--strategy", strategy, "--no-plot", "--out", str(out)]
    assert main(arguments) == 0
    assert Placement.load(out).strategy == strategy
    assert ("allowed, never used" in capsys.readouterr().out) == (strategy in ("standard", "eplb", "llep"))
    assert not out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("engine", "suffix"), [("sglang", ".json"), ("trtllm", ".yaml"), ("ascend", ".json"), ("eplb", ".npz")]
)
def test_placements_for_other_engines_can_be_exported(stats: str, tmp_path: Path, engine: str, suffix: str) -> None:
    out = tmp_path / "placement.json"
    slots = ["--num-redundant-experts", "4", "--budget", "6000"]
    command = ["place", "--stats", stats, "--num-ranks", "4", "--for", engine, *slots, "--no-plot", "--out", str(out)]
    assert main(command) == 0
    placement = Placement.load(out)
    assert placement.strategy == "eplb"
    assert placement.bytes_R == (6000,) * 4
    assert placement.certificate["predicted"] <= placement.certificate["searched_from"] + 1e-3
    export(placement, engine, tmp_path / f"map{suffix}")
    assert main([*command, "--budget", "7000"]) == 0
    again = Placement.load(out)
    assert [list(layer.replicas) for layer in again.layers] == [list(layer.replicas) for layer in placement.layers]


def test_moves_and_what_if_are_written_and_printed(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current, out, moves = tmp_path / "current.json", tmp_path / "new.json", tmp_path / "moves.json"
    command = ["place", "--stats", stats, "--num-ranks", "2", "--budget", "9KB", "--no-plot", "--out"]
    assert main([*command, str(current), "--strategy", "standard"]) == 0
    assert "what if" not in capsys.readouterr().out
    options = ["--current", str(current), "--moves", str(moves), "--max-moved-bytes", "4KB", "--what-if"]
    assert main([*command, str(out), *options]) == 0
    printed = capsys.readouterr().out
    for text in (
        "what if: 10% more bytes",
        "low pairs up to 30%",
        "on the other half",
        "staying predicted",
        "moves in",
    ):
        assert text in printed
    assert printed.count("\n") <= 45, "one screen"
    received_R = Moves.load(moves).received_bytes_R({"bf16": 1000, "int8": 504})
    assert received_R.sum() == Placement.load(out).certificate["replaced"]["moved_bytes"] <= 4000
    assert len(Placement.load(out).certificate["what_if"]) == 3


def test_many_layers_and_ranks_fit_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts_SLE = np.random.default_rng(0).integers(1, 90, (3, 40, 64))
    file, out = tmp_path / "stats.safetensors", tmp_path / "placement.json"
    ExpertStats(counts_SLE, ("bf16",), "bf16", {"bf16": 1000}).save(file)
    assert main(["place", "--stats", str(file), "--num-ranks", "64", "--strategy", "eplb", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Worst 8 of 40 layers" in printed
    assert "Busiest and idlest of 64 ranks" in printed
    assert printed.count("\n") <= 45


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "many"], "--budget many"),
        (["--strategy", "eqlb"], "did you mean 'eplb'"),
        (["--formats", "bf16,int9"], "no sizes for int9"),
        (["--stats", "nowhere.safetensors"], "no such file"),
        (["--strategy", "eplb", "--num-redundant-experts", "3"], "needs more bytes than --budget ep"),
        (["--num-ranks", "0"], "--num-ranks 0: must be at least 1"),
        (["--num-ranks", "1000000000"], "must be at most 4096"),
        (["--budget", "9" * 30], "must be at most"),
        (["--budget", "1,2,3"], "3 sizes for 2 ranks"),
        (["--budget", "-5"], "'-5' is not a size"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--max-low-precision-share", "nan"], "must be a number"),
        (["--out", "/"], "--out /: is a directory"),
        (["--out", "/dev/null/p.json"], "/dev/null/p.json: cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "placement.json"
    assert main(["place", "--stats", stats, "--num-ranks", "2", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rq-ep place: error:")
    assert message in error
    assert not out.exists()


def test_what_the_command_reads_or_writes_is_not_overwritten(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = Path(stats).read_bytes(), str(tmp_path / "placement.json")
    for flags in (["--out", f"{tmp_path}/../{tmp_path.name}/stats.safetensors"], ["--out", out, "--moves", out]):
        assert main(["place", "--stats", stats, "--num-ranks", "2", *flags]) == 2
        assert f"{flags[-2]} {flags[-1]}: the command reads or writes this file already" in capsys.readouterr().err
    assert Path(stats).read_bytes() == before
