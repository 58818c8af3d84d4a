"""`python -m bench`: one entry for every bench, whatever launcher starts it."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from bench.__main__ import BENCHES, main, parse_arguments
from rq_ep.core.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)


def test_help_lists_every_bench_with_a_line_each() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name, bench in BENCHES.items():
        assert f"  {name:12} {bench.summary}\n" in done.stdout


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_a_main_and_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_module(BENCHES[name].module).main.__doc__
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m bench {name}" in capsys.readouterr().out


def test_an_unknown_bench_is_refused_in_one_line() -> None:
    done = run("layr")
    assert done.returncode == 2
    assert done.stderr.startswith("bench layr: error: unknown bench 'layr': did you mean 'layer'?")
    assert done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="did you mean 'layer'"):
        main(["layr"])


def test_the_deepspeed_launcher_may_put_its_rank_first() -> None:
    options = parse_arguments(["--local_rank=1", "layer", "--shape", "tiny"])
    assert (options.name, options.arguments) == ("layer", ["--shape", "tiny"])
