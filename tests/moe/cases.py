"""Small layers and awkward routings that the tests of layers, groups and the GPU share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.formats import FORMATS, ExpertLayout, get_format, native_format_name
from rq_ep.moe import EPExperts, ExpertFamily
from rq_ep.parallel.reference import assign, dense_moe
from rq_ep.strategies import STRATEGIES, make_strategy

D, F_ = 16, 24


def silu_gate(up_NF: Tensor) -> Tensor:
    gate, up = up_NF.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved_gate(up_NF: Tensor) -> Tensor:
    return F.gelu(up_NF[:, ::2]).clamp(max=2) * (up_NF[:, 1::2] + 1)


def families(hidden: int, intermediate: int) -> dict[str, ExpertFamily]:
    """One family of each form, of experts of this size."""
    d, f = hidden, intermediate
    return {
        "gated": ExpertFamily(ExpertLayout({"gate_up_proj": (2 * f, d), "down_proj": (d, f)}), silu_gate),
        "transposed": ExpertFamily(
            ExpertLayout(
                {
                    "gate_up_proj": (d, 2 * f),
                    "gate_up_proj_bias": (2 * f,),
                    "down_proj": (f, d),
                    "down_proj_bias": (d,),
                },
                is_transposed=True,
            ),
            interleaved_gate,
        ),
        "ungated": ExpertFamily(
            ExpertLayout({"up_proj": (f, d), "up_proj_bias": (f,), "down_proj": (d, f), "down_proj_bias": (d,)}), F.relu
        ),
    }


FAMILIES = families(D, F_)


@dataclass(frozen=True)
class Batch:
    """What the router gives each rank."""

    hidden_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


Routing = tuple[
    int, Sequence[int], Callable[[np.random.Generator, int, int], Any]
]  # E, tokens of each rank, ids of one

# Each: number of experts, tokens on each of three ranks, and the experts one token chooses.
ROUTINGS: dict[str, Routing] = {
    "distinct": (8, (7, 9, 8), lambda random, e, _: random.permutation(e)[:2]),
    "no_tokens": (6, (0, 0, 0), lambda random, e, _: random.permutation(e)[:2]),
    "one_rank_empty": (6, (5, 0, 11), lambda random, e, _: random.permutation(e)[:2]),
    "one_hot_expert": (9, (12, 10, 14), lambda random, e, _: [4, (4 + 1 + random.integers(e - 1)) % e]),
    "all_on_one": (6, (9, 1, 6), lambda random, e, _: [2]),
    "odd_experts": (7, (6, 6, 5), lambda random, e, _: random.permutation(e)[:3]),
    "more_ranks_than_experts": (2, (6, 3, 4), lambda random, e, _: random.permutation(e)[:1]),
    "every_expert": (5, (4, 3, 2), lambda random, e, _: random.permutation(e)),
    "duplicates": (6, (8, 9, 10), lambda random, e, t: [t % 2, t % 2, 3, 3, 3]),
}


def batches(routing: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Batch]:
    """The rows of each of three ranks."""
    num_experts, tokens_R, choose = ROUTINGS[routing]
    random = np.random.default_rng(seed)
    top_k = len(choose(random, num_experts, 0))
    result = []
    for num_tokens in tokens_R:
        ids = [list(map(int, choose(random, num_experts, token))) for token in range(num_tokens)]
        ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(num_tokens, top_k)
        hidden_TD = torch.from_numpy(random.standard_normal((num_tokens, D))).to(dtype)
        weights_TK = torch.from_numpy(random.random((num_tokens, top_k)) + 0.1).to(dtype)
        result.append(Batch(hidden_TD, ids_TK, weights_TK))
    return result


def expert_weights(
    family: ExpertFamily, num_experts: int, dtype: torch.dtype = torch.float32
) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(7)
    return [
        {name: (torch.randn(shape, generator=random) * 0.3).to(dtype) for name, shape in family.layout.shapes.items()}
        for _ in range(num_experts)
    ]


# Ways to set up each strategy. Those that need it are pushed, so that small cases replicate and borrow.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "eplb": [{}, {"num_redundant_experts": 2}],
    "llep": [{}, {"knobs": {"min_tokens_per_gemm": 1, "fallback_ratio": 1.0}}],
    "rq": [{}, {"budget": 1.6}],
    "rq_paper": [],  # always stores some experts in few bits
    "rq_llep": [{"budget": 1.0, "knobs": {"min_tokens_per_gemm": 1, "fallback_ratio": 1.0}}],
}

# Ways that mix the formats of an expert: an answer depends on the replica that a token meets.
MIXING: list[tuple[str, dict[str, Any]]] = [
    ("rq_paper", {}),
    (
        "rq_llep",
        {
            "budget": 1.0,
            "formats": ("fp32",),
            "knobs": {
                "min_tokens_per_gemm": 1,
                "fallback_ratio": 1.0,
                "transient_format": "int8",
                "max_low_precision_share": 1.0,
            },
        },
    ),
]


def variants(names: Iterable[str] = STRATEGIES) -> list[tuple[str, dict[str, Any]]]:
    """Strategies, by default those of the table, in each of their ways that keep to the native format if asked to."""
    return [(name, variant) for name in names for variant in VARIANTS.get(name, [{}])]


def planned(
    name: str,
    variant: dict[str, Any],
    family: ExpertFamily,
    counts_RE: np.ndarray,
    formats: tuple[str, ...] = ("fp32",),
) -> tuple[LayerPlacement, Planner, int]:
    """A layer placed by a strategy for the load it will meet, its planner, and the fullest rank's bytes."""
    num_ranks, num_experts = counts_RE.shape
    topology = Topology(num_ranks)
    formats = variant.get("formats", formats)
    sizes = {format_: FORMATS[format_].nbytes(family.layout) for format_ in formats}
    stats = ExpertStats(counts_RE.sum(axis=0)[None, None], formats, formats[0], sizes, layers=(3,))
    budget = None
    if "budget" in variant:
        budget = (int(variant["budget"] * -(-num_experts // num_ranks) * sizes[formats[0]]),) * num_ranks
    extra = min(variant.get("num_redundant_experts", 0), num_experts * (num_ranks - 1))
    problem = PlacementProblem(
        stats, topology, budget, formats, max_low_precision_share=1.0, num_redundant_experts=extra
    )
    strategy = make_strategy(name, **variant.get("knobs", {}))
    placement = strategy.place(problem)
    return placement.layers[0], strategy.planner(placement.layers[0], topology), max(placement.bytes_R)


def round_robin(format_: str, num_ranks: int, num_experts: int, index: int = 2) -> LayerPlacement:
    """One replica of each expert, on the ranks in turn."""
    replicas = [Replica(expert % num_ranks, expert, format_) for expert in range(num_experts)]
    return LayerPlacement.even(index, num_experts, replicas)


def in_two_formats(num_experts: int, num_ranks: int, native: str, low: str) -> LayerPlacement:
    """Each expert native on one rank; every second one low on all others, every third on the next one."""
    replicas = [Replica(expert % num_ranks, expert, native) for expert in range(num_experts)]
    for expert in range(num_experts):
        others = [(expert + n) % num_ranks for n in range(1, num_ranks)]
        replicas += [Replica(rank, expert, low) for rank in (others if expert % 2 == 0 else others[: expert % 3 == 0])]
    return LayerPlacement.even(3, num_experts, replicas, (low, native))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.hidden_TD.to(device), batch.ids_TK.to(device), batch.weights_TK.to(device))


def counts_of(ranks: Sequence[Batch], num_experts: int) -> np.ndarray:
    return np.stack([np.bincount(batch.ids_TK.flatten().numpy(), minlength=num_experts) for batch in ranks])


def fill(experts: EPExperts, weights: Sequence[dict[str, Tensor]]) -> None:
    for expert in experts.bank.experts:
        experts.bank.put(expert, weights[expert])


def expected(
    family: ExpertFamily, weights: Sequence[dict[str, Tensor]], batch: Batch, formats: dict[int, str] | None = None
) -> Tensor:
    """The dense layer, each expert in its format (default: as it is)."""

    def expert(number: int, x_ND: Tensor) -> Tensor:
        name = native_format_name(weights[number][family.down].dtype) if formats is None else formats[number]
        format_ = get_format(name)
        packed = format_.pack(weights[number], family.layout)
        return family.forward(x_ND, format_, format_.views(packed, family.layout))

    return dense_moe(batch.hidden_TD, batch.ids_TK, batch.weights_TK, expert)


def expected_as_planned(
    family: ExpertFamily, weights: Sequence[dict[str, Tensor]], batch: Batch, plan: DispatchPlan, rank: int
) -> Tensor:
    """The layer, each pair of source `rank` in the format of the replica that the reference gives it."""
    out_TD = torch.zeros(batch.hidden_TD.shape)
    for token, k, p in assign(batch.ids_TK.tolist(), plan, rank, batch.weights_TK.tolist()):
        replica = plan.replicas[p]
        format_ = get_format(replica.format)
        packed = format_.pack(weights[replica.expert], family.layout)
        row_1D = family.forward(batch.hidden_TD[token, None], format_, format_.views(packed, family.layout))
        out_TD[token] += row_1D[0].float() * float(batch.weights_TK[token, k])
    return out_TD.to(batch.hidden_TD.dtype)


def check_close(out_TD: Tensor, expected_TD: Tensor) -> None:
    """Equal up to rounding: each difference is compared with the largest value, as sums may cancel."""
    assert (out_TD.shape, out_TD.dtype) == (expected_TD.shape, expected_TD.dtype)
    if out_TD.numel():
        largest = float(expected_TD.abs().max())
        difference = float((out_TD.float() - expected_TD.float()).abs().max())
        assert difference <= largest * (1e-5 if out_TD.dtype == torch.float32 else 3e-2), (difference, largest)
