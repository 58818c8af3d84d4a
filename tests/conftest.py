"""Small real things that many tests share."""

import gc
from hashlib import sha256
from inspect import getsource
from pathlib import Path

import pytest
from filelock import FileLock

from rq_ep.model import tiny
from rq_ep.model.text import byte_tokenizer as tokenizer
from rq_ep.model.text import corpus
from rq_ep.model.tiny_recipe import TrainingRecipe
from rq_ep.strategies import STRATEGIES
from tests.moe.cases import variants

TINY_RECIPE = TrainingRecipe(
    steps=200, num_experts=8, top_k=2, num_layers=2, hidden_size=64, intermediate_size=32, peak_lr=6e-3
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strategy", action="append", metavar="NAME", help="check this strategy, package.module:Class; may be repeated"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what holds for every strategy over the table, or over those that `--strategy` names."""
    names = metafunc.config.getoption("--strategy") or list(STRATEGIES)
    if "variant_of" in metafunc.fixturenames:
        metafunc.parametrize("variant_of", variants(names), ids=str)
    if "strategy_name" in metafunc.fixturenames:
        metafunc.parametrize("strategy_name", names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what reads the trained checkpoint, which `launch/test.sh --fast` leaves out."""
    if config.getoption("--strategy"):
        names = {"strategy_name", "variant_of"}
        items[:] = [item for item in items if names & set(getattr(item, "fixturenames", ()))]
    for item in items:
        if "tiny_checkpoint" in getattr(item, "fixturenames", ()):
            item.add_marker("trains")


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Have garbage collections look at what tests make: to walk thousands of collected tests takes half a second."""
    if gc.get_freeze_count() == 0:  # at first, and after tests of what freezes and unfreezes
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint (bf16, 8 experts top-2, 2 layers, hidden 64) with its tokenizer and, in text/, its text.

    It is trained once in a few seconds and kept in pytest's cache until the code that makes it changes. Read only.
    """
    code = sha256("".join(map(getsource, (tiny, corpus, tokenizer))).encode()).hexdigest()[:12]
    cache = getattr(request.config, "cache", None)
    home = cache.mkdir("tiny-checkpoint") if cache else tmp_path_factory.mktemp("tiny-checkpoint")
    with FileLock(home / "lock"):  # of the workers that run tests, one trains it
        tiny.tiny_model(home / code, TINY_RECIPE)
    return home / code
