"""`rq-ep profile`: time the parts of a layer on this machine, as a file that gives the cost of plans."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq_ep.config import DEVICES, CheckpointOptions, add_flags, read_settings
from rq_ep.core.errors import UserError
from rq_ep.core.options import option, same_option
from rq_ep.costs import MACHINES, Profile
from rq_ep.costs.measured import ITEM_BYTES
from rq_ep.costs.shapes import SHAPES, Shape, shape_name

if TYPE_CHECKING:
    import torch

    from rq_ep.moe.expert_family import ExpertFamily
    from rq_ep.parallel import EPGroup
    from rq_ep.profiling.layer_profile import ProfiledLayer

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # computed in, by default
LINKS = {"cpu": "cpu", "cuda": "h200"}  # device -> machine whose link stands in for one that was not measured

STYLE: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What `rq-ep profile` takes."""

    out: str = option("", help="profile to write (.json), for --machine FILE", required=True, metavar="FILE")
    model: str | None = option(
        None,
        help="directory of a checkpoint, or ORG/NAME of the hub, whose experts are timed, instead of a shape's; its "
        "weights are not needed",
        metavar="MODEL",
    )
    revision: str | None = same_option(CheckpointOptions, "revision")
    shape: str | None = option(
        None, help=f"sizes of a gated layer, without a model: {', '.join(SHAPES)} (default: tiny)"
    )
    hidden_size: int | None = option(None, help="hidden size, instead of the shape's", minimum=1)
    intermediate_size: int | None = option(None, help="intermediate size, instead of the shape's", minimum=1)
    num_experts: int | None = option(None, help="experts, instead of the shape's", minimum=1)
    top_k: int | None = option(None, help="experts of a token, instead of the shape's", minimum=1)
    formats: Sequence[str] = option(("bf16", "int8"), help="weight formats, by commas")
    dtype: str | None = option(
        None, help="dtype to compute in; default: float32 on a CPU, bfloat16 on a GPU", choices=tuple(ITEM_BYTES)
    )
    device: str = option("auto", help="device to compute on", choices=DEVICES)
    link_machine: str | None = option(
        None,
        help="where one rank runs, take the link of this machine (default: cpu, on a GPU h200), which is not measured; "
        "to measure a link, start R ranks: torchrun --nproc-per-node R -m rq_ep profile ...",
        choices=tuple(MACHINES),
    )
    repeat_seconds: float = option(0.2, help="how long each figure is repeated", minimum=0, maximum=60)


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ProfileOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import check_inputs, check_outputs, launched_ranks, parse_dtype, quiet_libraries

    options = read_settings(ProfileOptions, args)
    check_outputs({"--out": options.out})
    shape = _shape(options)
    if options.model is not None:
        check_inputs(options.model)

    from rq_ep.commands.progress_bar import showing
    from rq_ep.profiling.layer_profile import profile_layer

    quiet_libraries()
    with launched_ranks("profile", options.device) as group:
        kind = group.device.type
        layer = _layer(options, shape, parse_dtype(options.dtype or DTYPES[kind]), group)
        with showing(group.rank == 0) as show:
            profile = profile_layer(
                layer,
                group,
                device_name=_device_name(kind),
                link_machine=options.link_machine or LINKS[kind],
                budget_s=options.repeat_seconds,
                progress=show,
            )
        if group.rank == 0:
            profile.save(options.out)
            _print(profile, layer, kind)
            print(f"{options.out}: written; price plans with it: rq-ep simulate --machine {options.out}")


def _shape(options: ProfileOptions) -> Shape | None:
    """The sizes of the layer from the command line; None where a model has them."""
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if options.model is not None:
        if given or options.shape is not None:
            own = ", ".join(["shape"] if options.shape else given)
            raise UserError(f"--model {options.model}: the model has its own {own}; leave these options out")
        return None
    shape = replace(SHAPES[shape_name(options.shape or "tiny")], **given)
    if shape.top_k > shape.num_experts:
        raise UserError(f"--top-k {shape.top_k}: more than the {shape.num_experts} experts")
    return shape


def _layer(options: ProfileOptions, shape: Shape | None, dtype: "torch.dtype", group: "EPGroup") -> "ProfiledLayer":
    from rq_ep.formats import get_format
    from rq_ep.model.model_folder import find_model
    from rq_ep.moe.expert_family import ExpertFamily
    from rq_ep.parallel.agreement import run_on_all_ranks
    from rq_ep.profiling.layer_profile import ProfiledLayer

    formats = tuple(dict.fromkeys(get_format(name).name for name in options.formats))
    if options.model is not None:
        folder = find_model(options.model, options.revision, group, config_only=True)
        return ProfiledLayer(*run_on_all_ranks(group, lambda: _family_of_model(folder)), formats, dtype)
    assert shape is not None
    family = ExpertFamily.gated(shape.hidden_size, shape.intermediate_size)
    return ProfiledLayer(family, shape.num_experts, shape.top_k, formats, dtype)


def _family_of_model(path: Path) -> "tuple[ExpertFamily, int, int]":
    """Family, experts and experts per token of a checkpoint, by its configuration alone."""
    from rq_ep.model.checkpoint.checkpoint_files import read_config
    from rq_ep.model.load.opened_model import empty_model
    from rq_ep.model.seam.expert_modules import experts_per_token, find_expert_modules

    model = empty_model(path, read_config(path))
    experts = find_expert_modules(model)
    return experts[0].family, experts[0].num_experts, experts_per_token(model.config)


def _device_name(kind: str) -> str:
    import torch

    from rq_ep.commands.env import processor_name

    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()} (CPU, {torch.get_num_threads()} threads per rank)"


def _print(profile: Profile, layer: "ProfiledLayer", kind: str) -> None:
    from rich.table import Table

    from rq_ep.commands.console import wide_console

    shape, console = layer.shape, wide_console()
    print(
        f"one expert, hidden size {shape.hidden_size}, intermediate size {shape.intermediate_size}, "
        f"computed in {profile.dtype}"
    )
    fitted = Table("format", "KiB", "us a call", "us an expert", "us weights", "us a row", **STYLE)
    for name, fit in profile.fits.items():
        figures = (fit.call_s, fit.overhead_s, fit.stream_s, fit.pair_s)
        fitted.add_row(name, f"{shape.expert_bytes[name] / 1024:,.0f}", *(f"{1e6 * figure:.4g}" for figure in figures))
    checks = Table("format", "tokens", "us predicted", "us measured", "error", **STYLE)
    for check in profile.checks:
        times = (f"{1e6 * check.predicted_s:,.0f}", f"{1e6 * check.measured_s:,.0f}")
        checks.add_row(check.format, str(check.num_tokens), *times, f"{check.error:+.0%}")
    cost = profile.layer(shape)
    console.print(fitted)
    print("a rank's step takes one call, its experts, and the longer of its rows and its weights.\n")
    print("prediction and measurement of steps that were not fitted, uneven load:")
    console.print(checks)
    print()
    print(f"row picked and sent one way: {1e6 * cost.row_s:.3g} us after {1e6 * cost.latency_s:.3g} us a round")
    transfers = ", ".join(f"{1e6 * seconds:.4g} us in {name}" for name, seconds in cost.transfer_s.items())
    print(f"expert sent: {transfers}; link {profile.link.source}")
    plans = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in profile.plan_s.items())
    print(f"one plan of {profile.num_experts} experts on {profile.plan_ranks} ranks: {plans}")
    print(f"device: {profile.device}, {profile.num_ranks} rank(s) at once")
    if kind == "cpu":
        print("These are figures of a CPU: they say nothing about a GPU.")
