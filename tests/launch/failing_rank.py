"""A program for launcher tests: rank 0 goes on a little, rank 1 dies the way a crashed process does."""

import os
import time


def main(argv: list[str]) -> int:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(1)
    return 0
