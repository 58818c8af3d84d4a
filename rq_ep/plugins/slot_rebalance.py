"""The next placement of an engine of equal slots, from the loads that it counted and the placement that serves.

Every rank of such an engine plans alone, and all must come to the same placement. The search is therefore bounded by
its work, not by a clock; it draws the same numbers on every rank, and it adds up loads in one order on every machine.

Axes: P slots of all ranks, J slots of a rank.
"""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.solver.objective.calibration_steps import LayerSteps, spread_by_pairs
from rq_ep.solver.search.slots.rank_leveling import leveled
from rq_ep.solver.search.slots.slot_repair import EMPTY, in_old_slots, repaired, replica_counts
from rq_ep.solver.search.slots.slot_search import even_imbalance, held_experts, improve_slots

SECONDS = 3.0  # that the search takes at most on one core of a common server
WORK_PER_SECOND = 1.6e9  # steps x ranks x slots of a rank that moves were attempted for
MAX_STEPS = 128  # that the search looks at
FEW_STEPS = 8  # steps that say no more than their mean does
MAX_MOVES = 4000  # attempted in a layer
MOVE_PRICE = 0.001  # an expert moves to a rank where that lowers the layer's mean of max/mean by this or more


class Balancing(NamedTuple):
    """What an engine asks for; the sizes are those of its own call."""

    loads_SLE: np.ndarray  # pairs of each step, layer and expert; one step: sums or means over steps
    own_LP: np.ndarray  # the engine's own answer
    num_ranks: int
    num_nodes: int = 1  # that groups of experts are kept together on
    num_groups: int = 1
    old_LP: np.ndarray | None = None  # what serves now; `EMPTY` in empty slots

    def checked(self) -> "Balancing":
        """The same in 64-bit integers.

        Raises:
            UserError: sizes contradict each other, or something is no count or no expert.
        """
        loads_SLE = _counts(self.loads_SLE)
        own_LP = np.asarray(self.own_LP).astype(np.int64)
        num_layers, num_experts = loads_SLE.shape[1:]
        if own_LP.ndim != 2 or len(own_LP) != num_layers:
            raise UserError(f"{num_layers} layers of loads, but a map of shape {list(own_LP.shape)}")
        num_slots = own_LP.shape[1]
        if self.num_ranks < 1 or num_slots % self.num_ranks:
            raise UserError(f"{num_slots} slots do not divide by {self.num_ranks} ranks")
        if num_slots > num_experts * self.num_ranks:
            raise UserError(
                f"{num_slots} slots for {num_experts} experts on {self.num_ranks} ranks: a rank would hold some twice"
            )
        if self.num_ranks % self.num_nodes or self.num_groups % self.num_nodes or num_experts % self.num_groups:
            raise UserError(
                f"{num_experts} experts in {self.num_groups} groups do not divide by {self.num_nodes} nodes of "
                f"{self.num_ranks} ranks"
            )
        _check_experts("the engine's own map", own_LP, 0, num_experts)
        if not all(np.isin(np.arange(num_experts), row).all() for row in own_LP):
            raise UserError("the engine's own map leaves an expert out")
        old_LP = None if self.old_LP is None else np.asarray(self.old_LP).astype(np.int64)
        if old_LP is not None and old_LP.shape != own_LP.shape:
            old_LP = None  # the group has another size than before, or this is the first placement
        if old_LP is not None:
            _check_experts("the map that serves", old_LP, EMPTY, num_experts)
        return self._replace(loads_SLE=loads_SLE, own_LP=own_LP, old_LP=old_LP)


