"""What rebalancing needs besides the model that serves, and the checks of it before anything is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import check_writable
from rq_ep.core.options import options_of
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, SolverOptions
from rq_ep.core.rebalance_options import REBALANCING
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Planner, RebalanceRule, Strategy
from rq_ep.costs import cost_model
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.checkpoint.checkpoint_files import weight_files
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format
from rq_ep.model.load.attach import choose_strategy
from rq_ep.model.load.mapped_files import MappedFiles
from rq_ep.model.load.memory import travelling_formats
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.seam.expert_modules import experts_per_token
from rq_ep.moe import ExpertFamily
from rq_ep.serve.rank.check_inputs import chosen_strategy


@dataclass(frozen=True)
class RebalanceInputs:
    """The settings of rebalancing, checked, and the checkpoint that it reads experts from."""

    config: ServeConfig
    strategy: Strategy
    rule: RebalanceRule
    opened: OpenedModel
    native_format: str
    formats: tuple[str, ...]  # the native one first
    stats: ExpertStats

    @classmethod
    def check(cls, config: ServeConfig, num_ranks: int) -> "RebalanceInputs | None":
        """Check the settings; None: rebalancing is off.

        Raises:
            UserError: a setting of rebalancing without it, a strategy that keeps its placement, one rank alone, unknown
                formats, statistics of another model, too little room.
        """
        if config.rebalance == "off":
            _refuse_settings(config)
            return None
        if num_ranks == 1:
            raise UserError("--rebalance auto: one rank has nothing to balance; start two or more, or leave it off")
        placement = None if config.placement is None else Placement.load(config.placement)
        strategy = choose_strategy(chosen_strategy(config), placement)
        if strategy.rebalance_rule is None:
            raise UserError(f"--rebalance auto: strategy {strategy.name!r} keeps the placement it has; choose rq")
        if placement is not None and any(layer.replicas.mixed_formats for layer in placement.layers):
            raise UserError(
                f"--rebalance auto: replicas of an expert in {config.placement} may differ in format: place again "
                "without --mixed-replicas"
            )
        if config.placement_out is not None:
            check_writable(config.placement_out)
        opened = OpenedModel.open(config.model, config.dtype)
        native = expert_format(opened.checkpoint, opened.dtype)
        wanted = config.formats or (() if placement is None else placement.formats)
        formats = tuple(dict.fromkeys([native, *wanted, *(() if placement is None else placement.formats)]))
        _check_formats(config, opened, native, formats)
        rule = config.applied_to(strategy.rebalance_rule)
        stats = _stats(config, opened, native, formats)
        largest = max(stats.expert_bytes[name] for name in formats)
        room = largest if rule.room_bytes is None else rule.room_bytes
        if room < largest:
            raise UserError(f"--rebalance-room {room}: an expert takes {largest} bytes; give as many or more")
        return cls(config, strategy, replace(rule, room_bytes=room), opened, native, formats, stats)

    @property
    def layout(self) -> ExpertLayout:
        return self.opened.experts[0].family.layout

    @property
    def room_bytes(self) -> int:
        """Bytes of a rank, beside its budget, for what arrives."""
        assert self.rule.room_bytes is not None
        return self.rule.room_bytes

    @property
    def reads_formats(self) -> bool:
        """Whether experts that change their format are read from where they were quantized in advance."""
        return self.config.experts is not None

    @property
    def measures_importance(self) -> bool:
        """Whether traffic is to show which experts matter: formats may change, and no file says."""
        return self.config.stats is None and len(self.formats) > 1

    def problem(self, placement: Placement) -> PlacementProblem:
        """The problem that re-placements solve, beginning with this placement."""
        cap = self.config.max_low_precision_share
        if cap is None:
            cap = placement.low_precision_cap
        if cap is None:
            cap = options_of(SolverOptions)["max_low_precision_share"].default
        layer = placement.layers[0]
        return PlacementProblem(
            replace(self.stats, model=placement.model),
            placement.topology,
            placement.budget_bytes_R or placement.bytes_R,
            self.formats,
            max_low_precision_share=cap,
            num_redundant_experts=len(layer.replicas) - layer.num_experts if self.strategy.counts_replicas else 0,
        )

    def planner_of(self, family: ExpertFamily, placement: Placement) -> Callable[[LayerPlacement], Planner]:
        """Makes the planner of a layer, in whichever of the formats its experts are stored."""
        machine = None if self.config.machine is None else cost_model(self.config.machine)
        names = {*travelling_formats(self.strategy, placement), *self.formats}
        cost = None if machine is None else machine.layer(family.shape(names))
        return lambda layer: self.strategy.planner(layer, placement.topology, cost)

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

    def summary(self) -> str:
        """What rebalancing will do, in a line."""
        rule = self.rule
        gain = "whatever it gains" if rule.min_gain is None else f"for a gain of {rule.min_gain:g} max/mean or more"
        speed = "" if rule.bytes_per_step is None else f", {rule.bytes_per_step:,} bytes a step and rank at most"
        known = "without calibration" if self.config.stats is None else f"with the sensitivities of {self.config.stats}"
        if self.reads_formats:
            known += f", those in few bits from {self.config.experts}"
        return (
            f"rebalancing: {self.strategy.name} decides every {rule.interval} steps on the last {rule.window}, {gain}; "
            f"formats {', '.join(self.formats)} {known}; room of {self.room_bytes:,} bytes a rank{speed}"
        )


def _refuse_settings(config: ServeConfig) -> None:
    for item in options_of(ServeConfig).values():
        value = getattr(config, item.name)
        if item.group == REBALANCING and item.name != "rebalance" and value != item.default:
            shown = ",".join(value) if isinstance(value, tuple) else value
            raise UserError(f"{item.flag} {shown}: needs --rebalance auto")


def _check_formats(config: ServeConfig, opened: OpenedModel, native: str, formats: tuple[str, ...]) -> None:
    """Raise a `UserError` unless experts are stored in these formats, and a folder with some has all in few bits."""
    for module in opened.experts:
        for expert in range(module.num_experts):
            stored = opened.reader.stored_format(module.name, expert)
            if stored is not None and stored not in formats:
                raise UserError(
                    f"--rebalance auto: expert {expert} of layer {module.layer_index} is stored in {stored} and others "
                    f"are not: give --formats {','.join((*formats, stored))}"
                )
    if config.experts is None:
        return
    low = tuple(name for name in formats if name != native)
    if not low:
        raise UserError(f"--experts {config.experts}: --formats {','.join(formats)} stores no expert in low bits")
    layers = [module.layer_index for module in opened.experts]
    in_advance = PackedExperts.open(config.experts, model_identity(config.model))
    in_advance.check_holds_all(layers, opened.experts[0].num_experts, low)


def _stats(config: ServeConfig, opened: OpenedModel, native: str, formats: tuple[str, ...]) -> ExpertStats:
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
