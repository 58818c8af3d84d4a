"""`rq-ep profile`: time the parts of a layer on this machine, as a file that gives the cost of plans."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from rq_ep.costs import Profile
    from rq_ep.costs.shapes import Shape
    from rq_ep.moe.expert_family import ExpertFamily
    from rq_ep.profiling.layer_profile import ProfiledLayer

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # computed in, by default
LINKS = {"cpu": "cpu", "cuda": "h200"}  # device -> machine whose link stands in for one that was not measured

STYLE: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="profile to write (.json), for --machine FILE")
    parser.add_argument("--model", metavar="DIR", help="checkpoint whose experts are timed, instead of a shape's")
    parser.add_argument(
        "--shape", metavar="NAME",
        help="sizes of a gated layer, without a model: tiny (default), olmoe, mixtral, qwen3-moe, gpt-oss-120b, "
        "deepseek-v3 or kimi-k2",
    )  # fmt: skip
    for name in SIZES:
        what = name.replace("_", " ")
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{what}, instead of the shape's"
        )
    parser.add_argument("--formats", default="bf16,int8", metavar="NAMES", help="weight formats, by commas")
    parser.add_argument(
        "--dtype", metavar="NAME", help="dtype to compute in (default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument(
        "--link-machine", metavar="NAME",
        help="where one rank runs, take the link of this machine (default: cpu, on a GPU h200); to measure the link, "
        "start R ranks: torchrun --nproc-per-node R -m rq_ep profile ...",
    )  # fmt: skip
    parser.add_argument(
        "--repeat-seconds", type=float, default=0.2, metavar="S", help="how long each figure is repeated"
    )


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import parse_dtype, quiet_libraries
    from rq_ep.commands.progress_bar import showing
    from rq_ep.core.errors import check_choice, check_number
    from rq_ep.core.files import check_writable
    from rq_ep.costs import MACHINES
    from rq_ep.parallel.default_group import default_group
    from rq_ep.profiling.layer_profile import profile_layer

    check_writable(args.out)
    check_number("--repeat-seconds", args.repeat_seconds, 0.0, 60.0)
    if args.link_machine is not None:
        check_choice("--link-machine", args.link_machine, MACHINES)
    shape = _shape(args)
    quiet_libraries()
    group = default_group(args.device)
    try:
        kind = group.device.type
        layer = _layer(args, shape, parse_dtype(args.dtype or DTYPES[kind]))
        with showing(group.rank == 0) as show:
            profile = profile_layer(
                layer,
                group,
                device_name=_device_name(kind),
                link_machine=args.link_machine or LINKS[kind],
                budget_s=args.repeat_seconds,
                progress=show,
            )
        if group.rank == 0:
            profile.save(args.out)
            _print(profile, layer, kind)
            print(f"{args.out}: written; price plans with it: rq-ep simulate --machine {args.out}")
    finally:
        group.close()


def _shape(args: argparse.Namespace) -> "Shape | None":
    """The sizes of the layer from the command line; None where a model has them."""
    from rq_ep.core.errors import UserError, check_integer
    from rq_ep.costs.shapes import SHAPES, shape_name

    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    for name, size in given.items():
        check_integer(f"--{name.replace('_', '-')}", size, 1)
    if args.model is not None:
        if given or args.shape is not None:
            own = ", ".join(["shape"] if args.shape else given)
            raise UserError(f"--model {args.model}: the model has its own {own}; leave these options out")
        return None
    shape = replace(SHAPES[shape_name(args.shape or "tiny")], **given)
    if shape.top_k > shape.num_experts:
        raise UserError(f"--top-k {shape.top_k}: more than the {shape.num_experts} experts")
    return shape


def _layer(args: argparse.Namespace, shape: "Shape | None", dtype: "torch.dtype") -> "ProfiledLayer":
    from rq_ep.commands.common import parse_names
    from rq_ep.core.errors import UserError
    from rq_ep.formats import get_format
    from rq_ep.moe.expert_family import ExpertFamily
    from rq_ep.profiling.layer_profile import ProfiledLayer

    formats = tuple(dict.fromkeys(get_format(name).name for name in parse_names(args.formats)))
    if not formats:
        raise UserError(f"--formats {args.formats!r}: name at least one, such as bf16,int8")
    if shape is None:
        return ProfiledLayer(*_family_of_model(args.model), formats, dtype)
    family = ExpertFamily.gated(shape.hidden_size, shape.intermediate_size)
    return ProfiledLayer(family, shape.num_experts, shape.top_k, formats, dtype)


def _family_of_model(path: str) -> "tuple[ExpertFamily, int, int]":
    """Family, experts and experts per token of a checkpoint, by its configuration alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from rq_ep.model.checkpoint.checkpoint_files import read_config
    from rq_ep.model.checkpoint.tokenizer_files import transformers_errors
    from rq_ep.model.seam.expert_modules import family_of, find_expert_modules

    config = read_config(path)
    with transformers_errors(path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = find_expert_modules(model)
    return family_of(experts[0].module), experts[0].num_experts, getattr(config, "num_experts_per_tok", None) or 1


def _device_name(kind: str) -> str:
    import torch

    from rq_ep.commands.env import processor_name

    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()} (CPU, {torch.get_num_threads()} threads per rank)"


def _print(profile: "Profile", layer: "ProfiledLayer", kind: str) -> None:
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
