"""Ending a process without tearing the interpreter down."""

import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End now: taking apart torch, transformers and all they import takes seconds and leaves nothing behind."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
