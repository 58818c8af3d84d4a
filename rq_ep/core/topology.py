"""The ranks of an expert-parallel group, their nodes, and the home of each expert and expert group on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import check_integer

MAX_RANKS = 4096  # more than any expert-parallel group; a typing error must not fill the memory


@dataclass(frozen=True)
class Topology:
    """`num_ranks` ranks, numbered node by node, `ranks_per_node` to a node (the last node may hold fewer)."""

    num_ranks: int
    ranks_per_node: int = 0  # 0: all ranks share one node
    node_sizes: tuple[int, ...] = ()  # ranks of each node, where ranks were left out; (): as `ranks_per_node` says

    def __post_init__(self) -> None:
        check_integer("--num-ranks", self.num_ranks, 1, MAX_RANKS)
        check_integer("--ranks-per-node", self.ranks_per_node)
        if self.ranks_per_node == 0:
            object.__setattr__(self, "ranks_per_node", self.num_ranks)

    @property
    def num_nodes(self) -> int:
        return len(self.node_sizes) or -(-self.num_ranks // self.ranks_per_node)

    @property
    def nodes_R(self) -> IntArray:
        """[R] the node of each rank."""
        if self.node_sizes:
            return np.repeat(np.arange(len(self.node_sizes)), self.node_sizes)
        return np.arange(self.num_ranks) // self.ranks_per_node

    @cached_property
    def neighbors_GR2(self) -> IntArray:
        """[3, R, 2] neighbors of each rank, in growing groups: itself, its node, all ranks; the first, and last + 1."""
        ranks_R = np.arange(self.num_ranks)
        groups = (ranks_R, self.nodes_R, np.zeros_like(ranks_R))
        bounds = [[np.searchsorted(group_R, group_R, side) for side in ("left", "right")] for group_R in groups]
        return np.stack(bounds).swapaxes(1, 2).copy()

    def of(self, ranks: Sequence[int]) -> "Topology":
        """The topology of some ranks alone, renumbered in their order; those of a node stay together."""
        node_sizes = np.unique(self.nodes_R[list(ranks)], return_counts=True)[1].tolist()
        largest = max(node_sizes)
        if all(size == largest for size in node_sizes[:-1]):
            return Topology(len(ranks), largest)
        return Topology(len(ranks), largest, tuple(node_sizes))


def home_ranks(num_experts: int, num_ranks: int) -> IntArray:
    """[E] the rank of each expert under standard EP: contiguous blocks whose sizes differ by at most one."""
    return np.arange(num_experts) * num_ranks // num_experts


def nodes_of_groups(loads_G: FloatArray, num_nodes: int) -> IntArray:
    """[G] a node for each expert group: heaviest first onto the least loaded node with room.

    This is EPLB's `balanced_packing`, for models that route each token to a few groups only (DeepSeek's node-limited
    routing). Nodes take the same number of groups; where they do not divide, the first nodes take one more. Axes: G
    expert groups, N nodes.
    """
    share, rest = divmod(len(loads_G), num_nodes)
    room_N = share + (np.arange(num_nodes) < rest)
    load_N = np.zeros(num_nodes)
    nodes_G = np.zeros(len(loads_G), np.int64)
    for group in np.argsort(-loads_G, kind="stable").tolist():
        node = int(np.where(room_N > 0, load_N, np.inf).argmin())
        nodes_G[group] = node
        room_N[node] -= 1
        load_N[node] += loads_G[group]
    return nodes_G
