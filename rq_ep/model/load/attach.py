"""Matching a model, a placement and a strategy: defaults, and checks that they belong together."""

from collections.abc import Sequence
from dataclasses import replace

from rq_ep.core.cost import CostModel, LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format
from rq_ep.model.load.memory import travelling_formats
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.seam.expert_modules import ExpertsModule, family_of
from rq_ep.moe import ExpertFamily


def place_uniformly(strategy: Strategy, opened: OpenedModel, num_ranks: int, model: ModelIdentity) -> Placement:
    """The placement of a strategy for uniform load, without calibration, in the expert bytes of standard EP.

    Every expert is in the format that it is stored in or, if that is none of ours, in the dtype to compute in.
    """
    layout = family_of(opened.experts[0].module).layout
    native_format = expert_format(opened.checkpoint, opened.dtype)
    stats = ExpertStats.uniform(
        layers=tuple(module.layer_index for module in opened.experts),
        num_experts=opened.experts[0].num_experts,
        expert_bytes={native_format: get_format(native_format).nbytes(layout)},
        native_format=native_format,
    )
    budget_bytes_R = (standard_ep_bytes(stats, num_ranks),) * num_ranks
    problem = PlacementProblem(replace(stats, model=model), Topology(num_ranks), budget_bytes_R)
    stored = [[opened.reader.stored_format(m.name, e) for e in range(m.num_experts)] for m in opened.experts]
    return keep_stored_formats(strategy.place(problem), stored, layout)


def keep_stored_formats(
    placement: Placement, stored: Sequence[Sequence[str | None]], layout: ExpertLayout
) -> Placement:
    """A placement with each expert in the low-bit format that it is stored in, if it is in one.

    Args:
        placement: of all experts.
        stored: for each layer, the format of each expert.
        layout: of an expert.
    """
    layers = []
    for layer, formats in zip(placement.layers, stored, strict=True):
        table = layer.replicas
        kept = tuple(formats[e] or own for e, own in zip(table.experts_P.tolist(), table.formats_P, strict=True))
        layers.append(replace(layer, replicas=replace(table, formats_P=kept)))
    names = {name for layer in layers for name in layer.replicas.formats_P}
    expert_bytes = {name: get_format(name).nbytes(layout) for name in names}
    bytes_R = bytes_by_rank(layers, placement.topology.num_ranks, expert_bytes)
    return replace(placement, layers=tuple(layers), bytes_R=tuple(bytes_R.tolist()))


def without_rank(placement: Placement, rank: int) -> Placement:
    """A placement in which a rank holds nothing, and has the bytes that it had: others hold its experts, as it happens.

    It describes a rank that is to join others, of which it does not know yet what they hold.
    """
    num_ranks = placement.topology.num_ranks
    layers = []
    for layer in placement.layers:
        others = [replica for replica in layer.replicas if replica.rank != rank]
        held = {replica.expert for replica in others}
        moved = [
            replica._replace(rank=(rank + 1) % num_ranks)
            for replica in layer.replicas
            if replica.rank == rank and replica.expert not in held
        ]
        layers.append(
            LayerPlacement.even(layer.index, layer.num_experts, [*others, *moved], layer.replicas.mixed_formats)
        )
    bytes_R = tuple(0 if at == rank else size for at, size in enumerate(placement.bytes_R))
    return replace(
        placement,
        layers=tuple(layers),
        bytes_R=bytes_R,
        budget_bytes_R=placement.budget_bytes_R or placement.bytes_R,
        certificate={},
    )


def layer_cost(
    machine: CostModel | None, family: ExpertFamily, placement: Placement, strategy: Strategy
) -> LayerCost | None:
    """The cost of a layer on a machine, in every format that the placement stores or the strategy may send."""
    if machine is None:
        return None
    return machine.layer(family.shape(travelling_formats(strategy, placement)))


def check_layers(placement: Placement, experts: Sequence[ExpertsModule]) -> None:
    """Raise a `UserError` with both values unless the placement has the model's MoE layers, in its order."""
    placed = [(layer.index, layer.num_experts) for layer in placement.layers]
    wanted = [(module.layer_index, module.num_experts) for module in experts]
    if placed != wanted:
        raise UserError(f"the placement is for {_describe(placed)}, but the model has {_describe(wanted)}")


def _describe(layers: Sequence[tuple[int, int]]) -> str:
    numbers = ", ".join(str(layer) for layer, _ in layers)
    experts = "/".join(str(number) for number in sorted({number for _, number in layers}))
    return f"MoE layers {numbers} of {experts} experts"
