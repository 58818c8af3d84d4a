"""Formats from the command line's names to answers: calibrate, place and eval."""

import json
from pathlib import Path

from rq_ep.__main__ import main
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ExpertStats

NAMES = "int8,fp8,int4_g32,int4_g64,int4_g128,mxfp4"


def test_every_format_is_measured_placed_and_served(tiny_checkpoint: Path, tmp_path: Path) -> None:
    stats, placement, figures = (tmp_path / name for name in ("s.safetensors", "p.json", "e.json"))
    model, text = str(tiny_checkpoint), tiny_checkpoint / "text"
    calibrated = ["--text", str(text / "train"), "--max-tokens", "2048", "--formats", NAMES, "--out", str(stats)]
    assert main(["calibrate", "--model", model, *calibrated]) == 0
    measured = ExpertStats.load(stats)
    assert measured.formats == ("bf16", *NAMES.split(","))
    error = dict(zip(measured.formats, measured.error.mean((0, 1)), strict=True))
    assert 0 == error["bf16"] < error["int8"] < error["fp8"] < error["int4_g32"] < 0.2
    assert error["mxfp4"] < 0.25

    placed = ["--num-ranks", "2", "--formats", "bf16,int4_g32", "--out", str(placement)]
    assert main(["place", "--stats", str(stats), *placed]) == 0
    assert "int4_g32" in Placement.load(placement).formats
    fixed = ["--max-tokens", "1024", "--sequence-length", "64", "--batch-size", "4", "--json", str(figures)]
    evaluated = ["--placement", str(placement), "--text", str(text / "held-out"), "--strategies", "standard,rq", *fixed]
    assert main(["eval", "--model", model, *evaluated]) == 0
    rows = {row["label"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows["standard"]["agreement"]["mean"] == 1
    assert rows["rq"]["agreement"]["mean"] > 0.9
    assert rows["rq"]["kl"]["mean"] < 0.02
