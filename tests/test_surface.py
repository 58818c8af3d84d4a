"""What users rely on by name: the API, the command lines, the tables, and how little the deciding side imports."""

import argparse
import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest

import rq_ep
from rq_ep.__main__ import COMMANDS, main
from rq_ep.config import ServeConfig, add_flags
from rq_ep.formats import FORMATS
from rq_ep.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]

# Options may be added; none of these may go.
FROZEN_OPTIONS = {
    "tiny-model": {"--out", "--family", "--steps", "--seed"},
    "calibrate": {"--model", "--text", "--out"},
    "quantize": {"--model", "--out", "--formats", "--placement", "--rounding", "--text", "--max-tokens"},
    "place": {
        "--stats", "--num-ranks", "--ranks-per-node", "--budget", "--formats", "--strategy",
        "--max-low-precision-share", "--tokens-per-step", "--num-redundant-experts", "--out", "--objective",
        "--tail-weight", "--machine", "--max-error", "--rules", "--time-limit", "--workers", "--what-if", "--for",
        "--current", "--lost-ranks", "--max-moved-bytes", "--move-price", "--min-gain", "--moves",
    },
    "simulate": {"--stats", "--placement", "--strategies", "--num-ranks", "--calibration", "--max-steps"},
    "eval": {"--model", "--placement", "--text"},
    "profile": {"--out", "--model", "--formats", "--device", "--dtype"},
    "convert": {
        "--from", "--to", "--out", "--expert-bytes", "--native-format", "--layers", "--top-k", "--num-ranks", "--stats",
        "--num-model-layers",
    },
    "env": set(),
}  # fmt: skip


def test_public_names() -> None:
    assert set(rq_ep.__all__) == {"calibrate", "place", "load"}
    assert all(callable(getattr(rq_ep, name)) for name in rq_ep.__all__)
    with pytest.raises(AttributeError, match="placee"):
        _ = rq_ep.placee  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_command_keeps_its_options(name: str) -> None:
    parser = argparse.ArgumentParser()
    import_module(f"rq_ep.commands.{name.replace('-', '_')}").configure(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert options >= FROZEN_OPTIONS[name]
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert not undocumented


def test_the_readme_has_a_row_for_every_strategy_of_the_table() -> None:
    readme = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", (ROOT / "README.md").read_text())  # links by their text
    section = readme.partition("\n## Strategies\n")[2].partition("\n## ")[0]
    assert section, "README.md has no section `## Strategies`"
    table = section[section.index("| `--strategy` |") :].partition("\n\n")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `") and not row.startswith("| `--strategy`")]
    for name, kind in STRATEGIES.items():
        assert all(kind.summary), f"strategy {name!r}: its `summary` is not filled in"
        row = f"| `{name}` | {' | '.join(kind.summary)} |"
        assert row in rows, f"README.md, ## Strategies: no row for {name!r}; write\n{row}"
    assert len(rows) == len(STRATEGIES), "README.md, ## Strategies: a row without a strategy in the table"


def test_the_readme_mentions_every_format() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in FORMATS:
        assert f"`{name}`" in readme, f"README.md does not mention {name}"


def test_help_names_every_strategy_of_the_table() -> None:
    parsers = {name: argparse.ArgumentParser() for name in ("place", "simulate", "serve")}
    for name in ("place", "simulate"):
        import_module(f"rq_ep.commands.{name}").configure(parsers[name])
    add_flags(parsers["serve"], ServeConfig)
    for parser in parsers.values():
        text = " ".join(
            str(action.help) for action in parser._actions if "--strateg" in " ".join(action.option_strings)
        )
        assert not [name for name in (*STRATEGIES, "package.module:Class") if name not in text]


def test_help_names_every_low_format() -> None:
    parser = argparse.ArgumentParser()
    import_module("rq_ep.commands.calibrate").configure(parser)
    text = next(str(action.help) for action in parser._actions if "--formats" in action.option_strings)
    words = text.replace(",", " ").replace(";", " ").split()
    assert not [name for name, format_ in FORMATS.items() if not format_.is_native and name not in words]


# File stems that the field itself has twice: a verb with its command, EPLB as a strategy and as a file format.
TWICE = {"__init__", "__main__", "calibrate", "quantize", "place", "eplb"}
MAX_MODULES = 14  # of a folder


def modules() -> list[Path]:
    return sorted((ROOT / "rq_ep").rglob("*.py"))


def repeated(names: Iterable[str]) -> set[str]:
    return {name for name, number in Counter(names).items() if number > 1}


@pytest.mark.slow
def test_no_class_name_is_used_twice() -> None:
    trees = [ast.parse(path.read_text()) for path in modules()]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert repeated(names) == set()


def test_no_file_stem_is_used_twice() -> None:
    assert repeated(path.stem for path in modules()) <= TWICE


def test_folders_are_small() -> None:
    numbers = Counter(path.parent.relative_to(ROOT) for path in modules() if path.stem != "__init__")
    assert {str(folder) for folder, number in numbers.items() if number > MAX_MODULES} == set()


def test_the_glossary_covers_every_file_name() -> None:
    package = ROOT / "rq_ep"
    page = (package / "README.md").read_text()
    terms = {path.stem for path in package.glob("*/**/*.py") if path.parent.name != "commands"}
    missing = sorted(term for term in terms - {"__init__", "__main__"} if f"`{term}`" not in page)
    assert not missing, f"rq_ep/README.md says nothing of {', '.join(missing)}"


def test_only_the_group_imports_torch_distributed() -> None:
    pattern = re.compile(r"^\s*(import|from) torch\.distributed", re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "rq_ep").rglob("*.py") if pattern.search(path.read_text())}
    assert rooms == {"parallel", "processes"}


def test_help_teaches_without_importing_torch() -> None:
    code = (
        "import sys, rq_ep.placing.place, rq_ep.sim, rq_ep.__main__ as m\n"
        "for command in ('calibrate', '--out=x'), ('quantize', '--out=x'), ('eval',):\n"
        "    assert m.main([*command, '--model=nowhere', '--text', '.']) == 2\n"
        "try: m.main(['place', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--max-low-precision-share" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("place --stats nowhere.safetensors --num-ranks 4 --out unused.json", "nowhere.safetensors: no such file"),
        ("plaec", "did you mean 'place'?"),
        ("serve --model m", "torchrun --nproc-per-node R -m rq_ep.serve"),
        (
            "calibrate --format bf16",
            "error: unrecognized arguments: --format bf16: did you mean --formats?",
        ),
        ("place --budget 80 GiB", "rq-ep place: error: unrecognized arguments: GiB; see"),
    ],
)
def test_a_users_mistake_is_one_line(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed


def test_ctrl_c_ends_in_one_line_whenever_it_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rq_ep.__main__.import_module", stop)  # as while modules are imported
    assert main(["place"]) == 130
    assert capsys.readouterr().err == "rq-ep place: stopped\n"
