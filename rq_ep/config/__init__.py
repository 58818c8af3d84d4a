"""Settings as frozen dataclasses: the command line over a YAML file over defaults. The only reader of `os.environ`.

A settings class declares its fields with `rq_ep.core.options.option`; their names are the YAML keys and, with dashes,
the flags.
"""

from rq_ep.config.environment import Environment, child_environment
from rq_ep.config.flags import FlagParser, add_flags, read_settings
from rq_ep.config.interfaces import bind_for_ranks, keep_gloo_on_loopback
from rq_ep.config.model_options import DEVICES, DTYPES, MODEL_HELP, CheckpointOptions
from rq_ep.config.serve_config import CACHES, REASONING_PARSERS, TOOL_CALL_PARSERS, ServeConfig
from rq_ep.config.strategy_config import StrategyConfig
from rq_ep.config.yaml_settings import as_mapping, from_mapping, read_settings_file, resolved, shown

__all__ = [
    "CACHES",
    "CheckpointOptions",
    "DEVICES",
    "DTYPES",
    "Environment",
    "FlagParser",
    "MODEL_HELP",
    "REASONING_PARSERS",
    "ServeConfig",
    "StrategyConfig",
    "TOOL_CALL_PARSERS",
    "add_flags",
    "as_mapping",
    "bind_for_ranks",
    "child_environment",
    "from_mapping",
    "keep_gloo_on_loopback",
    "read_settings",
    "read_settings_file",
    "resolved",
    "shown",
]
