"""`python -m bench formats` runs, and says of each format what is known beforehand."""

import json
from pathlib import Path

import pytest

from bench.formats.formats import main
from rq_ep.core.errors import UserError
from rq_ep.formats import FORMATS

pytestmark = pytest.mark.slow

LOW_BIT = [name for name, format_ in FORMATS.items() if not format_.is_native]
UNMEASURED = {"fp8_g64"}  # added after the measurement; `bench/results/formats.md` says so


def test_measures_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "formats.json"
    options = ["--shapes", "tiny", "--scale", "1", "--rows", "1", "40", "--experts", "2", "--rounds", "2"]
    main([*options, "--json", str(out)])
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    rows = {(row["format"], row["rows_per_expert"]): row for row in document["rows"]}
    assert set(rows) == {(name, size) for name in ["bf16", *LOW_BIT] for size in (1, 40)}
    assert all(name in printed for name in LOW_BIT)
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["bf16", 1]["ratio"] == 1
    assert rows["bf16", 1]["weight_error"] == 0 < rows["bf16", 1]["output_error"] < 0.01
    error, size = ({name: rows[name, 1][figure] for name in LOW_BIT} for figure in ("weight_error", "bytes_per_expert"))
    assert error["int8"] < error["fp8"] < error["int4_g32"] < error["int4_g128"] < 0.12
    assert size["int4_g128"] < size["int4_g32"] < 0.6 * size["int8"] < 0.4 * rows["bf16", 1]["bytes_per_expert"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "int9"], "did you mean 'int8'"),
        (["--shapes", "mixtrall"], "did you mean 'mixtral'"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--scale", "0"], "--scale 0: must be at least 1"),
        (["--scale", "100000"], "--scale 100000: leaves nothing of mixtral"),
        (["--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)


def test_the_readmes_table_comes_out_of_two_results(capsys) -> None:
    results = Path(__file__).parents[2] / "bench" / "results"
    files = [str(results / "formats_cpu.json"), str(results / "fidelity_demo.json")]
    main(["--table", *files])
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [f"`{name}`" for name in ["bf16", *LOW_BIT] if name not in UNMEASURED]
    assert all(len(row) == len(head) for row in rows)
    assert rows[0][2:4] == ["-", "-"], "bf16 is what the others are compared with"
    size = {row[0].strip("`"): float(row[1]) for row in rows}
    error = {row[0].strip("`"): float(row[2].rstrip("%")) for row in rows[1:]}
    assert size["int4_g128"] < size["mxfp4"] < size["int4_g32"] < size["int8"] < size["bf16"] == 2
    assert 0 < error["int8"] < error["fp8"] < error["int4_g32"] < error["mxfp4"]
    with pytest.raises(UserError, match="no such file"):
        main(["--table", "none.json", files[1]])
