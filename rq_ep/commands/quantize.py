"""`rq-ep quantize`: write experts in low-bit formats, once, for calibrate, eval, the server and `rq_ep.load`."""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR",
        help="Hugging Face checkpoint; to spread one that is too large for one process over R ranks: "
        "torchrun --nproc-per-node R -m rq_ep quantize ...",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="where the experts go, a file for each layer; layers that are there already are kept",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--formats", metavar="NAMES", help="write every expert in each of these, by commas")
    what.add_argument(
        "--placement", metavar="FILE", help="write only the experts that a placement stores in low bits, in its formats"
    )
    parser.add_argument(
        "--rounding", default="calibrated", metavar="NAME",
        help="calibrated (int4 by GPTQ, with regard to the inputs that each expert meets; needs --text) or nearest",
    )  # fmt: skip
    parser.add_argument(
        "--text", nargs="+", type=Path, metavar="PATH",
        help="what the experts are to meet: files and directories of UTF-8 text, .jsonl with a text to a line",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=32_768, metavar="N", help="tokens to run, over all domains")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="tokens in a sequence")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences in a batch")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the places text is taken from")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import launched_ranks, parse_dtype, parse_names, quiet_libraries
    from rq_ep.commands.progress_bar import showing
    from rq_ep.core.placement import Placement
    from rq_ep.model.calibration.quantize import quantize
    from rq_ep.model.load.ranks import together

    quiet_libraries()
    with launched_ranks("quantize", args.device) as group, showing(group.rank == 0) as show:
        placement = together(group, lambda: None if args.placement is None else Placement.load(args.placement))
        packed = quantize(
            args.model,
            args.out,
            formats=None if args.formats is None else parse_names(args.formats),
            placement=placement,
            rounding=args.rounding,
            texts=args.text,
            max_tokens=args.max_tokens,
            sequence_length=args.sequence_length,
            batch_size=args.batch_size,
            dtype=None if args.dtype is None else parse_dtype(args.dtype),
            device=args.device,
            group=group,
            seed=args.seed,
            progress=show,
        )
    if group.rank:
        return
    files = sorted(packed.path.glob("layer-*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{packed.path}: {len(files)} layers, {size:,} bytes")
    print(f"use them: --experts {packed.path} of calibrate, eval and -m rq_ep.serve, packed_experts of rq_ep.load")
