"""What a user may get wrong in files and numbers: one line that names it, exit status 2, and no file left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rq_ep.__main__ import main
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ExpertStats
from tests.solver.instances import skewed

SIZES = {"bf16": 1000, "int8": 504}


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    counts_SLE = np.stack([skewed(8, 800, layer, 20) for layer in range(2)], axis=1)
    file = tmp_path / "stats.safetensors"
    ExpertStats(counts_SLE, ("bf16", "int8"), "bf16", SIZES, layers=(1, 2), top_k=2).save(file)
    return file


def refused(capsys: pytest.CaptureFixture[str], folder: Path, stats: Path, *options: str) -> str:
    """The one line that `rq-ep place` ends with; asserts that it wrote nothing."""
    before = sorted(folder.iterdir())
    out = folder / "out" / "placement.json"
    assert main(["place", "--stats", str(stats), "--num-ranks", "4", "--out", str(out), *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rq-ep place: error: ")
    left = [path for path in sorted(folder.rglob("*")) if path.parent != folder and not path.is_dir()]
    assert left == []
    assert [path for path in sorted(folder.iterdir()) if path.name != "out"] == before
    return line


def changed_arrays(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def change_file(file: Path) -> None:
        arrays = load_file(file)
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
        change(arrays)
        save_file(arrays, file, metadata)

    return change_file


def changed_metadata(**entries: Any) -> Callable[[Path], None]:
    def change_file(file: Path) -> None:
        arrays = load_file(file)
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
        save_file(arrays, file, {**metadata, **{key: json.dumps(value) for key, value in entries.items()}})

    return change_file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_arrays(lambda arrays: arrays["counts"].fill(0)), "0 routed pairs in 20 steps"),
        (changed_arrays(lambda arrays: arrays.update(counts=arrays["counts"][:0])), "0 routed pairs in 0 steps"),
        (changed_arrays(lambda arrays: arrays.update(counts=arrays["counts"] + 0.5)), "counts must be whole numbers"),
        (changed_arrays(lambda arrays: arrays.update(importance=np.full((2, 8), np.nan))), "but one is nan"),
        (changed_arrays(lambda arrays: arrays["counts"].__imul__(-1)), "must be finite and not negative"),
        (changed_arrays(lambda arrays: arrays["counts"].fill(2**52)), "these are not pairs of a model"),
        (changed_arrays(lambda arrays: arrays.update(counts=arrays["counts"][:, :0])), "for 0 layers of counts"),
        (changed_arrays(lambda arrays: arrays.pop("counts")), "incomplete statistics file"),
        (changed_metadata(format="rq_ep.stats/2"), "expected 'rq_ep.stats/1'"),
        (changed_metadata(expert_bytes={"bf16": 10**30, "int8": 5}), "must be at most"),
        (changed_metadata(expert_bytes={"bf16": 1000}), "expert_bytes lacks int8"),
        (changed_metadata(layers=[1, 1]), "must come once each"),
        (changed_metadata(formats=["bf16", "bf16"]), "a format is named twice"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "not a readable statistics file"),
        (lambda file: file.write_bytes(b""), "not a readable statistics file"),
        (lambda file: file.write_text('{"format": "rq_ep.placement/1"}'), "not a readable statistics file"),
        (lambda file: file.write_bytes(b"\xff" * 4096), "not a readable statistics file"),
    ],
)
def test_statistics(
    stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], message: str
) -> None:
    change(stats)
    line = refused(capsys, tmp_path, stats)
    assert message in line
    assert str(stats) in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "3000"], "too small for a replica of every expert on 4 ranks: raise it to "),
        (["--budget", "3999", "--max-low-precision-share", "0"], "raise it to 4000 bytes per rank"),
        (["--budget", "3600", "--max-low-precision-share", "0.001"], "too small for a replica of every expert"),
        (["--budget", "0,0,0,16000", "--strategy", "standard"], "exceed its budget of 0"),
        (["--budget", "1" * 50], "must be at most"),
        (["--num-ranks", "4097"], "--num-ranks 4097: must be at most 4096"),
        (["--num-ranks", "-1"], "--num-ranks -1: must be at least 1"),
        (["--ranks-per-node", "-2"], "--ranks-per-node -2"),
        (["--max-error", "0.1"], "holds no measured errors"),
        (["--objective", "fast"], "unknown --objective 'fast'"),
        (["--objective", "mixed"], "does not say which steps are prefill"),
        (["--tail-weight", "7"], "--tail-weight 7.0: must be at most 1"),
        (["--time-limit", "nan"], "--time-limit nan: must be a number"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--workers", "99999"], "--workers 99999: must be at most"),
        (["--machine", "h200"], "does not name hidden_size"),
        (["--rules", "none.yaml"], "none.yaml: no such file"),
        (["--for", "sglong"], "did you mean 'sglang'"),
        (["--for", "sglang", "--strategy", "rq"], "place with eplb, not 'rq'"),
        (["--for", "sglang", "--num-redundant-experts", "3"], "not a multiple of 4 ranks"),
        (["--lost-ranks", "1"], "speak of the way from --current"),
        (["--moves", "moves.json"], "moves lead from --current"),
        (["--current", "none.json"], "none.json: no such file"),
        (["--tokens-per-step", "0"], "--tokens-per-step 0"),
        (["--strategy", "eplb", "--num-redundant-experts", "9" * 20], "--num-redundant-experts 99999999999999999999"),
    ],
)
def test_options(
    stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refused(capsys, tmp_path, stats, *options)


@pytest.fixture
def current(stats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    file = tmp_path / "current.json"
    options = ["--num-ranks", "4", "--strategy", "eplb", "--no-plot", "--out", str(file)]
    assert main(["place", "--stats", str(stats), *options]) == 0
    capsys.readouterr()
    return file


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return edit


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (lambda text: text[: len(text) // 2], [], "not a readable placement file"),
        (lambda text: "", [], "not a readable placement file"),
        (lambda text: "[" * 200_000, [], "nested too deeply"),
        (lambda text: '{"format": "rq_ep.stats/1"}', [], "expected 'rq_ep.placement/1'"),
        (edited(lambda document: document.update(num_ranks=10**9)), [], "must be at most 4096"),
        (edited(lambda document: document.update(layers=document["layers"][:1])), [], "experts per layer"),
        (edited(lambda document: document["bytes"].__setitem__(0, 1)), [], "claims 1 expert bytes on rank 0"),
        (edited(lambda document: document["layers"][0]["replicas"][0].update(expert=7)), [], "has no replica"),
        (edited(lambda document: document["layers"][0]["replicas"][0].update(rank=-1)), [], "rank -1"),
        (edited(lambda document: document["layers"][0]["replicas"][0].update(share=2)), [], "share 2"),
        (edited(lambda document: document["layers"][0]["replicas"][0].update(format="int9")), [], "int9"),
        (lambda text: text, ["--lost-ranks", "4"], "has ranks 0 to 3"),
        (lambda text: text, ["--lost-ranks", "one"], "--lost-ranks 'one': must be a whole number"),
        (lambda text: text, ["--lost-ranks", "0,1,2,3"], "all 4 ranks are lost"),
        (lambda text: text, ["--max-moved-bytes", "lots"], "--max-moved-bytes lots"),
        (lambda text: text, ["--move-price", "-1"], "--move-price -1.0: must be at least 0"),
        (lambda text: text, ["--min-gain", "nan"], "--min-gain nan: must be a number"),
        (lambda text: text, ["--lost-ranks", "0", "--max-moved-bytes", "1"], "--max-moved-bytes 1: no placement found"),
    ],
)
def test_current_placements(
    stats: Path,
    current: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[str], str],
    options: list[str],
    message: str,
) -> None:
    current.write_text(edit(current.read_text()))
    moves = ["--moves", str(tmp_path / "out" / "moves.json")]
    assert message in refused(capsys, tmp_path, stats, "--current", str(current), *moves, *options)


def test_what_is_odd_and_legal_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts_SLE = np.zeros((1, 2, 3), np.int64)
    counts_SLE[0, 0] = [5, 4, 3]
    file, out = tmp_path / "stats.safetensors", tmp_path / "placement.json"
    ExpertStats(counts_SLE, ("bf16",), "bf16", {"bf16": 1000}, layers=(4, 9)).save(file)
    options = ["--num-ranks", "8", "--strategy", "standard", "--no-plot", "--out", str(out)]
    assert main(["place", "--stats", str(file), *options]) == 0
    printed = capsys.readouterr().out
    warnings = Placement.load(out).certificate["warnings"]
    for text in ("no pair was recorded in layer 9", "5 of 8 ranks hold no expert: 3 experts", "calibrated on 1 steps"):
        assert any(text in warning for warning in warnings)
        assert text in printed


def test_a_picture_that_cannot_be_drawn_leaves_no_half_of_it(
    stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def half(self: Figure, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    out = tmp_path / "out" / "placement.json"
    assert main(["place", "--stats", str(stats), "--num-ranks", "4", "--strategy", "standard", "--out", str(out)]) == 2
    assert [path.name for path in out.parent.iterdir()] == ["placement.json"]
