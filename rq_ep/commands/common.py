"""Options and set-up that several commands share."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq_ep.config import DTYPES
from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.files.documents import check_writable
from rq_ep.core.files.yaml_files import parse_yaml
from rq_ep.core.options import option
from rq_ep.core.strategy import Strategy
from rq_ep.model.model_names import check_is_there

if TYPE_CHECKING:
    import torch

    from rq_ep.core.cost import LayerCost
    from rq_ep.core.stats import ExpertStats
    from rq_ep.parallel import EPGroup


def parse_names(text: str) -> list[str]:
    """`"bf16, int8"` -> ["bf16", "int8"]."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_dtype(name: str) -> "torch.dtype":
    """A torch dtype from its name."""
    import torch

    dtype: torch.dtype = getattr(torch, check_choice("--dtype", name, DTYPES))
    return dtype


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Settings of strategies, which `parse_strategies` reads."""

    strategy_settings: Sequence[str] = option(
        (),
        flag="--set",
        help="setting of a strategy, such as llep.min_tokens_per_gemm=16; may be repeated",
        several=True,
        metavar="NAME.SETTING=VALUE",
    )


def parse_strategies(names: Iterable[str], settings: Iterable[str]) -> dict[str, Strategy]:
    """Name -> strategy, with its settings.

    Args:
        names: of strategies, from the table or as `package.module:Class`.
        settings: texts such as "llep.min_tokens_per_gemm=16".

    Raises:
        UserError: an unknown strategy or setting, or a setting of a strategy that is not among `names`.
    """
    from rq_ep.strategies import STRATEGIES, make_strategy, strategy_class

    knobs: dict[str, dict[str, Any]] = {name: {} for name in names}
    if not knobs:
        raise UserError(f"--strategies: name at least one of {', '.join(STRATEGIES)}")
    for name in knobs:
        strategy_class(name)
    for text in settings:
        target, is_given, value = text.partition("=")
        name, dot, knob = target.strip().rpartition(".")
        if not (is_given and dot and knob):
            raise UserError(f"--set {text}: expected NAME.SETTING=VALUE, such as llep.min_tokens_per_gemm=16")
        knobs[check_choice("strategy in --set", name, knobs)][knob.replace("-", "_")] = _read_value(text, value)
    return {name: make_strategy(name, **chosen) for name, chosen in knobs.items()}


def _read_value(text: str, value: str) -> Any:
    try:
        return parse_yaml(value, "")
    except UserError:
        raise UserError(f"--set {text:.80}: {value!r:.60} is not a value") from None


def layer_cost(machine: str | None, stats: "ExpertStats") -> "LayerCost | None":
    """What a layer of the calibrated model costs on the machine that `--machine` names; None without one."""
    from rq_ep.core.cost import LayerShape
    from rq_ep.costs import cost_model

    if machine is None:
        return None
    model = cost_model(machine)
    if stats.hidden_size is None or stats.intermediate_size is None:
        raise UserError(f"--machine {machine}: {stats.source} does not name hidden_size and intermediate_size")
    return model.layer(LayerShape(stats.hidden_size, stats.intermediate_size, stats.expert_bytes))


def check_inputs(model: str, texts: Iterable[Path] = ()) -> None:
    """Raise a `UserError` for a model or a text that is not there: before torch is imported, which takes seconds."""
    check_is_there(model)
    for path in texts:
        if not path.exists():
            raise UserError(f"--text {path}: no such file or directory")


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | None] = ()) -> None:
    """Raise a `UserError` for a file that cannot be written, or that the command also reads or writes otherwise.

    Args:
        outputs: flag -> the file that it names, if any.
        inputs: files that are read, and would be lost.
    """
    taken = {Path(path).resolve() for path in inputs if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise UserError(f"{flag} {path}: the command reads or writes this file already; name another one")
        taken.add(Path(path).resolve())
        try:
            check_writable(path)
        except UserError as error:
            raise UserError(f"{flag} {error}") from None


@contextmanager
def launched_ranks(command: str, device: str) -> Iterator["EPGroup"]:
    """The group of all processes that a launcher started, while open; without one, this process alone.

    A `UserError` must be raised on every rank; rank 0 prints it, and all exit with 2. Any other error or Ctrl-C cuts
    off what is under way, so that no rank waits for another.
    """
    from rq_ep.parallel.agreement import report_user_error
    from rq_ep.parallel.default_group import default_group

    group = default_group(device)
    try:
        yield group
    except UserError as error:
        if group.size == 1:
            raise
        sys.exit(report_user_error(group, f"rq-ep {command}", error))
    except BaseException:
        group.end()
        raise
    finally:
        group.close()


def quiet_libraries() -> None:
    """Keep transformers' progress bars and reports out of ours. It holds for the whole process: for commands only."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # of downloads, which this has disabled as well
    logging.set_verbosity_error()
