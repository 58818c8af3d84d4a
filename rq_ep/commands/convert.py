"""`rq-ep convert`: statistics and placements of other engines into ours, and our placements into theirs."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rq_ep.interchange import ModelMetadata, SlotMap

STATS, PLACEMENT = "stats", "placement"
LONG_READ_BYTES = 2**28
# Conversions, for the help; every engine and format is a row of the tables in `rq_ep.interchange`.
DIRECTIONS = {
    "what was recorded, into statistics": "rq-ep convert expert_distribution_recorder_*.pt --from sglang --to stats "
    "--expert-bytes bf16=88080384,int8=44126208 --top-k 8 --out stats.safetensors",
    "a placement, for another engine": "rq-ep convert placement.json --to trtllm --out moe_load_balancer.yaml. It must "
    "keep that engine's rule, equal slots of one format and even shares, as `rq-ep place --for` does; any other is "
    "refused, and what is wrong is named",
    "another engine's placement, into ours": "rq-ep convert init_expert_location.json --from sglang --to placement "
    "--num-ranks 32 --stats stats.safetensors --out placement.json, to evaluate it with `rq-ep simulate`",
    "one engine's placement, for another": "rq-ep convert map.json --from ascend --to eplb --out tensors.npz",
}


def configure(parser: argparse.ArgumentParser) -> None:
    from rq_ep.interchange import ENGINES, STATS_FORMATS

    for title, example in DIRECTIONS.items():
        parser.add_argument_group(title, example)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what to convert; a folder for trtllm's statistics")
    parser.add_argument(
        "--from", dest="source", metavar="NAME",
        help=f"engine that wrote FILE: {', '.join(STATS_FORMATS)} (statistics); {', '.join(ENGINES)} (placements); "
        "placement (ours); by default it is guessed where the file leaves no doubt",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target", required=True, metavar="NAME",
        help=f"stats or placement (ours); or {', '.join(ENGINES)}",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="where it goes; the suffix chooses among formats")
    metadata = parser.add_argument_group("what other engines' files do not say")
    metadata.add_argument(
        "--expert-bytes", metavar="SIZES",
        help="bytes of one expert in each format, native first, such as bf16=88080384,int8=44126208",
    )  # fmt: skip
    metadata.add_argument("--native-format", metavar="NAME", help="if it is not the first of --expert-bytes")
    metadata.add_argument(
        "--layers", metavar="LAYERS",
        help="MoE layers as the model numbers them, such as 3-60: which to take or, where rows have no number, what "
        "these are (default: all that count something; 0 up)",
    )  # fmt: skip
    metadata.add_argument("--top-k", type=int, metavar="K", help="experts of a token; --tokens-per-step needs it")
    metadata.add_argument("--hidden-size", type=int, metavar="D", help="of the model; `simulate --machine` needs it")
    metadata.add_argument("--intermediate-size", type=int, metavar="F", help="of one expert; likewise")
    metadata.add_argument("--expert-groups", type=int, metavar="G", help="where the model routes by groups of experts")
    metadata.add_argument("--num-ranks", type=int, metavar="R", help="ranks that share the slots of a placement")
    metadata.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="0: all ranks share one node")
    metadata.add_argument(
        "--stats", metavar="FILE",
        help="statistics of the same model, which say bytes, layers and identity for a placement",
    )  # fmt: skip
    metadata.add_argument(
        "--num-model-layers", type=int, default=0, metavar="N",
        help="layers of the model, dense ones included: SGLang wants a row for each (0: up to the last MoE layer)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from rq_ep.core.errors import check_choice
    from rq_ep.core.files import check_writable
    from rq_ep.interchange import ENGINES, STATS_FORMATS

    paths = [Path(name) for name in args.files]
    source = args.source or _guess(paths, args.target)
    target = check_choice("--to", args.target, [STATS, PLACEMENT, *ENGINES])
    check_writable(args.out)
    if target == STATS:
        check_choice("--from for statistics", source, STATS_FORMATS)
        _to_stats(paths, source, args)
    elif source == PLACEMENT:
        check_choice("--to for a placement of ours", target, ENGINES)
        _to_engine(_only(paths), target, args)
    else:
        check_choice("--from for placements", source, [PLACEMENT, *ENGINES])
        _from_engine(_only(paths), source, target, args)


def _to_stats(paths: list[Path], source: str, args: argparse.Namespace) -> None:
    from rq_ep.interchange import STATS_FORMATS, to_stats
    from rq_ep.interchange.rows import format_layers

    metadata = _metadata(args)
    _ = metadata.native  # missing sizes are reported before long files are read
    num_bytes = sum(file.stat().st_size for path in paths for file in (path, *path.glob("*")) if file.is_file())
    if num_bytes > LONG_READ_BYTES:
        print(f"reading {num_bytes / 2**30:.1f} GiB", file=sys.stderr)
    stats = to_stats(STATS_FORMATS[source].read(paths), metadata, str(paths[0]))
    stats.save(args.out)
    print(
        f"{args.out}: {stats.num_steps} steps of {stats.num_experts} experts in layers {format_layers(stats.layers)}, "
        f"{int(stats.counts.sum()):,} pairs"
    )
    if stats.num_steps == 1:
        print("one step: a placement by it sees loads, but not which experts are busy together; record more steps")


def _to_engine(path: Path, target: str, args: argparse.Namespace) -> None:
    from rq_ep.core.placement import Placement
    from rq_ep.interchange import SlotMap, export
    from rq_ep.interchange.rows import format_layers

    placement = Placement.load(path)
    export(placement, target, args.out, args.num_model_layers)
    layers = format_layers([layer.index for layer in placement.layers])
    slots = len(SlotMap.of(placement).experts_LS[0])
    print(f"{args.out}: layers {layers} for {target}, {slots} slots on {placement.topology.num_ranks} ranks")


def _from_engine(path: Path, source: str, target: str, args: argparse.Namespace) -> None:
    from dataclasses import replace

    from rq_ep.core.stats import ExpertStats
    from rq_ep.interchange import ENGINES, write_slots

    metadata = _metadata(args)
    stats = None if args.stats is None else ExpertStats.load(args.stats)
    if stats is not None:
        metadata = replace(
            metadata,
            expert_bytes=metadata.expert_bytes or stats.expert_bytes,
            native_format=metadata.native_format or stats.native_format,
            layers=metadata.layers or stats.layers,
        )
    slots = ENGINES[source].read(path, args.num_ranks, metadata.layers)
    if target == PLACEMENT:
        model = None if stats is None else stats.model
        placement = slots.to_placement(metadata.expert_bytes, metadata.native, args.ranks_per_node, model)
        placement.save(args.out)
    else:
        write_slots(replace(slots, num_model_layers=args.num_model_layers), target, args.out)
    print(f"{args.out}: {_describe(slots)}")


def _describe(slots: "SlotMap") -> str:
    from rq_ep.interchange.rows import format_layers

    num_duplicates = slots.num_duplicates
    duplicates = (
        f"; slots that hold an expert their rank has already, and do nothing: {num_duplicates}"
        if num_duplicates
        else ""
    )
    return (
        f"layers {format_layers(slots.layers)}, {slots.num_experts} experts in {slots.experts_LS.shape[1]} slots on "
        f"{slots.num_ranks} ranks{duplicates}"
    )


def _metadata(args: argparse.Namespace) -> "ModelMetadata":
    from rq_ep.core.errors import check_choice, check_integer
    from rq_ep.interchange import ModelMetadata

    sizes = _parse_sizes(args.expert_bytes) if args.expert_bytes else {}
    if args.native_format and sizes:
        check_choice("--native-format", args.native_format, sizes)
    names = ("top_k", "hidden_size", "intermediate_size", "expert_groups")
    numbers = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in numbers.items():
        check_integer(f"--{name.replace('_', '-')}", value, 1)
    layers = _parse_layers(args.layers) if args.layers else None
    return ModelMetadata(sizes, args.native_format, layers=layers, **numbers)


def _parse_sizes(text: str) -> dict[str, int]:
    """`"bf16=1000, int8=504"` -> {"bf16": 1000, "int8": 504}."""
    from rq_ep.commands.common import parse_names
    from rq_ep.core.errors import UserError

    sizes = {}
    for part in parse_names(text):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not size.isdecimal() or len(size) > 18 or name in sizes:
            raise UserError(f"--expert-bytes {text}: {part!r}: expected NAME=BYTES, each once, such as bf16=88080384")
        sizes[name] = int(size)
    return sizes


def _parse_layers(text: str) -> tuple[int, ...]:
    """`"3-5,7"` -> (3, 4, 5, 7)."""
    import re

    from rq_ep.commands.common import parse_names
    from rq_ep.core.errors import UserError

    layers: list[int] = []
    for part in parse_names(text):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if match is None or (layers and int(match[1]) <= layers[-1]) or int(match[2] or match[1]) < int(match[1]):
            raise UserError(
                f"--layers {text}: {part!r}: expected numbers and ranges that ascend, such as 3-60 or 1,3,5"
            )
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not layers:
        raise UserError("--layers: name at least one, such as 3-60")
    return tuple(layers)


def _only(paths: list[Path]) -> Path:
    from rq_ep.core.errors import UserError

    if len(paths) > 1:
        raise UserError(f"{paths[1]}: a placement is one file; only statistics may be several")
    return paths[0]


def _guess(paths: list[Path], target: str) -> str:
    """The engine that wrote a file, if its kind leaves no doubt."""
    from rq_ep.core.errors import UserError

    path = paths[0]
    if target == STATS:
        if path.is_dir():
            return "trtllm"
        if path.suffix == ".npy":
            return "numpy"
    elif path.suffix in (".yaml", ".yml"):
        return "trtllm"
    elif path.suffix == ".json" and target != PLACEMENT:
        return PLACEMENT
    raise UserError(f"{path}: could be from several engines; name it with --from")
