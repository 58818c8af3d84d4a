"""A profile of one MoE layer on this machine: the timings its cost model is fitted to, and checks of the fit.

Axes: N rows of a call, S planned steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.cost import LayerShape
from rq_ep.core.errors import UserError
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.costs import Profile
from rq_ep.costs.measured import Calls, Check, Curve
from rq_ep.formats import get_format
from rq_ep.moe.expert_bank import ExpertBank
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.parallel import EPGroup, Exchange, single_group
from rq_ep.placing.place import place
from rq_ep.profiling.link_times import measured_link, named_link
from rq_ep.profiling.timing import own_seconds, typical
from rq_ep.strategies import STRATEGIES, make_strategy

Progress = Callable[[str, int, int], None]  # stage, done, total

MAX_EXPERTS = 8  # of a rank's share that are computed in one call; calls for one expert are timed as well
MAX_ROWS = 1024  # of one expert
MAX_CALL_S = 1.0  # no more rows once a call takes longer
GATHERED_ROWS = (16, 256, 4096)
PLAN_RANKS = 8  # planned for where this process is the only rank
NUM_PLANS = 30
CHECK_TOKENS = (1, 4, 16, 64, 256, 1024)  # from steps of decoding to those of prefill


@dataclass(frozen=True)
class ProfiledLayer:
    """The layer to profile: its experts, formats and dtype."""

    family: ExpertFamily
    num_experts: int
    top_k: int
    formats: tuple[str, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> LayerShape:
        return self.family.shape(self.formats)

    def rows(self, num_rows: int, device: torch.device) -> Tensor:
        """[N, D] random rows."""
        return torch.randn(num_rows, self.family.hidden_size).to(device, self.dtype)


def profile_layer(
    layer: ProfiledLayer,
    group: EPGroup,
    *,
    device_name: str,
    link_machine: str,
    budget_s: float = 0.2,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Profile:
    """Time the parts of a layer. Every rank of the group calls it; all measure at once and get the same profile.

    Each time is the median of its repeats, on the slowest rank.

    Args:
        layer: to profile.
        group: whose links to time; a single rank takes the link of `link_machine`.
        device_name: the device in words.
        link_machine: one of the machines of `rq_ep.costs`.
        budget_s: time of the repeats of one figure of compute.
        seed: of weights, rows and loads.
        progress: called with (stage, done, total).
    """
    stages = [*(f"experts in {name}" for name in layer.formats), "rows and links", "planning", "checking"]

    def begin(number: int) -> None:
        group.barrier()
        progress(stages[number], number % len(stages), len(stages))

    torch.manual_seed(seed)
    timers = {}
    experts = {}
    for number, name in enumerate(layer.formats):
        begin(number)
        timers[name] = _ExpertTimer(layer, name, group, budget_s)
        experts[name] = _calls_of_slowest(group, timers[name].by_size())
    begin(-3)
    gather = _of_slowest(group, _gather_seconds(layer, group.device, budget_s))
    link = measured_link(group) if group.size > 1 else named_link(link_machine)
    begin(-2)
    plan_ranks = group.size if group.size > 1 else PLAN_RANKS
    plan_s: dict[str, float] = group.all_gather_object(planning_seconds(layer, plan_ranks, seed))[0]
    begin(-1)
    profile = Profile(
        device=device_name,
        dtype=str(layer.dtype).removeprefix("torch."),
        hidden_size=layer.shape.hidden_size,
        intermediate_size=layer.shape.intermediate_size,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        num_ranks=group.size,
        experts=experts,
        gather=gather,
        link=link,
        plan_s=plan_s,
        plan_ranks=plan_ranks,
    )
    checks = [check for timer in timers.values() for check in timer.checks(profile)]
    profile = replace(profile, checks=tuple(group.all_gather_object(checks)[0]))
    progress("done", len(stages), len(stages))
    return profile


class _ExpertTimer:
    """Times the compute of experts of one format on this device."""

    def __init__(self, layer: ProfiledLayer, format_: str, group: EPGroup, budget_s: float) -> None:
        self.layer = layer
        self.format = format_
        self.device = group.device
        self.budget_s = budget_s
        self.num_experts = min(MAX_EXPERTS, -(-layer.num_experts // group.size))
        self.replicas = Replicas.of(Replica(0, expert, format_) for expert in range(self.num_experts))
        layout = layer.family.layout
        self.bank = ExpertBank(layout, self.replicas, 0, self.device)
        weights = {name: torch.randn(shape).mul_(shape[-1] ** -0.5) for name, shape in layout.shapes.items()}
        packed = get_format(format_).pack(weights, layout).to(self.device)
        for expert in self.bank.experts:  # equal weights will do, in a buffer of each expert's own
            self.bank.put_packed(expert, packed)

    def by_size(self) -> dict[tuple[int, int], float]:
        """(experts, rows of each) -> seconds of the call that computes them."""
        seconds: dict[tuple[int, int], float] = {}
        for num_experts in sorted({1, self.num_experts}):
            for power in range(0, MAX_ROWS.bit_length(), 2 if num_experts == 1 else 1):
                ids_T1 = torch.arange(num_experts).repeat(1 << power)[:, None]
                call_s = self._seconds(ids_T1, self._plan(ids_T1))
                seconds[num_experts, 1 << power] = call_s
                if call_s > MAX_CALL_S and power > 0:
                    break
        return seconds

    def checks(self, profile: Profile) -> list[Check]:
        """Measured and predicted seconds of steps of uneven load, each token with `top_k` distinct experts."""
        cost = profile.layer(self.layer.shape)
        popularity_E = torch.arange(1, self.num_experts + 1).reciprocal()
        top_k = min(self.layer.top_k, self.num_experts)
        checks = []
        for num_tokens in CHECK_TOKENS:
            ids_TK = torch.multinomial(popularity_E.expand(num_tokens, -1), top_k)
            plan = self._plan(ids_TK)
            predicted_s = float(cost.compute_s_R(plan)[0])
            if predicted_s < MAX_CALL_S or num_tokens == CHECK_TOKENS[0]:
                checks.append(Check(self.format, num_tokens, predicted_s, self._seconds(ids_TK, plan)))
        return checks

    def _plan(self, ids_TK: Tensor) -> DispatchPlan:
        return DispatchPlan(self.replicas, torch.bincount(ids_TK.flatten(), minlength=self.num_experts).numpy()[None])

    def _seconds(self, ids_TK: Tensor, plan: DispatchPlan) -> float:
        rows_TD, weights_TK = self.layer.rows(len(ids_TK), self.device), torch.ones(ids_TK.shape, device=self.device)
        group = single_group(self.device)
        (received,) = Exchange(group).dispatch(rows_TD, ids_TK.to(self.device), weights_TK, plan)  # alone: in one part
        nothing = self.bank.borrow((), group)
        return typical(lambda: self.bank.compute(received, self.layer.family, nothing), self.device, self.budget_s)


def planning_seconds(layer: ProfiledLayer, num_ranks: int, seed: int) -> dict[str, float]:
    """Strategy -> host time of one plan, the median over steps of the statistics that its placement was made for.

    Strategies that cannot place experts in these formats are left out.
    """
    random = np.random.default_rng(seed)
    loads_E = random.lognormal(size=layer.num_experts) * 32 * layer.top_k
    steps_SRE = random.poisson(loads_E, size=(NUM_PLANS, num_ranks, layer.num_experts))
    native = next((name for name in layer.formats if get_format(name).is_native), layer.formats[0])
    stats = ExpertStats(steps_SRE.sum(axis=1)[:, None], layer.formats, native, layer.shape.expert_bytes)
    host = torch.device("cpu")
    result = {}
    for name in STRATEGIES:
        strategy = make_strategy(name)
        try:
            placement = place(stats, num_ranks, strategy=strategy, formats=layer.formats)
        except UserError:
            continue
        planner = strategy.planner(placement.layers[0], Topology(num_ranks))
        planner(steps_SRE[0])
        result[name] = median(own_seconds(partial(planner, counts_RE), host) for counts_RE in steps_SRE)
    return result


def _gather_seconds(layer: ProfiledLayer, device: torch.device, budget_s: float) -> dict[int, float]:
    seconds = {}
    for num_rows in GATHERED_ROWS:
        rows_TD, order = layer.rows(num_rows, device), torch.randperm(num_rows, device=device)
        seconds[num_rows] = typical(partial(rows_TD.index_select, 0, order), device, budget_s)
    return seconds


def _of_slowest(group: EPGroup, by_size: Mapping[int, float]) -> Curve:
    """Sizes that every rank has timed, with the time of the slowest."""
    ranks = group.all_gather_object(by_size)
    sizes = sorted(set.intersection(*map(set, ranks)))
    return Curve(tuple(sizes), tuple(max(rank[size] for rank in ranks) for size in sizes))


def _calls_of_slowest(group: EPGroup, by_size: Mapping[tuple[int, int], float]) -> Calls:
    """Calls that every rank has timed, with the time of the slowest."""
    ranks = group.all_gather_object(by_size)
    sizes = sorted(set.intersection(*map(set, ranks)))
    experts, rows = zip(*sizes, strict=True)
    return Calls(experts, rows, tuple(max(rank[size] for rank in ranks) for size in sizes))
