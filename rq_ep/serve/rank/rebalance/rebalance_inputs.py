"""What rebalancing needs besides the model that serves, and the checks of it before anything is loaded."""

from dataclasses import dataclass, replace

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import RebalanceRule
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.rebalancing.pace import Pace
from rq_ep.serve.check_settings import chosen_strategy
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs, known_stats, stored_formats
from rq_ep.strategies import choose_strategy


@dataclass(frozen=True)
class RebalanceInputs(MoveInputs):
    """The settings of rebalancing, checked, and the checkpoint that it reads experts from."""

    rule: RebalanceRule

    @classmethod
    def check(cls, config: ServeConfig) -> "RebalanceInputs | None":
        """Check the settings, beyond `check_settings`; None: rebalancing is off.

        Raises:
            UserError: unknown formats, statistics of another model, too little room.
        """
        if config.rebalance == "off":
            return None
        placement = None if config.placement is None else Placement.load(config.placement)
        strategy = choose_strategy(chosen_strategy(config), placement)
        assert strategy.rebalance_rule is not None
        opened = OpenedModel.open(config.model, config.dtype)
        native = expert_format(opened.checkpoint, opened.dtype)
        wanted = config.formats or (() if placement is None else placement.formats)
        formats = tuple(dict.fromkeys([native, *wanted, *(() if placement is None else placement.formats)]))
        _check_formats(config, opened, native, formats)
        rule = config.applied_to(strategy.rebalance_rule)
        stats = known_stats(config, opened, native, formats)
        largest = max(stats.expert_bytes[name] for name in formats)
        room = largest if rule.room_bytes is None else rule.room_bytes
        if room < largest:
            raise UserError(f"--rebalance-room {room}: an expert takes {largest} bytes; give as many or more")
        return cls(config, strategy, opened, native, formats, stats, room, replace(rule, room_bytes=room))

    @property
    def keeps_stacks(self) -> bool:
        return False

    @property
    def pace(self) -> Pace:
        return replace(super().pace, bytes_per_step=self.rule.bytes_per_step)

    @property
    def measures_importance(self) -> bool:
        """Whether traffic is to show which experts matter: formats may change, and no file says."""
        return self.config.stats is None and len(self.formats) > 1

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


def _check_formats(config: ServeConfig, opened: OpenedModel, native: str, formats: tuple[str, ...]) -> None:
    """Raise a `UserError` unless experts are stored in these formats, and a folder with some has all in few bits."""
    for layer, expert, stored in stored_formats(opened):
        if stored is not None and stored not in formats:
            raise UserError(
                f"--rebalance auto: expert {expert} of layer {layer} is stored in {stored} and others "
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
