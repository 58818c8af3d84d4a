"""Settings as frozen dataclasses: the command line over a YAML file over defaults. The only reader of `os.environ`.

A settings class declares its fields with `option`; their names are the YAML keys and, with dashes, the flags.
"""

import argparse
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.files import yaml_files
from rq_ep.core.options import MAX_SECONDS, Option, option, options_of
from rq_ep.core.rebalance_options import REBALANCING, RebalanceOptions

Settings = TypeVar("Settings")

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
MODEL_HELP = (
    "directory of a Hugging Face checkpoint, or ORG/NAME of the hub, which is downloaded into its cache (HF_HOME, "
    "HF_TOKEN, HF_HUB_OFFLINE)"
)
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


@dataclass(frozen=True)
class Environment:
    """Rank and rendezvous of this process, from the environment variables that torchrun and launchers like it set."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    restart_count: int = 0
    has_launcher: bool = False
    is_one_node: bool = True  # false where the launcher does not say so

    @classmethod
    def from_os(cls, environ: Mapping[str, str] | None = None) -> "Environment":
        """Read the launcher's variables; a process started by hand is the only rank.

        Raises:
            UserError: a variable is not a number, or one is set without the others it needs.
        """
        given = os.environ if environ is None else environ
        if "WORLD_SIZE" not in given and "RANK" not in given:
            return cls()
        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in given]:
            raise UserError(f"the environment sets some of torchrun's variables, but not {', '.join(missing)}")
        world_size = _environment_int(given, "WORLD_SIZE", 1)
        rank = _environment_int(given, "RANK", 0)
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} does not lie in 0..{world_size - 1}, as WORLD_SIZE={world_size} wants it")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_environment_int(given, "LOCAL_RANK", rank),
            local_world_size=_environment_int(given, "LOCAL_WORLD_SIZE", world_size),
            master_addr=given["MASTER_ADDR"].strip("[]"),  # around an IPv6 address
            master_port=_environment_int(given, "MASTER_PORT", 0),
            restart_count=_environment_int(given, "TORCHELASTIC_RESTART_COUNT", 0),
            has_launcher=True,
            is_one_node=world_size in (1, _environment_int(given, "LOCAL_WORLD_SIZE", 0)),
        )


def keep_gloo_on_loopback() -> None:
    """Have gloo listen on the loopback interface alone, unless the environment names another one."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def bind_for_ranks(environment: Environment) -> socket.socket:
    """Bind a free port of this machine for the ranks, which as few others as possible can reach.

    On one node it is at the loopback interface; on several, at the interface of this machine that leads to MASTER_ADDR.

    Raises:
        UserError: there is none.
    """
    name = "127.0.0.1" if environment.is_one_node else environment.master_addr
    try:
        found = [(family, where[:2]) for family, *_, where in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)]
        family, (host, _) = min(found, key=lambda pair: pair[0] != socket.AF_INET)  # IPv4 where there are both
        return socket.create_server((_own_address(family, str(host)), 0), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={name}: no interface of this machine leads there ({error.strerror or error}): set it to an "
            "address of the machine of rank 0"
        ) from None


