"""A program for launcher tests: it returns what rank it is, or rank 1 dies the way a crashed process does."""

import os
import time


def main(argv: list[str]) -> dict[str, str]:
    if argv == ["fail"] and os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(1)
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
