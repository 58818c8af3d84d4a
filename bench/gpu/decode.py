"""Tokens per second of one rank, by the format of its experts, against transformers' own on the same device.

    python -m bench decode --device cuda --shape qwen3-moe --layers 12 --formats bf16 int8 int4_g128
    python -m bench decode --shape tiny --layers 2 --prompts 1 4 --input-len 32 --output-len 8

The model has the layers of a known shape and random weights, and is made on the spot. `prefill` is the rate of
`generate` with one new token, `decode` that of the tokens after it, with so many prompts of one length at once;
`batching` that of continuous batching: requests of uneven lengths, half of them under way at once. A format is the
one of all experts. Ratios are to transformers' own, of the best run of each: one variant is in memory at a time.
"""

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from bench.layer.published import SHAPES, shape_name
from bench.options import bench_parser, check_device, check_positive
from bench.result import result_document
from bench.serving.transformers_serving import answer
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import check_choice, check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.requests import Output, Request
from rq_ep.engine.servable import set_attention
from rq_ep.formats import FORMATS, get_format
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.model.seam.expert_modules import find_expert_modules
from rq_ep.moe import EPExperts
from rq_ep.parallel import TorchGroup

VOCABULARY = 4096
HEAD_SIZE = 128
PEER = "transformers"
FIGURES = ("prefill", "decode", "batching")
PAGE = 32  # tokens of a block of transformers' cache
TIMEOUT_S = 600


def parser() -> argparse.ArgumentParser:
    made = bench_parser("decode", __doc__)
    made.add_argument("--shape", default="qwen3-moe", metavar="NAME", help="of shapes.yaml")
    made.add_argument("--layers", type=int, default=12, metavar="N", help="of the model")
    made.add_argument("--model", metavar="DIR", help="where the model is kept (default: nowhere)")
    made.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4_g128"], metavar="NAME",
                      help="of the experts")  # fmt: skip
    made.add_argument("--prompts", nargs="+", type=int, default=[1, 8, 64], metavar="N", help="at once")
    made.add_argument("--input-len", type=int, default=256, metavar="N", help="tokens of a prompt")
    made.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens of an answer")
    made.add_argument("--runs", type=int, default=2, metavar="N", help="after one of warm-up; the best counts")
    made.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts")
    made.add_argument("--json", metavar="FILE", help="write the figures there, variant by variant")
    return made


