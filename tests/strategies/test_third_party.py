"""Strategies that are in no table: named by where they can be imported from, as the page of the strategies says."""

import json
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rq_ep.__main__ import main
from rq_ep.config import StrategyConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance
from rq_ep.core.stats import ExpertStats
from rq_ep.model.load.load_model import load
from rq_ep.moe import Telemetry
from rq_ep.parallel import TorchGroup
from rq_ep.placing.place import place
from rq_ep.strategies import make_strategy
from tests.forkserver import run_forked
from tests.model.families import FAMILIES, logits, prompt, random_model, save
from tests.strategies.cases import CASES, Case
from tests.strategies.conformance import check_planners

PAGE = Path(__file__).parents[2] / "rq_ep" / "strategies" / "README.md"
NAME = "lending_example.hottest:LendHottest"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the page's example, in a package of its own that can be imported."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    package = tmp_path / "lending_example"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hottest.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("lending_example", "lending_example.hottest"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return NAME


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_example_conforms(example: str, case: Case) -> None:
    strategy, problem = make_strategy(example), case.problem()
    assert strategy.name == example
    placements = [strategy.place(problem)]
    if len(case.counts_SLE):
        placements.append(make_strategy("eplb").place(case.problem(unlimited=True, num_redundant_experts=3)))
    for placement in placements:
        for layer in placement.layers:
            check_planners(strategy, layer, problem.topology, case.counts_RE)


def test_its_certificate_is_what_its_planner_makes_of_the_steps(example: str, tmp_path: Path) -> None:
    case = CASES[1]
    placement = place(case.problem().stats, case.num_ranks, strategy=example)
    certificate = placement.certificate
    assert certificate["split"] == "planner"
    assert 1 <= certificate["bound"] <= certificate["predicted"] < certificate["standard"]
    planner = make_strategy(placement.strategy).planner(placement.layers[0], placement.topology)
    plan = planner(case.counts_RE)
    assert len(plan.transfers) == 1
    assert imbalance(plan.loads_R) < imbalance(make_strategy("llep", fallback_ratio=9).planner(
        placement.layers[0], placement.topology)(case.counts_RE).loads_R)  # fmt: skip
    placement.save(tmp_path / "placement.json")
    assert Placement.load(tmp_path / "placement.json").strategy == example


def test_commands_take_it_with_its_settings(example: str, tmp_path: Path) -> None:
    stats, out, rows = tmp_path / "stats.safetensors", tmp_path / "placement.json", tmp_path / "rows.json"
    counts = CASES[1].counts_SLE
    ExpertStats(counts, ("bf16",), "bf16", {"bf16": 1000}, top_k=2).save(stats)
    common = [f"--stats={stats}", "--num-ranks=4"]
    assert main(["place", *common, f"--strategy={example}", f"--out={out}", "--no-plot"]) == 0
    assert json.loads(out.read_text())["strategy"] == example
    replay = ["simulate", *common, f"--placement={out}", "--strategies=standard", f"--json={rows}"]
    assert main(replay) == 0
    standard, lending = json.loads(rows.read_text())
    assert lending["strategy"] == example
    assert lending["transfers_per_step"] > 0
    assert lending["imbalance_mean"] < standard["imbalance_mean"]
    assert main([*replay, f"--set={example}.min_pairs=1000000"]) == 0
    assert json.loads(rows.read_text())[1]["transfers_per_step"] == 0
    with_setting = f"{{name: {example}, min_pairs: 1000000}}"
    assert main(["place", *common, f"--strategy={with_setting}", f"--out={out}", "--no-plot"]) == 0
    certificate = Placement.load(out).certificate
    assert certificate["predicted"] == pytest.approx(certificate["standard"]), "nothing is lent for fewer pairs"
    config = StrategyConfig.parse(f"{{name: {example}, min_pairs: 7}}")
    assert make_strategy(config.name, **config.settings) == make_strategy(example, min_pairs=7)


BROKEN = """
from dataclasses import dataclass
from rq_ep.core.strategy import Strategy

class Plain: ...

@dataclass(frozen=True)
class Half(Strategy):
    def place(self, problem, current=None): ...

class NoDataclass(Half):
    def planner(self, layer, topology, cost=None): ...

@dataclass(frozen=True)
class Renamed(NoDataclass):
    name = "mine"

@dataclass(frozen=True)
class Picky(NoDataclass):
    size: int = 3
    def __post_init__(self):
        if self.size > 3: raise ValueError(f"size {self.size}: at most 3")
"""


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nowhere.at.all:Mine", {}, "strategy 'nowhere.at.all:Mine': no module 'nowhere': install it"),
        ("third_party:Mine", {}, "strategy 'third_party:Mine': no Mine in "),
        ("third_party:Plain", {}, "not a subclass of rq_ep.core.strategy.Strategy"),
        ("third_party:Half", {}, "strategy 'third_party:Half': does not define planner"),
        ("third_party:NoDataclass", {}, "must be a dataclass"),
        ("third_party:Renamed", {}, "calls itself 'mine'"),
        ("third_party:Picky", {"size": 4}, "strategy 'third_party:Picky': size 4: at most 3"),
        ("third_party:Picky", {"siz": 4}, "did you mean 'size'"),
        ("third_party:", {}, "expected package.module:Class"),
        ("third_party_that_fails:Mine", {}, "importing third_party_that_fails failed: ZeroDivisionError"),
        ("third_parti", {}, "unknown strategy 'third_parti'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    name: str, settings: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "third_party.py").write_text(BROKEN)
    (tmp_path / "third_party_that_fails.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "third_party", raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        make_strategy(name, **settings)


@pytest.mark.dist
def test_the_example_serves_two_ranks(example: str, tmp_path: Path) -> None:
    save(random_model(FAMILIES["olmoe"]), tmp_path / "model")
    run_forked(work, (tmp_path, example), 2)
    for rank in range(2):
        report = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert report["strategy"] == [example, example]
        assert report["error"] < 1e-4
        assert report["borrowed"] > 0, "memory for a borrowed expert is set aside"
        assert report["transferred"] > 0, "experts were lent"


@torch.no_grad()
def work(rank: int, directory: Path, name: str) -> None:
    """One of two processes: loads the model with the strategy's name, then by the placement that records it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory / 'store'}", timedelta(seconds=120), world_size=2, rank=rank)
    group, telemetry = TorchGroup("cpu", timeout_s=120), Telemetry()
    first = load(directory / "model", strategy=name, group=group, attn_implementation="eager")
    if rank == 0:
        first.rq_ep.placement.save(directory / "placement.json")
    group.barrier()
    model = load(
        directory / "model", directory / "placement.json", group=group, telemetry=telemetry, attn_implementation="eager"
    )
    tokens = prompt(2, 9 + rank, seed=rank)
    expected = logits(random_model(FAMILIES["olmoe"]), tokens)
    report = {
        "error": float((logits(model, tokens) - expected).abs().max() / expected.abs().max()),
        "strategy": [model.rq_ep.placement.strategy, model.rq_ep.strategy.name],
        "borrowed": model.rq_ep.rank_bytes.borrowed,
        "transferred": int(telemetry.transfer_bytes().sum()),
    }
    group.barrier()
    (directory / f"report-{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
