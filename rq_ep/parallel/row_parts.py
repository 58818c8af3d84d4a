"""The parts in which rows travel: all at once, or several runs of bounded size.

Axes: B blocks of pairs, one for each (source rank, local replica), J local replicas of a rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray
from rq_ep.parallel.permute import histogram, repeat, stable_order

METADATA_BYTES = 8  # of a pair: the number of its row, and the bits of its fp32 weight


@dataclass(frozen=True)
class Part:
    """Rows that travel together, as this rank sends and receives them."""

    tokens: Tensor  # sent, by destination rank
    rows_out: list[int]  # [R] rows for each rank, none for this one
    rows_in: list[int]  # [R] rows of each rank
    metadata_N2: Tensor  # int32; of each arriving pair, by source: its row among the source's, the bits of its weight
    pairs_RJ: IntArray  # arriving pairs of each source rank and local replica
    rows_MD: Tensor | None = None  # the arriving rows, where they came with their metadata


@dataclass(frozen=True)
class PartLimit:
    """The bound on the rows of other ranks that a rank holds at once."""

    max_bytes: int
    row_bytes: int
    overlaps: bool  # two parts are held at once

    def num_parts(self, rows_RR: IntArray) -> int:
        """In how many parts rows travel; the same on every rank, as it follows from the rows of all ranks.

        Args:
            rows_RR: [source, destination] rows, or a bound on them.
        """
        most_bytes = int(rows_RR.sum(axis=0).max()) * self.row_bytes
        return 1 if most_bytes <= self.max_bytes else -(-most_bytes * (1 + self.overlaps) // self.max_bytes)


def split_part(whole: Part, num_parts: int) -> tuple[Part, ...]:
    """Split the rows between every two ranks into runs of equal length, and their pairs with them.

    Waits for the device once, for the pairs in each part.
    """
    if num_parts == 1:
        return (whole,)
    rows_out_R, rows_in_R = np.array(whole.rows_out), np.array(whole.rows_in)
    run_out_R, run_in_R = -(-rows_out_R // num_parts), -(-rows_in_R // num_parts)
    device, num_blocks = whole.tokens.device, whole.pairs_RJ.size
    run_N = repeat(run_in_R, whole.pairs_RJ.sum(axis=1), device)
    block_N = repeat(np.arange(num_blocks), whole.pairs_RJ.ravel(), device)
    row_N = whole.metadata_N2[:, 0]
    part_N = row_N // run_N
    counts = histogram(part_N * num_blocks + block_N, num_parts * num_blocks).cpu().numpy()
    pairs_by_part = counts.reshape(num_parts, *whole.pairs_RJ.shape)
    metadata_N2 = torch.stack([row_N - part_N * run_N, whole.metadata_N2[:, 1]], 1).int()
    metadata_by_part = torch.split(
        metadata_N2[stable_order(part_N, num_parts)], pairs_by_part.sum(axis=(1, 2)).tolist()
    )
    tokens_by_rank = torch.split(whole.tokens, whole.rows_out)
    return tuple(
        Part(
            tokens=torch.cat(
                [
                    tokens[number * run : (number + 1) * run]
                    for tokens, run in zip(tokens_by_rank, run_out_R, strict=True)
                ]
            ),
            rows_out=(rows_out_R - number * run_out_R).clip(0, run_out_R).tolist(),
            rows_in=(rows_in_R - number * run_in_R).clip(0, run_in_R).tolist(),
            metadata_N2=part_metadata_N2,
            pairs_RJ=pairs_RJ,
        )
        for number, (part_metadata_N2, pairs_RJ) in enumerate(zip(metadata_by_part, pairs_by_part, strict=True))
    )
