"""A program for launcher tests: rank 0 waits for the others, rank 1 dies the way a crashed process does."""

import os
import time


def main(argv: list[str]) -> int:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(60)
    return 0
