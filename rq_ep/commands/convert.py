"""`rq-ep convert`: statistics and placements of other engines into ours, and our placements into theirs."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rq_ep.commands.common import check_outputs, parse_names
from rq_ep.config import add_flags, read_settings
from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.options import option
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ExpertStats
from rq_ep.interchange import (
    ENGINES,
    STATS_FORMATS,
    ModelMetadata,
    SlotMap,
    check_engine,
    export,
    to_stats,
    write_slots,
)
from rq_ep.interchange.rows import format_layers

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
METADATA = "what other engines' files do not say"


def _parse_sizes(value: Any) -> dict[str, int]:
    """`"bf16=1000, int8=504"`, or that as a mapping in a file -> {"bf16": 1000, "int8": 504}."""
    text = ",".join(f"{name}={size}" for name, size in value.items()) if isinstance(value, Mapping) else str(value)
    sizes = {}
    for part in parse_names(text):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not size.isdecimal() or len(size) > 18 or name in sizes:
            raise UserError(
                f"--expert-bytes {text!s:.80}: {part!r:.60}: expected NAME=BYTES once each, such as bf16=9437184"
            )
        sizes[name] = int(size)
    return sizes


def _parse_layers(value: Any) -> tuple[int, ...]:
    """`"3-5,7"`, or a list of such in a file -> (3, 4, 5, 7)."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    layers: list[int] = []
    for part in parse_names(text):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if match is None or (layers and int(match[1]) <= layers[-1]) or int(match[2] or match[1]) < int(match[1]):
            raise UserError(
                f"--layers {text!s:.80}: {part!r:.60}: expected numbers and ranges that ascend, such as 3-60 or 1,3,5"
            )
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not layers:
        raise UserError("--layers: name at least one, such as 3-60")
    return tuple(layers)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `rq-ep convert` takes beside the files."""

    source: str | None = option(
        None,
        flag="--from",
        help=f"engine that wrote FILE: {', '.join(STATS_FORMATS)} (statistics); {', '.join(ENGINES)} (placements); "
        "placement (ours); by default it is guessed where the file leaves no doubt",
        metavar="NAME",
    )
    target: str = option(
        "", flag="--to", help=f"stats or placement (ours); or {', '.join(ENGINES)}", required=True, metavar="NAME"
    )
    out: str = option("", help="where it goes; the suffix chooses among formats", required=True, metavar="FILE")
    expert_bytes: Mapping[str, int] | None = option(
        None,
        help="bytes of one expert in each format, native first, such as bf16=88080384,int8=44126208",
        metavar="SIZES",
        parse=_parse_sizes,
        group=METADATA,
    )
    native_format: str | None = option(
        None, help="if it is not the first of --expert-bytes", metavar="NAME", group=METADATA
    )
    layers: Sequence[int] | None = option(
        None,
        help="MoE layers as the model numbers them, such as 3-60: which to take or, where rows have no number, what "
        "these are (default: all that count something; 0 up)",
        parse=_parse_layers,
        group=METADATA,
    )
    top_k: int | None = option(None, help="experts of a token; --tokens-per-step needs it", minimum=1, group=METADATA)
    hidden_size: int | None = option(
        None, help="of the model; `simulate --machine` needs it", minimum=1, group=METADATA
    )
    intermediate_size: int | None = option(None, help="of one expert; likewise", minimum=1, group=METADATA)
    expert_groups: int | None = option(
        None, help="where the model routes by groups of experts", minimum=1, group=METADATA
    )
    num_ranks: int | None = option(None, help="ranks that share the slots of a placement", minimum=1, group=METADATA)
    ranks_per_node: int = option(0, help="0: all ranks share one node", minimum=0, group=METADATA)
    stats: str | None = option(
        None,
        help="statistics of the same model, which say bytes, layers and identity for a placement",
        metavar="FILE",
        group=METADATA,
    )
    num_model_layers: int = option(
        0,
        help="layers of the model, dense ones included: SGLang wants a row for each (0: up to the last MoE layer)",
        minimum=0,
        group=METADATA,
    )

    @property
    def metadata(self) -> ModelMetadata:
        """What the files lack."""
        sizes = self.expert_bytes or {}
        if self.native_format and sizes:
            check_choice("--native-format", self.native_format, sizes)
        return ModelMetadata(
            sizes,
            self.native_format,
            top_k=self.top_k,
            layers=None if self.layers is None else tuple(self.layers),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            expert_groups=self.expert_groups,
        )


def configure(parser: argparse.ArgumentParser) -> None:
    for title, example in DIRECTIONS.items():
        parser.add_argument_group(title, example)
    parser.add_argument("files", nargs="+", metavar="FILE", help="what to convert; a folder for trtllm's statistics")
    add_flags(parser, ConvertOptions)


def run(args: argparse.Namespace) -> None:
    options = read_settings(ConvertOptions, args)
    paths = [Path(name) for name in args.files]
    target = check_engine("--to", options.target, (STATS, PLACEMENT))
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or directory")
    source = options.source or _guess(paths, target)
    check_outputs({"--out": options.out}, [*args.files, options.stats])
    if target == STATS:
        check_choice("--from for statistics", source, STATS_FORMATS)
        _to_stats(paths, source, options)
    elif source == PLACEMENT:
        check_choice("--to for a placement of ours", target, ENGINES)
        _to_engine(_only(paths), target, options)
    else:
        check_choice("--from for placements", source, [PLACEMENT, *ENGINES])
        _from_engine(_only(paths), source, target, options)


def _to_stats(paths: list[Path], source: str, options: ConvertOptions) -> None:
    metadata = options.metadata
    _ = metadata.native  # missing sizes are reported before long files are read
    num_bytes = sum(file.stat().st_size for path in paths for file in (path, *path.glob("*")) if file.is_file())
    if num_bytes > LONG_READ_BYTES:
        print(f"reading {num_bytes / 2**30:.1f} GiB", file=sys.stderr)
    stats = to_stats(STATS_FORMATS[source].read(paths), metadata, str(paths[0]))
    stats.save(options.out)
    print(
        f"{options.out}: {stats.num_steps} steps of {stats.num_experts} experts in layers "
        f"{format_layers(stats.layers)}, {int(stats.counts.sum()):,} pairs"
    )
    if stats.num_steps == 1:
        print("one step: a placement by it sees loads, but not which experts are busy together; record more steps")


def _to_engine(path: Path, target: str, options: ConvertOptions) -> None:
    placement = Placement.load(path)
    export(placement, target, options.out, options.num_model_layers)
    layers = format_layers([layer.index for layer in placement.layers])
    slots = len(SlotMap.of(placement).experts_LS[0])
    print(f"{options.out}: layers {layers} for {target}, {slots} slots on {placement.topology.num_ranks} ranks")


def _from_engine(path: Path, source: str, target: str, options: ConvertOptions) -> None:
    metadata = options.metadata
    stats = None if options.stats is None else ExpertStats.load(options.stats)
    if stats is not None:
        metadata = replace(
            metadata,
            expert_bytes=metadata.expert_bytes or stats.expert_bytes,
            native_format=metadata.native_format or stats.native_format,
            layers=metadata.layers or stats.layers,
        )
    slots = ENGINES[source].read(path, options.num_ranks, metadata.layers)
    if target == PLACEMENT:
        model = None if stats is None else stats.model
        placement = slots.to_placement(metadata.expert_bytes, metadata.native, options.ranks_per_node, model)
        placement.save(options.out)
    else:
        write_slots(replace(slots, num_model_layers=options.num_model_layers), target, options.out)
    print(f"{options.out}: {_describe(slots)}")


def _describe(slots: SlotMap) -> str:
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


def _only(paths: list[Path]) -> Path:
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: a placement is one file; only statistics may be several")
    return paths[0]


def _guess(paths: list[Path], target: str) -> str:
    """The engine that wrote a file, if its kind leaves no doubt."""
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