def _own_address(family: int, host: str) -> str:
    """The address of this machine in packets to a host: the host itself, where it is this machine."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address: str = probe.getsockname()[0]
    return address


def child_environment() -> dict[str, str]:
    """The environment for a child that runs this package, from wherever it was imported here."""
    home = str(Path(__file__).resolve().parent.parent)
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _environment_int(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment is not a number") from None


@dataclass(frozen=True)
class StrategyConfig:
    """A strategy by name, and its settings: `rq`, or `{name: llep, min_tokens_per_gemm: 16}`."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> "StrategyConfig":
        """Read a plain name or a mapping; text that looks like a mapping is read as YAML."""
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = yaml_files.parse_yaml(value, "--strategy")
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], {str(key): setting for key, setting in value.items() if key != "name"})
        raise UserError(f"--strategy {value!r:.60}: expected a name or a mapping with a `name`")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How a model's files are had and read, wherever a model is named."""

    revision: str | None = option(
        None,
        help="branch, tag or commit of a model of the hub; default: main",
        metavar="REV",
    )
    strict_weights: bool = option(
        False,
        help="refuse a model with tensors that it does not know, such as those of multi-token prediction, instead of "
        "leaving them unread with a warning",
    )


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
        help="name of a strategy, or {name: ..., setting: ...}; default: the placement's, or standard",
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
    )
    device: str = option("auto", help="auto: cuda where every rank has a GPU of its own", choices=DEVICES)
    attn_implementation: str | None = option(None, help="attention of transformers; default: sdpa, or eager without it")
    seed: int = option(
        0, help="seed of requests that bring none; in bf16 the other requests of a step may change an answer", minimum=0
    )

    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, help="port to listen on; 0 picks a free one", minimum=0, maximum=65535)
    api_key: tuple[str, ...] | None = option(
        None,
        help="keys, of which requests must bring one; default: RQ_EP_API_KEY or, without it, none is needed",
        secret=True,
        several=True,
    )
    api_key_file: str | None = option(
        None, help="file of such keys, one a line; unlike a flag's, no list of processes shows them"
    )
    allowed_origins: tuple[str, ...] | None = option(
        None,
        help="origins of web pages that may send requests, such as https://example.org, or * for all; default: none",
        several=True,
        metavar="ORIGIN",
    )
    served_model_name: str | None = option(None, help="name of the model in requests; default: as given by --model")
    max_num_seqs: int = option(64, help="requests that run at once on a rank", minimum=1)
    max_num_batched_tokens: int = option(1024, help="tokens of one step on a rank", minimum=1)
    max_dispatch_bytes: int | None = option(
        None,
        help="rows of other ranks that a rank holds at once, more come in parts; default: 1.1 x a balanced step's",
        minimum=1,
    )
    max_model_len: int | None = option(None, help="tokens of prompt and answer; default: the model's", minimum=2)
    kv_cache_tokens: int | None = option(
        None, help="room of a rank's KV cache; default: what a GPU has left, on CPU 16384", minimum=1
    )
    cache: str | None = option(
        None,
        help="paged: the KV cache of full and sliding attention; padded: the model's own cache, rows padded to equal "
        "length, for every family; default: paged where the model's layers allow it",
        choices=CACHES,
    )
    allow_remote_images: bool = option(
        False,
        help="fetch images of chat messages from http:// and https:// URLs, within --max-body-bytes and "
        "--http-timeout; default: only data: URLs are read",
    )
    allowed_image_networks: tuple[str, ...] | None = option(
        None,
        help="networks such as 10.1.0.0/16 from which images may be fetched though they are not public; default: none",
        several=True,
        metavar="NETWORK",
    )
    prefix_caching: str = option(
        "auto",
        help="auto: a prompt that begins as an earlier one on its rank takes the keys and values of whole pages from "
        "the paged cache; off: every prompt is computed",
        choices=("auto", "off"),
    )
    tool_call_parser: str = option(
        "auto",
        help="format in which the model writes calls of tools; auto: the one whose marks its chat template has; none: "
        "tools can be called where tool_choice demands it, which needs no parser",
        choices=("auto", "none", *TOOL_CALL_PARSERS),
    )
    reasoning_parser: str = option(
        "auto",
        help="marks of the model's reasoning, which becomes reasoning_content; auto: qwen3, that is <think> and "
        "</think>, or gpt_oss, that is Harmony, where its chat template has them; none: reasoning is content",
        choices=("auto", "none", *REASONING_PARSERS),
    )
    max_queue_size: int = option(1024, help="requests in the server at once; one more is answered 429", minimum=1)
    max_body_bytes: int = option(4 << 20, help="longest request body", minimum=1)
    http_timeout: float = option(
        30.0,
        help="seconds a client may take to send a request, or to read on in its answer",
        minimum=1,
        maximum=MAX_SECONDS,
    )
    shutdown_timeout: float = option(
        30.0, help="seconds running requests get to finish after SIGTERM", minimum=0, maximum=MAX_SECONDS
    )
    rank_timeout: float = option(300.0, help="seconds a collective may take", minimum=1, maximum=MAX_SECONDS)
    stall_timeout: float = option(
        60.0, help="seconds a rank may be silent, or all ranks in one place", minimum=2, maximum=MAX_SECONDS
    )
    on_rank_failure: str | None = option(
        None,
        help="continue: the group goes on without a rank that fails, and the rank is started again and joins it; stop: "
        "the group ends; default: continue, with one rank stop",
        choices=ON_RANK_FAILURE,
    )
    max_rank_restarts: int = option(
        3,
        help="how often a rank is started again in a row; one that has served for 10 minutes has all of them again",
        minimum=0,
    )
    record_dir: str | None = option(None, help="directory for traces of /v1/ep/record; default: none are recorded")
    record_max_tokens: int = option(
        131072, help="tokens of a trace, 8 bytes a MoE layer and expert chosen: the first ones are kept", minimum=1
    )
    log_level: str = option("info", help="how much to log", choices=LOG_LEVELS)

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
            UserError: one rank cannot go on without itself.
        """
        if num_ranks == 1 and self.on_rank_failure == "continue":
            raise UserError("--on-rank-failure continue: needs more than one rank, and one was started: use stop")
        default = "continue" if num_ranks > 1 else "stop"
        return replace(self, on_rank_failure=self.on_rank_failure or default)

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


def add_flags(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add `--config` and a flag for each option of a settings class; dashes and underscores are both accepted."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags given here win")
    groups: dict[str, Any] = {"": parser}
    # What is needed comes first, then what the class declares itself, then what its bases declare.
    for item in sorted(options_of(settings).values(), key=lambda item: (not item.required, item.depth)):
        if item.group not in groups:
            groups[item.group] = parser.add_argument_group(item.group)
        details: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "metavar": item.metavar}
        if item.kind is bool:
            details |= {"action": argparse.BooleanOptionalAction}
            del details["metavar"]
        elif item.several:
            details |= {"nargs": "+", "action": "extend"}
        groups[item.group].add_argument(item.flag, help=_help(item), **details)
        if item.flag != f"--{item.key}":
            parser.add_argument(f"--{item.key}", help=argparse.SUPPRESS, **details)


def _help(item: Option) -> str:
    text = item.help.replace("%", "%%")
    choices = item.choices or ()
    if not all(choice in text for choice in choices):
        text += f" ({', '.join(choices)})"
    if item.required:
        return f"{text} (required, here or in --config)"
    says_enough = isinstance(item.default, bool) or item.default in (None, "", ()) or "default" in text
    default = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    return text if says_enough else f"{text} (default: {default})"


def read_settings(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """Build a settings object from parsed flags, over the file they name, over the defaults.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, a missing or malformed file.
    """
    options = options_of(settings)
    values = {} if args.config is None else _read_mapping(settings, read_yaml(args.config), args.config)
    given = {name: value for name, value in vars(args).items() if name in options}
    values |= {name: options[name].check(_from_text(options[name], value)) for name, value in given.items()}
    for name, item in options.items():
        if item.required and not values.get(name):
            raise UserError(f"{item.flag} is needed: {item.help}")
    return settings(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; everything wrong with it is one line."""
    document = yaml_files.read_yaml(path, "settings", "--config names a YAML file")
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected `key: value` lines, not {type(document).__name__}")
    return document