def rebalanced(asked: Balancing, seconds: float = SECONDS) -> IntArray:
    """[L, P] the expert in each slot; what stays on a rank stays in its slot.

    A layer without loads stays as it is. No layer is worse than the engine's own answer on the loads that were given:
    in the mean over steps of max/mean over ranks under an even split, or in max/mean of the mean load.

    Args:
        asked: loads, sizes, the engine's own answer and what serves now.
        seconds: that the search may take on one core of a common server, approximately; fixes its work.

    Raises:
        UserError: what is asked for contradicts itself.
    """
    asked = asked.checked()
    num_layers, num_slots = asked.own_LP.shape
    num_moves = _moves(asked, seconds)
    new_LP = asked.own_LP.copy()
    for layer in range(num_layers):
        shape = (asked.num_ranks, num_slots // asked.num_ranks)
        own_RJ = asked.own_LP[layer].reshape(shape)
        old_RJ = None if asked.old_LP is None else asked.old_LP[layer].reshape(shape)
        steps = _steps(asked.loads_SLE[:, layer], asked.num_ranks)
        draws_A3 = np.random.default_rng(layer).random((num_moves, 3))
        new_LP[layer] = _layer(asked, steps, own_RJ, old_RJ, draws_A3).ravel()
    return new_LP


def arrivals(old_LP: IntArray, new_LP: IntArray, num_ranks: int) -> int:
    """Experts that ranks receive on the way from one map to another, all layers together."""
    pairs = (
        (held.reshape(num_ranks, -1), before.reshape(num_ranks, -1))
        for held, before in zip(new_LP, old_LP, strict=True)
    )
    return sum(
        len(np.setdiff1d(held_J, before_J))
        for held_RJ, before_RJ in pairs
        for held_J, before_J in zip(held_RJ, before_RJ, strict=True)
    )


def prepare() -> None:
    """Compile the search, or read what was compiled before, so that the first placement need not wait for that."""
    slots_RJ = np.array([[0], [1]])
    steps = LayerSteps(np.array([[2, 1], [1, 1]]), num_ranks=2)
    improve_slots(steps, slots_RJ, np.ones((2, 2), bool), np.zeros((1, 3)))
    leveled(np.ones(2), slots_RJ, np.ones((2, 2), bool))


def _moves(asked: Balancing, seconds: float) -> int:
    """Moves to attempt in each layer, so that the search takes `seconds` on a common server."""
    num_steps = max(min(len(asked.loads_SLE), MAX_STEPS), FEW_STEPS)
    work = asked.own_LP.size * num_steps  # L layers x R ranks x J slots x S steps for one move in each layer
    return int(min(seconds * WORK_PER_SECOND / max(work, 1), MAX_MOVES))


def _steps(loads_SE: IntArray, num_ranks: int) -> LayerSteps:
    """The steps to balance a layer for; a single one where there are too few to tell more than their sum."""
    busy_SE = loads_SE[loads_SE.any(axis=1)]
    if len(busy_SE) < FEW_STEPS:
        return LayerSteps(busy_SE.sum(axis=0, keepdims=True)[: len(busy_SE)], num_ranks)
    return LayerSteps(busy_SE[spread_by_pairs(busy_SE.sum(axis=1).astype(np.float64), MAX_STEPS)], num_ranks)


def _layer(
    asked: Balancing, steps: LayerSteps, own_RJ: IntArray, old_RJ: IntArray | None, draws_A3: FloatArray
) -> IntArray:
    """[R, J] the new slots of one layer."""
    num_experts = steps.counts_SE.shape[1]
    start_RJ = own_RJ if old_RJ is None else old_RJ
    if not len(steps.counts_SE):
        return own_RJ if (start_RJ == EMPTY).any() else start_RJ
    allowed_ER = _allowed(asked, own_RJ, old_RJ)
    loads_E = steps.counts_SE.sum(axis=0)
    counts_E = _counts_by_node(asked, loads_E.astype(np.float64), allowed_ER, own_RJ.size)
    repaired_RJ = repaired(start_RJ, counts_E, loads_E / counts_E, allowed_ER)
    least = even_imbalance(steps, own_RJ)
    if repaired_RJ is not None:
        price_ER = np.full((num_experts, asked.num_ranks), 0.0 if old_RJ is None else MOVE_PRICE)
        filled_RJ = np.where(start_RJ == EMPTY, repaired_RJ, start_RJ)
        price_ER[held_experts(filled_RJ, num_experts)] = 0.0
        new_RJ = _searched(steps, repaired_RJ, allowed_ER, draws_A3, price_ER)
        if even_imbalance(steps, new_RJ) <= least:
            return new_RJ if old_RJ is None else in_old_slots(new_RJ, old_RJ)
    allowed_ER = _allowed(asked, own_RJ, None)
    if len(steps.counts_SE) == 1:
        return leveled(loads_E.astype(np.float64), own_RJ, allowed_ER)
    if held_experts(own_RJ, num_experts).sum() == own_RJ.size:  # the search knows no rank that holds an expert twice
        new_RJ = improve_slots(steps, own_RJ, allowed_ER, draws_A3)
        return new_RJ if even_imbalance(steps, new_RJ) <= least else own_RJ
    return own_RJ


def _searched(
    steps: LayerSteps, slots_RJ: IntArray, allowed_ER: BoolArray, draws_A3: FloatArray, price_ER: FloatArray
) -> IntArray:
    if len(steps.counts_SE) == 1:
        return leveled(steps.counts_SE[0].astype(np.float64), slots_RJ, allowed_ER, price_ER)
    return improve_slots(steps, slots_RJ, allowed_ER, draws_A3, price_ER)


def _allowed(asked: Balancing, own_RJ: IntArray, old_RJ: IntArray | None) -> BoolArray:
    """[E, R] the ranks that may hold an expert: of the node that its group is on, now or in the engine's answer."""
    num_experts = int(own_RJ.max()) + 1
    nodes_R = np.arange(asked.num_ranks) // (asked.num_ranks // asked.num_nodes)
    for slots_RJ in (old_RJ, own_RJ):
        if slots_RJ is None or (slots_RJ == EMPTY).any():
            continue
        on_node_EN = np.zeros((num_experts, asked.num_nodes), bool)
        on_node_EN[slots_RJ, nodes_R[:, None]] = True
        on_node_GN = on_node_EN.reshape(asked.num_groups, -1, asked.num_nodes).any(axis=1)
        groups_N = on_node_GN.sum(axis=0)
        if (on_node_GN.sum(axis=1) == 1).all() and (groups_N == asked.num_groups // asked.num_nodes).all():
            return np.repeat(on_node_GN, num_experts // asked.num_groups, axis=0)[:, nodes_R]
    raise UserError(f"the engine's own map keeps groups of experts on no node of {asked.num_nodes}")


def _counts_by_node(asked: Balancing, loads_E: FloatArray, allowed_ER: BoolArray, num_slots: int) -> IntArray:
    """[E] replicas of each expert, where every node has as many slots."""
    counts_E = np.zeros(len(loads_E), np.int64)
    most_E = allowed_ER.sum(axis=1)
    for first_rank in range(0, asked.num_ranks, asked.num_ranks // asked.num_nodes):
        here = allowed_ER[:, first_rank]
        counts_E[here] = replica_counts(loads_E[here], num_slots // asked.num_nodes, most_E[here])
    return counts_E


def _counts(loads: np.ndarray) -> IntArray:
    """[S, L, E] counts of pairs from loads of these axes, or of the last two."""
    loads = np.asarray(loads)
    if loads.ndim == 2:
        loads = loads[None]
    if loads.ndim != 3 or 0 in loads.shape[1:]:
        raise UserError(f"loads of shape {list(loads.shape)}, not [steps, layers, experts] or [layers, experts]")
    if loads.dtype.kind not in "iuf":
        raise UserError(f"loads are {loads.dtype}, not numbers")
    wrong = loads[~((loads >= 0) & (loads < 2**53) & (loads == np.floor(loads)))]
    if wrong.size:
        raise UserError(f"loads must be whole numbers from 0 up, but one is {wrong[0]}")
    return loads.astype(np.int64)


def _check_experts(what: str, map_LP: IntArray, low: int, num_experts: int) -> None:
    wrong = map_LP[(map_LP < low) | (map_LP >= num_experts)]
    if wrong.size:
        raise UserError(f"{what} names expert {wrong[0]}, but there are {num_experts}")