def main(argv: Sequence[str]) -> None:
    """Measure all variants; print the table.

    Raises:
        UserError: an option makes no sense.
    """
    options = parser().parse_args(argv)
    _check(options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rq_ep-") as directory:
        path = Path(options.model or directory)
        if not (path / "config.json").exists():
            make_checkpoint(path, options)
        for variant in (PEER, *options.formats):
            rows.extend(_rows_of(variant, path, options))
            document = result_document("decode", argv, options, options.device, rows=_with_ratios(rows))
            if options.json:
                write_json(options.json, document)
    show(document)


def _check(options: argparse.Namespace) -> None:
    options.shape = shape_name(options.shape)
    options.formats = [check_choice("format", name, FORMATS) for name in options.formats]
    check_device(options.device)
    check_positive(options, "layers", "input_len", "runs", "prompts")
    check_integer("--output-len", options.output_len, 2)
    if options.json:
        check_writable(options.json)


def make_checkpoint(path: Path, options: argparse.Namespace) -> None:
    """Write a model in bf16 whose layers have the options' shape, with random weights drawn on the device."""
    shape = SHAPES[options.shape]
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, shape.hidden_size // HEAD_SIZE),
        num_key_value_heads=max(1, shape.hidden_size // HEAD_SIZE // 4),
        head_dim=HEAD_SIZE,
        max_position_embeddings=2 * (options.input_len + options.output_len) + PAGE,
        eos_token_id=None,
    )
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    del model
    _free(options.device)


def _rows_of(variant: str, path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of one variant, for every number of prompts."""
    start_s = time.perf_counter()
    group = None
    if variant == PEER:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).to(options.device)
    else:
        group = TorchGroup.from_environment(options.device, timeout_s=TIMEOUT_S)
        model = load(path, _in_format(path, variant), group=group)
    common = {"variant": variant, "load_s": time.perf_counter() - start_s}
    rates: dict[int, dict[str, float]] = {number: _generate_rates(model, number, options) for number in options.prompts}
    run = _engine_rate if group is not None else _manager_rate
    for number in options.prompts:
        requests = _requests(number, options)
        rates[number]["batching"] = _best(partial(run, model, requests, number, group), options.runs)
    yield from ({**common, "prompts": number, **figures} for number, figures in rates.items())
    if group is not None:
        group.close()
    del model
    _free(options.device)


def _in_format(path: Path, name: str) -> Placement:
    """All experts on one rank, in one format."""
    with torch.device("meta"):
        modules = find_expert_modules(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)))
    layers = tuple(
        LayerPlacement.even(
            module.layer_index, module.num_experts, [Replica(0, expert, name) for expert in range(module.num_experts)]
        )
        for module in modules
    )
    bytes_ = get_format(name).nbytes(modules[0].family.layout)
    return Placement(layers, "standard", Topology(1), (sum(layer.num_experts for layer in layers) * bytes_,))


@torch.no_grad()
def _generate_rates(model: PreTrainedModel, number: int, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of `generate`: of the prompts, and of what follows the first new token."""
    random = torch.Generator().manual_seed(options.seed)
    prompts = torch.randint(1, VOCABULARY, (number, options.input_len), generator=random).to(options.device)

    generating: Any = model  # whose methods of generation have no types

    def seconds(num_new: int) -> float:
        config = GenerationConfig(
            max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        start_s = _now(options.device)
        generating.generate(prompts, generation_config=config)
        return _now(options.device) - start_s

    seconds(2)
    first_s = min(seconds(1) for _ in range(options.runs))
    all_s = min(seconds(options.output_len) for _ in range(options.runs))
    return {
        "prefill": prompts.numel() / first_s,
        "decode": number * (options.output_len - 1) / max(all_s - first_s, 1e-9),
    }


def _requests(number: int, options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Prompts and lengths of answers, uneven around the options' lengths; twice as many as are under way at once."""
    random = torch.Generator().manual_seed(options.seed + 1)

    def uneven(mean: int) -> int:
        return max(1, mean // 2 + int(torch.randint(mean + 1, (), generator=random)))

    return [
        (torch.randint(1, VOCABULARY, (uneven(options.input_len),), generator=random).tolist(), length)
        for length in (uneven(options.output_len) for _ in range(2 * number))
    ]


def _manager_rate(
    model: PreTrainedModel, requests: Sequence[tuple[list[int], int]], number: int, group: TorchGroup | None
) -> float:
    """New tokens per second of transformers' continuous batching."""
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=_cache_tokens(requests, number) // PAGE,
        max_batch_tokens=1024,
        max_requests_per_batch=number,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        allow_block_sharing=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
    generating: Any = model
    manager = generating.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    manager.start()
    seconds, num_tokens, _ = answer(manager, number, requests)
    manager.stop(block=True)
    return num_tokens / seconds


def _engine_rate(
    model: PreTrainedModel, requests: Sequence[tuple[list[int], int]], number: int, group: TorchGroup | None
) -> float:
    """New tokens per second of our engine, with so many requests under way at once."""
    assert group is not None
    set_attention(model, "sdpa")
    waiting = iter(enumerate(requests))
    num_left, ended = len(requests), threading.Event()
    failures: list[BaseException] = []

    def submit_next() -> None:
        for name, (prompt_ids, num_new) in waiting:
            engine.submit(Request(str(name), prompt_ids, num_new, ignore_eos=True))
            return

    def take(outputs: list[Output]) -> None:
        nonlocal num_left
        for output in outputs:
            if output.finish_reason is not None:
                num_left -= 1
                submit_next()
        if not num_left:
            ended.set()

    def fail(error: BaseException) -> None:
        failures.append(error)
        ended.set()

    engine = Engine(
        model,
        [layer for layer in report_of(model).layers if isinstance(layer, EPExperts)],
        group,
        EngineConfig(max_num_seqs=number, kv_cache_tokens=_cache_tokens(requests, number)),
        on_outputs=take,
        on_failure=fail,
    )
    engine.start()
    start_s = time.perf_counter()
    for _ in range(number):
        submit_next()
    ended.wait(TIMEOUT_S)
    seconds = time.perf_counter() - start_s
    engine.stop()
    if failures or num_left:
        raise failures[0] if failures else TimeoutError(f"{num_left} requests are unanswered")
    return sum(num_new for _, num_new in requests) / seconds


def _cache_tokens(requests: Sequence[tuple[list[int], int]], number: int) -> int:
    """Room for so many of the longest requests, in whole pages."""
    longest = max(len(prompt_ids) + num_new for prompt_ids, num_new in requests)
    return (number + 1) * (longest // PAGE + 2) * PAGE


def _best(rate: Callable[[], float], runs: int) -> float:
    """The highest rate of so many runs, after one of warm-up."""
    rate()
    return max(rate() for _ in range(runs))


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every figure's ratio to transformers' own with as many prompts."""
    peers = {row["prompts"]: row for row in rows if row["variant"] == PEER}
    return [
        {**row, "ratios": {figure: row[figure] / peers[row["prompts"]][figure] for figure in FIGURES}} for row in rows
    ]


def show(document: dict[str, Any]) -> None:
    """Print the rates, and their ratios to transformers' own."""
    options = document["options"]
    title = f"{options['shape']}, {options['layers']} layers, one rank: tokens/s (x transformers)"
    table = Table("experts", "prompts", *FIGURES, "load s", title=title, box=None)
    for row in document["rows"]:
        rates = [f"{row[figure]:,.0f} ({row['ratios'][figure]:.2f})" for figure in FIGURES]
        table.add_row(row["variant"], str(row["prompts"]), *rates, f"{row['load_s']:.1f}")
    wide_console(120).print(table)