def as_mapping(settings: Any) -> dict[str, Any]:
    """The settings as a YAML file would give them."""
    items = sorted(options_of(type(settings)).items(), key=lambda pair: pair[1].depth)  # the class's own come first
    values = {item.key: getattr(settings, name) for name, item in items}
    document = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if isinstance(strategy := document.get("strategy"), StrategyConfig):
        document["strategy"] = {"name": strategy.name, **strategy.settings}
    return document


def from_mapping(settings: type[Settings], document: Mapping[str, Any]) -> Settings:
    """The settings that `as_mapping` wrote down."""
    return settings(**_read_mapping(settings, document, settings.__name__))


def shown(settings: Any) -> dict[str, Any]:
    """The settings without their secrets."""
    secrets = {item.key for item in options_of(type(settings)).values() if item.secret}
    return {name: "***" if name in secrets and value else value for name, value in as_mapping(settings).items()}


def resolved(settings: Any) -> str:
    """The settings as YAML that gives them again, except for secrets."""
    return yaml.safe_dump(shown(settings), sort_keys=False).rstrip()


def _read_mapping(settings: type[Any], document: Mapping[str, Any], where: str) -> dict[str, Any]:
    items = {item.key: item for item in options_of(settings).values()}
    values = {}
    for key, value in document.items():
        item = items[check_choice(f"setting in {where}", str(key).replace("-", "_"), items)]
        try:
            values[item.name] = item.check(_from_yaml(item, value))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return values


def _from_yaml(item: Option, value: Any) -> Any:
    """The value of an option from a file; the option's check reports what is wrong with it."""
    if value is None:
        return None
    if item.parse is not None:
        return item.parse(value)
    if item.is_sequence and isinstance(value, str):
        return _from_text(item, [value] if item.several else value)
    if item.is_sequence and isinstance(value, list):
        return tuple(_as_path(item, one) for one in value)
    return _as_path(item, value)


def _from_text(item: Option, value: Any) -> Any:
    """The value of an option from the text of its flag, or from the words of one that takes several."""
    if item.parse is not None:
        return item.parse(value)
    if not item.is_sequence:
        return _as_path(item, _number(item.kind, value))
    words = value if item.several else [word.strip() for word in value.split(",") if word.strip()]
    if not words:
        raise UserError(f"{item.flag}: name at least one")
    return tuple(_as_path(item, _number(item.kind, word)) for word in words)


def _as_path(item: Option, value: Any) -> Any:
    return Path(value) if item.kind is Path and isinstance(value, str) else value


def _number(kind: Any, text: Any) -> Any:
    """The number in a text or, if it is none, the text."""
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        return text
