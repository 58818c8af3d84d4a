"""`rq-ep quantize`: write experts in low-bit formats, once, for calibrate, eval, the server and `rq_ep.load`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rq_ep.config import MODEL_HELP, add_flags, read_settings
from rq_ep.core.options import option
from rq_ep.core.placement import Placement
from rq_ep.model.settings import QuantizeSettings


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(QuantizeSettings):
    """What `rq-ep quantize` takes beside the settings of quantization."""

    model: str = option(
        "",
        help=f"{MODEL_HELP}; to spread one that is too large for one process over R ranks: "
        "torchrun --nproc-per-node R -m rq_ep quantize ...",
        required=True,
        metavar="MODEL",
    )
    out: str = option(
        "",
        help="where the experts go, a file for each layer; layers that are there already are kept",
        required=True,
        metavar="DIR",
    )
    formats: Sequence[str] | None = option(None, help="write every expert in each of these, by commas")
    placement: str | None = option(
        None,
        help="write only the experts that a placement stores in low bits, in its formats; this or --formats is needed",
        metavar="FILE",
    )
    text: Sequence[Path] | None = option(
        None,
        help="what the experts are to meet: files and directories of UTF-8 text, .jsonl with a text to a line",
        several=True,
        metavar="PATH",
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, QuantizeOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import check_inputs, check_outputs, launched_ranks, quiet_libraries

    options = read_settings(QuantizeOptions, args)
    check_inputs(options.model, options.text or ())
    from rq_ep.commands.progress_bar import showing
    from rq_ep.model.calibration.quantize import quantize
    from rq_ep.parallel.agreement import run_on_all_ranks

    quiet_libraries()
    with launched_ranks("quantize", options.device) as group, showing(group.rank == 0) as show:
        path = options.placement
        outputs = {"--out": str(Path(options.out, "layer"))} if group.rank == 0 else {}
        run_on_all_ranks(group, lambda: check_outputs(outputs))
        packed = quantize(
            options.model,
            options.out,
            options,
            formats=options.formats,
            placement=run_on_all_ranks(group, lambda: None if path is None else Placement.load(path)),
            texts=options.text,
            group=group,
            progress=show,
        )
    if group.rank:
        return
    files = sorted(packed.path.glob("layer-*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{packed.path}: {len(files)} layers, {size:,} bytes")
    print(f"use them: --experts {packed.path} of calibrate, eval and -m rq_ep.serve, packed_experts of rq_ep.load")
