"""Settings of the server."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path

from rq_ep.config.model_options import DEVICES, DTYPES, MODEL_HELP, CheckpointOptions
from rq_ep.config.strategy_config import StrategyConfig
from rq_ep.core.errors import UserError
from rq_ep.core.options import MAX_SECONDS, option, options_of
from rq_ep.core.rebalance_options import REBALANCING, RebalanceOptions

TOOL_CALL_PARSERS = (
    "hermes",
    "qwen3_coder",
    "llama3_json",
    "mistral",
    "deepseek_v3",
    "deepseek_v31",
    "glm45",
    "gpt_oss",
)
REASONING_PARSERS = ("qwen3", "deepseek_r1", "gpt_oss")
CACHES = ("paged", "padded")
ON_RANK_FAILURE = ("continue", "stop")
LOG_LEVELS = ("debug", "info", "warning", "error")
WAIT_FOR_RANKS_S = 30.0
# Settings of rebalancing that also say what the ranks may do that are left when one has failed
OF_SURVIVORS = ("formats", "stats", "max_low_precision_share")

HTTP = "HTTP: where it listens, who may ask, for how much"
STEPS = "requests and steps: room, caches, what an answer is"
FAILURES = "ranks that fail, stall or come late; how the server ends"
RECORDS = "what it logs and records"


@dataclass(frozen=True)
class ServeConfig(CheckpointOptions, RebalanceOptions):
    """Settings of `python -m rq_ep.serve`. Limits are per rank, as each rank batches its own requests."""

    model: str = option("", help=MODEL_HELP, required=True)
    placement: str | None = option(None, help="placement.json of `rq-ep place`; without it the strategy places itself")
    experts: str | None = option(
        None,
        help="directory written by `rq-ep quantize`: the placement's low-bit experts are read from there, and with "
        "--rebalance auto every expert that comes to be stored in few bits",
    )
    strategy: StrategyConfig | None = option(
        None,
        help="standard, eplb, llep, rq, rq_paper, rq_llep or package.module:Class; with settings {name: llep, "
        "max_borrowed: 2}; default: the placement's, or standard",
        parse=StrategyConfig.parse,
    )
    machine: str | None = option(
        None, help="what strategies weigh transfers with: a known machine, FILE.yaml or the .json of `rq-ep profile`"
    )
    dtype: str = option("auto", help="dtype to compute in; auto: the checkpoint's", choices=("auto", *DTYPES))
    generation_config: str = option(
        "auto",
        help="whose generation_config.json gives requests their temperature, top_p, top_k, min_p and "
        "repetition_penalty: auto, the model's; vllm: nobody's; or a directory that has one",
        group=STEPS,
    )
    device: str = option("auto", help="auto: cuda where every rank has a GPU of its own", choices=DEVICES)
    attn_implementation: str | None = option(None, help="attention of transformers; default: sdpa, or eager without it")
    seed: int = option(
        0,
        help="seed of requests that bring none; in bf16 the other requests of a step may change an answer",
        minimum=0,
        group=STEPS,
    )

    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 for every interface", group=HTTP)
    port: int = option(8000, help="port to listen on; 0 picks a free one", minimum=0, maximum=65535, group=HTTP)
    api_key: tuple[str, ...] | None = option(
        None,
        help="keys, of which requests must bring one; default: RQ_EP_API_KEY or, without it, none is needed",
        secret=True,
        several=True,
        group=HTTP,
    )
    api_key_file: str | None = option(
        None,
        help="file of such keys, one a line; unlike a flag's, no list of processes shows them",
        group=HTTP,
    )
    allowed_origins: tuple[str, ...] | None = option(
        None,
        help="origins of web pages that may send requests, such as https://example.org, or * for all; default: none",
        several=True,
        metavar="ORIGIN",
        group=HTTP,
    )
    served_model_name: str | None = option(
        None, help="name of the model in requests; default: as given by --model", group=HTTP
    )
    max_num_seqs: int = option(64, help="requests that run at once on a rank", minimum=1, group=STEPS)
    max_num_batched_tokens: int = option(1024, help="tokens of one step on a rank", minimum=1, group=STEPS)
    max_dispatch_bytes: int | None = option(
        None,
        help="rows of other ranks that a rank holds at once, more come in parts; default: 1.1 x a balanced step's",
        minimum=1,
        group=STEPS,
    )
    max_model_len: int | None = option(
        None, help="tokens of prompt and answer; default: the model's", minimum=2, group=STEPS
    )
    kv_cache_tokens: int | None = option(
        None,
        help="room of a rank's KV cache; default: what a GPU has left, on CPU 16384",
        minimum=1,
        group=STEPS,
    )
    cache: str | None = option(
        None,
        help="paged: the KV cache of full and sliding attention; padded: the model's own cache, rows padded to equal "
        "length, for every family; default: paged where the model's layers allow it",
        choices=CACHES,
        group=STEPS,
    )
    allow_remote_images: bool = option(
        False,
        help="fetch images of chat messages from http:// and https:// URLs, within --max-body-bytes and "
        "--http-timeout; default: only data: URLs are read",
        group=HTTP,
    )
    allowed_image_networks: tuple[str, ...] | None = option(
        None,
        help="networks such as 10.1.0.0/16 from which images may be fetched though they are not public; default: none",
        several=True,
        metavar="NETWORK",
        group=HTTP,
    )
    prefix_caching: str = option(
        "auto",
        help="auto: a prompt that begins as an earlier one on its rank takes the keys and values of whole pages from "
        "the paged cache; off: every prompt is computed",
        choices=("auto", "off"),
        group=STEPS,
    )
    tool_call_parser: str = option(
        "auto",
        help="format in which the model writes calls of tools; auto: the one whose marks its chat template has; none: "
        "tools can be called where tool_choice demands it, which needs no parser",
        choices=("auto", "none", *TOOL_CALL_PARSERS),
        group=STEPS,
    )
    reasoning_parser: str = option(
        "auto",
        help="marks of the model's reasoning, which becomes reasoning_content; auto: qwen3, that is <think> and "
        "</think>, or gpt_oss, that is Harmony, where its chat template has them; none: reasoning is content",
        choices=("auto", "none", *REASONING_PARSERS),
        group=STEPS,
    )
    max_queue_size: int = option(
        1024, help="requests in the server at once; one more is answered 429", minimum=1, group=HTTP
    )
    max_body_bytes: int = option(4 << 20, help="longest request body", minimum=1, group=HTTP)
    http_timeout: float = option(
        30.0,
        help="seconds a client may take to send a request, or to read on in its answer",
        minimum=1,
        maximum=MAX_SECONDS,
        group=HTTP,
    )
    shutdown_timeout: float = option(
        30.0,
        help="seconds running requests get to finish after SIGTERM",
        minimum=0,
        maximum=MAX_SECONDS,
        group=FAILURES,
    )
    rank_timeout: float = option(
        300.0, help="seconds a collective may take", minimum=1, maximum=MAX_SECONDS, group=FAILURES
    )
    stall_timeout: float = option(
        60.0,
        help="seconds a rank may be silent, or all ranks in one place",
        minimum=2,
        maximum=MAX_SECONDS,
        group=FAILURES,
    )
    on_rank_failure: str | None = option(
        None,
        help="continue: the group goes on without a rank that fails, and the rank is started again and joins it; stop: "
        "the group ends; default: continue, with one rank stop",
        choices=ON_RANK_FAILURE,
        group=FAILURES,
    )
    min_ranks: int | None = option(
        None,
        help="begin with so many ranks, rank 0 among them, once no more come; the others join when they come; default: "
        "all ranks",
        minimum=1,
        group=FAILURES,
    )
    wait_for_ranks: float | None = option(
        None,
        help="seconds to wait for the other ranks once --min-ranks have come; default: 30",
        minimum=0,
        maximum=MAX_SECONDS,
        group=FAILURES,
    )
    max_rank_restarts: int = option(
        3,
        help="how often a rank is started again in a row; one that has served for 10 minutes has all of them again",
        minimum=0,
        group=FAILURES,
    )
    record_dir: str | None = option(
        None, help="directory for traces of /v1/ep/record; default: none are recorded", group=RECORDS
    )
    record_max_tokens: int = option(
        131072,
        help="tokens of a trace, 8 bytes a MoE layer and expert chosen: the first ones are kept",
        minimum=1,
        group=RECORDS,
    )
    log_level: str = option("info", help="how much to log", choices=LOG_LEVELS, group=RECORDS)

    formats: tuple[str, ...] | None = option(
        None,
        help="weight formats that rebalancing, and ranks that go on without another one, may use, by commas, "
        "calibrated or not; default: those of the placement",
        group=REBALANCING,
    )
    stats: str | None = option(
        None,
        help="statistics of `rq-ep calibrate` for rebalancing: how much a format harms an expert, without their load; "
        "default: experts matter by what they contribute in a sample of the steps",
        metavar="FILE",
        group=REBALANCING,
    )
    max_low_precision_share: float | None = option(
        None,
        help="cap of both on the share of routed pairs computed below the native format; default: the "
        "placement's, or 0.25",
        minimum=0,
        maximum=1,
        group=REBALANCING,
    )
    placement_out: str | None = option(
        None,
        help="file for the placement that serves, written after every change; a group that is started again by its "
        "launcher begins with it",
        metavar="FILE",
        group=REBALANCING,
    )

    def with_api_keys(self, environ: Mapping[str, str] | None = None) -> "ServeConfig":
        """These settings with all keys in `api_key`: the given ones and the file's, or else that of RQ_EP_API_KEY.

        Raises:
            UserError: the file is not readable or has no keys.
        """
        given = os.environ if environ is None else environ
        keys = [*(self.api_key or ()), *(_read_keys(self.api_key_file) if self.api_key_file else ())]
        keys = keys or [key for key in (given.get("RQ_EP_API_KEY"),) if key]
        return replace(self, api_key=tuple(keys) or None)

    def restarted(self, restart_count: int) -> "ServeConfig":
        """These settings for a group that its launcher starts again: with the placement that served last, if saved."""
        if not restart_count or self.placement_out is None or not Path(self.placement_out).exists():
            return self
        return replace(self, placement=self.placement_out)

    def for_ranks(self, num_ranks: int) -> "ServeConfig":
        """These settings with what they leave to the number of ranks.

        Raises:
            UserError: they contradict each other, or the number of ranks.
        """
        if num_ranks == 1 and self.on_rank_failure == "continue":
            raise UserError("--on-rank-failure continue: needs more than one rank, and one was started: use stop")
        on_failure = self.on_rank_failure or ("continue" if num_ranks > 1 else "stop")
        attention = self.attn_implementation or "sdpa"
        if attention not in ("sdpa", "eager") and "flash" not in attention:
            raise UserError(
                f"--attn-implementation {attention}: continuous batching runs on sdpa, eager or a flash variant"
            )
        self._check_rebalancing(num_ranks, on_failure)
        self._check_image_networks()
        self._check_origins()
        min_ranks, wait_s = self._first_ranks(num_ranks, on_failure)
        return replace(self, on_rank_failure=on_failure, min_ranks=min_ranks, wait_for_ranks=wait_s)

    def _check_rebalancing(self, num_ranks: int, on_failure: str) -> None:
        """Refuse rebalancing on one rank and, without it, settings that would have no effect."""
        if self.rebalance == "auto":
            if num_ranks == 1:
                raise UserError("--rebalance auto: one rank has nothing to balance; start two or more, or leave it off")
            return
        for item in options_of(ServeConfig).values():
            value = getattr(self, item.name)
            if item.name in OF_SURVIVORS and on_failure == "continue":
                continue
            if item.group == REBALANCING and item.name != "rebalance" and value != item.default:
                shown = ",".join(value) if isinstance(value, tuple) else value
                raise UserError(f"{item.flag} {shown}: needs --rebalance auto")
        if self.experts is not None and self.placement is None:
            raise UserError(f"--experts {self.experts}: without --placement no expert is stored in low bits")

    def _check_image_networks(self) -> None:
        for network in self.allowed_image_networks or ():
            if not self.allow_remote_images:
                raise UserError(
                    f"--allowed-image-networks {network}: without --allow-remote-images no image is fetched"
                )
            try:
                ip_network(network)
            except ValueError as error:
                raise UserError(f"--allowed-image-networks: {error}") from None

    def _check_origins(self) -> None:
        """Refuse what no browser names as the origin of a page, with a path or in capitals."""
        for origin in self.allowed_origins or ():
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+", origin):
                raise UserError(f"--allowed-origins {origin}: not an origin; write one as https://example.org, or *")

    def _first_ranks(self, num_ranks: int, on_failure: str) -> tuple[int | None, float | None]:
        """How many ranks the group may begin with, and how long it waits for the others; None: it waits for all."""
        least, wait_s = self.min_ranks, self.wait_for_ranks
        if least is None:
            if wait_s is not None:
                raise UserError(f"--wait-for-ranks {wait_s:g}: needs --min-ranks: all ranks are waited for")
            return None, None
        if least > num_ranks:
            raise UserError(f"--min-ranks {least}: the launcher has {num_ranks} ranks: ask for as many or fewer")
        if least == num_ranks:
            return None, None
        if on_failure == "stop":
            raise UserError(f"--min-ranks {least}: needs --on-rank-failure continue: ranks that come later join")
        return least, WAIT_FOR_RANKS_S if wait_s is None else wait_s

    @property
    def model_name(self) -> str:
        """The model name in requests and answers."""
        return self.served_model_name or self.model


def _read_keys(path: str) -> list[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path}: not readable ({error})") from None
    if not (keys := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--api-key-file {path}: has no key: write one on a line")
    return keys
