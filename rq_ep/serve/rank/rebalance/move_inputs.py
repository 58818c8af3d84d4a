"""What moves of experts need besides the model that serves: settings, and the checkpoint that experts are read from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rq_ep.config import Environment, ServeConfig
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.options import options_of
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, SolverOptions
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Planner, Strategy
from rq_ep.costs import cost_model
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.checkpoint.checkpoint_files import weight_files
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format
from rq_ep.model.load.mapped_files import MappedFiles
from rq_ep.model.load.memory import travelling_formats
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.seam.expert_modules import experts_per_token
from rq_ep.moe import ExpertFamily
from rq_ep.parallel.host import num_usable_cores
from rq_ep.rebalancing.pace import Pace, share_of_a_core
from rq_ep.serve.check_settings import chosen_strategy
from rq_ep.solver.migration.members import planner_for_members
from rq_ep.solver.migration.recover import Recovery, recover
from rq_ep.strategies import choose_strategy


@dataclass(frozen=True)
class MoveInputs:
    """What the moves of a group need that goes on without ranks that fail, whether or not it rebalances."""

    config: ServeConfig
    strategy: Strategy
    opened: OpenedModel
    native_format: str
    formats: tuple[str, ...]  # the native one first
    stats: ExpertStats
    room_bytes: int  # of a rank, beside its budget, for what arrives

    @classmethod
    def of_survivors(cls, config: ServeConfig, num_ranks: int) -> "MoveInputs | None":
        """What a group needs that does not rebalance; None: it ends with the first rank that fails.

        Raises:
            UserError: unknown formats, statistics of another model.
        """
        if config.on_rank_failure != "continue" or num_ranks == 1:
            return None
        placement = None if config.placement is None else Placement.load(config.placement)
        opened = OpenedModel.open(config.model, config.dtype)
        native = expert_format(opened.checkpoint, opened.dtype)
        stored = {name for _, _, name in stored_formats(opened) if name is not None}
        named = (*(config.formats or ()), *(() if placement is None else placement.formats), *sorted(stored))
        formats = tuple(dict.fromkeys([native, *named]))
        stats = known_stats(config, opened, native, formats)
        room = max(stats.expert_bytes[name] for name in formats)
        strategy = choose_strategy(chosen_strategy(config), placement)
        return cls(config, strategy, opened, native, formats, stats, room)

    @property
    def layout(self) -> ExpertLayout:
        return self.opened.experts[0].family.layout

    @property
    def pace(self) -> Pace:
        """How fast experts move on this host."""
        num_ranks = Environment.from_os().local_world_size
        return Pace(self.config.bytes_per_step, share_of_a_core(num_usable_cores(), num_ranks, torch.get_num_threads()))

    @property
    def keeps_stacks(self) -> bool:
        """Whether experts move so rarely that they are better kept in the order of fast kernels."""
        return True

    @property
    def reads_formats(self) -> bool:
        """Whether experts that change their format are read from where they were quantized in advance."""
        return self.config.experts is not None

    @property
    def measures_importance(self) -> bool:
        """Whether traffic is to show which experts matter."""
        return False

    def problem(self, placement: Placement, counts_LE: IntArray | None = None) -> PlacementProblem:
        """The problem that re-placements solve.

        Args:
            placement: where they begin; its budgets are kept.
            counts_LE: pairs of each expert; None: those of the statistics.
        """
        cap = self.config.max_low_precision_share
        if cap is None:
            cap = placement.low_precision_cap
        if cap is None:
            cap = options_of(SolverOptions)["max_low_precision_share"].default
        layer = placement.layers[0]
        stats = replace(self.stats, model=placement.model)
        if counts_LE is not None:
            stats = replace(stats, counts=counts_LE[None], tokens=None, phase=None, domain=None)
        return PlacementProblem(
            stats,
            placement.topology,
            placement.budget_bytes_R or placement.bytes_R,
            self.formats,
            max_low_precision_share=cap,
            num_redundant_experts=len(layer.replicas) - layer.num_experts if self.strategy.counts_replicas else 0,
        )

    def planner_of(
        self, family: ExpertFamily, placement: Placement, members: Callable[[], Sequence[int]]
    ) -> Callable[[LayerPlacement], Planner]:
        """Makes the planner of a layer, in whichever of the formats its experts are stored.

        Args:
            family: of the experts.
            placement: one that serves.
            members: the ranks that take part now.
        """
        machine = None if self.config.machine is None else cost_model(self.config.machine)
        names = {*travelling_formats(self.strategy, placement), *self.formats}
        cost = None if machine is None else machine.layer(family.shape(names))
        return lambda layer: planner_for_members(self.strategy, layer, placement.topology, cost, members())

    def read_expert(self) -> Callable[[int, int, str], Tensor]:
        """Reads an expert of a layer from the checkpoint, in a format, or as it was quantized in advance.

        It raises a `UserError` where a file has changed since now.
        """
        names = {module.layer_index: module.name for module in self.opened.experts}
        reader, layout = self.opened.reader, self.layout
        path = self.config.experts
        in_advance = None if path is None else PackedExperts.open(path, model_identity(self.config.model))
        held = frozenset() if in_advance is None else frozenset(in_advance.files())
        mapped = MappedFiles(weight_files(self.config.model))

        def read(layer: int, expert: int, format_name: str) -> Tensor:
            mapped.check()
            packed = read_packed(layer, expert, format_name)
            mapped.check()
            return packed

        def read_packed(layer: int, expert: int, format_name: str) -> Tensor:
            packed = reader.stored_expert(names[layer], expert, format_name)
            if packed is None and in_advance is not None:
                if (file := in_advance.file(layer)) in held and not file.exists():
                    raise UserError(f"{file}: has vanished: put it back, or start the server without --experts")
                packed = in_advance.packed(layer, expert, format_name)
            if packed is None:
                packed = get_format(format_name).pack(reader.expert(names[layer], expert), layout)
            return packed

        return read


def recovered(
    inputs: MoveInputs,
    home: Placement,
    current: Placement,
    members: Sequence[int],
    memory_R: tuple[int, ...] | None,
    counts_LE: IntArray | None = None,
) -> Recovery:
    """Where experts are to be with these members alone, in the budget that was set, or else in memory.

    Args:
        inputs: of the moves.
        home: the placement that serves with all ranks.
        current: what is held, and by whom.
        members: ascending.
        memory_R: bytes of experts that ranks may hold; None: not known.
        counts_LE: pairs of each expert; None: those of the statistics.

    Raises:
        UserError: they cannot hold the model.
    """
    problem = inputs.problem(home, counts_LE)
    if inputs.config.placement is None or home.budget_bytes_R is None:  # nobody has set a budget
        problem = replace(problem, budget_bytes_R=memory_R)
    return recover(problem, current, members, inputs.room_bytes)


def stored_formats(opened: OpenedModel) -> list[tuple[int, int, str | None]]:
    """The index of the layer of each expert, its number, and the format that it is stored in, if it is one of ours."""
    return [
        (module.layer_index, expert, opened.reader.stored_format(module.name, expert))
        for module in opened.experts
        for expert in range(module.num_experts)
    ]


def known_stats(config: ServeConfig, opened: OpenedModel, native: str, formats: tuple[str, ...]) -> ExpertStats:
    """Sizes, and sensitivities where they are given."""
    layout = opened.experts[0].family.layout
    expert_bytes: Mapping[str, int] = {name: get_format(name).nbytes(layout) for name in formats}
    layers = tuple(module.layer_index for module in opened.experts)
    num_experts = opened.experts[0].num_experts
    top_k = experts_per_token(opened.model.config)
    if config.stats is None:
        return replace(ExpertStats.uniform(layers, num_experts, expert_bytes, native), top_k=top_k)
    stats = ExpertStats.load(config.stats)
    if stats.model is not None:
        model_identity(config.model).check(stats.model, config.stats)
    if (stats.layers, stats.num_experts) != (layers, num_experts):
        raise UserError(f"--stats {config.stats}: is of other MoE layers than {config.model}")
    if stats.native_format != native:
        raise UserError(f"--stats {config.stats}: its native format is {stats.native_format}, but {native} is served")
    if missing := [name for name in formats if name not in stats.formats]:
        raise UserError(f"--stats {config.stats}: knows nothing of {missing[0]}: calibrate with it, or leave it out")
    return stats
