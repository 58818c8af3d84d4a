"""What the environment says of this process among the ranks, and what it says to a child. See `interfaces`, too."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rq_ep.core.errors import UserError


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


def child_environment() -> dict[str, str]:
    """The environment for a child that runs this package, from wherever it was imported here."""
    home = str(Path(__file__).resolve().parents[2])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _environment_int(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} in the environment is not a number") from None
