"""The ranks an expert-parallel group runs on, and the nodes they stand in."""

from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import check_integer

MAX_RANKS = 4096  # more than any expert-parallel group; a slip of the keyboard must not fill the memory


@dataclass(frozen=True)
class Topology:
    """`num_ranks` ranks, numbered node by node, `ranks_per_node` to a node (the last node may hold fewer)."""

    num_ranks: int
    ranks_per_node: int = 0  # 0: all ranks share one node

    def __post_init__(self) -> None:
        check_integer("--num-ranks", self.num_ranks, 1, MAX_RANKS)
        check_integer("--ranks-per-node", self.ranks_per_node)
        if self.ranks_per_node == 0:
            object.__setattr__(self, "ranks_per_node", self.num_ranks)

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)

    @property
    def nodes_R(self) -> IntArray:
        """[R] the node of each rank."""
        return np.arange(self.num_ranks) // self.ranks_per_node


def home_ranks(num_experts: int, num_ranks: int) -> IntArray:
    """[E] the rank each expert lives on under standard EP: contiguous blocks whose sizes differ by at most one."""
    return np.arange(num_experts) * num_ranks // num_experts
