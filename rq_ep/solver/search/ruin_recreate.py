"""Trades between layers: ranks take back what is missed least, and fill the room anew with what is worth most.

The search keeps to one layer at a time, so what bytes a layer was given at first, greedily, it keeps. Taking a little
back and filling up again leads from one allotment to the next (ruin and recreate: Schrimpf et al., Record breaking
optimization results, J. Comput. Phys. 159, 2000). It pays where the problem is small; else every layer has its share,
and moves inside the layers gain more in the same time.
"""

from collections.abc import Callable

import numpy as np

from rq_ep.core.arrays import FloatArray
from rq_ep.solver.search.cuts import price, starting_cuts
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.local_search import LEAST_STEP, improve, objective
from rq_ep.solver.search.neighborhood import Limits, crowded
from rq_ep.solver.search.search_state import Draft

MAX_TRADES = 100
MAX_WORK = 2**21  # trades times layers, steps, experts and ranks: 8 trades for 8 layers of 64 experts on 8 ranks
NUM_RANKS, NUM_REPLICAS = 2, 2  # ranks that take back in a trade, and replicas that each does; fewer gain less
NUM_MOVES = 300  # tried then in each layer that has changed


def trade(draft: Draft, on_progress: Callable[[float], None]) -> None:
    """Change what layers have of the ranks' bytes, as often as the size of the problem allows, and keep what pays."""
    effort, limits = draft.ready.effort, draft.limits
    size = sum(layer.loads_SE.size * layer.loads_SR.shape[1] for layer in draft.layers)
    num_trades = min(MAX_WORK // max(size, 1), MAX_TRADES)
    if not num_trades:
        return
    loss_LER = np.stack([_losses(*pair, effort.tail_weight) for pair in zip(draft.layers, limits, strict=True)])
    for number in range(num_trades):
        if draft.value <= GOOD_ENOUGH or effort.is_over():
            break
        generator = np.random.default_rng((effort.seed, number))
        best, held_LER, free_R, room = draft.value, draft.held_LER, draft.free_R.copy(), limits[0].room.copy()
        _take_back(draft, loss_LER, generator)
        draft.fill()
        changed = np.flatnonzero((draft.held_LER != held_LER).any(axis=(1, 2))).tolist()
        for at in changed:
            draft.layers[at] = improve(
                draft.layers[at], limits[at], effort.tail_weight, NUM_MOVES, generator, effort.is_over
            )
        pays = draft.value < best - LEAST_STEP
        for at in changed:
            if pays:
                loss_LER[at] = _losses(draft.layers[at], limits[at], effort.tail_weight)
            else:
                draft.layers[at] = LayerSplit.of(draft.layers[at].loads_SE, held_LER[at])
        if not pays:
            draft.free_R[:], limits[0].room[:] = free_R, room
        on_progress((number + 1) / num_trades)


def _losses(layer: LayerSplit, limits: Limits, tail_weight: float) -> FloatArray:
    """[E, R] what the layer would lose with a replica, for each of its bytes; infinite where it may not be taken."""
    loss_ER = np.full(limits.allowed_ER.shape, np.inf)
    cuts = starting_cuts(layer.index, layer.loads_SE, layer.loads_SR.shape[1], layer.settle())
    now, without_S = objective(layer.values_S, tail_weight), np.empty_like(layer.values_S)
    for expert, rank in np.argwhere(layer.held_ER & ~limits.fixed_ER).tolist():
        if _is_spare(layer, limits, expert, rank):
            price(cuts, layer.loads_SE, np.array([expert]), np.array([rank]), np.array([-1]), without_S)
            loss_ER[expert, rank] = (objective(without_S, tail_weight) - now) / limits.bytes_E[expert]
    return loss_ER


def _is_spare(layer: LayerSplit, limits: Limits, expert: int, rank: int) -> bool:
    others = layer.index.first_E[expert + 1] - layer.index.first_E[expert] - 1
    return bool(others > 0 and not crowded(layer.index, limits, expert, rank, -1))


def _take_back(draft: Draft, loss_LER: FloatArray, generator: np.random.Generator) -> None:
    """Free bytes of some ranks, of those replicas, by a weighted draw, that are missed least."""
    drawn_LER = loss_LER * generator.random(loss_LER.shape)
    for rank in generator.permutation(loss_LER.shape[2])[:NUM_RANKS].tolist():
        wanted = NUM_REPLICAS
        for place in np.argsort(drawn_LER[:, :, rank], axis=None, kind="stable").tolist():
            at, expert = divmod(place, loss_LER.shape[1])
            if not wanted or np.isinf(loss_LER[at, expert, rank]):
                break
            layer, limits = draft.layers[at], draft.limits[at]
            if not _is_spare(layer, limits, expert, rank):  # another one has been taken
                continue
            held_ER = layer.held_ER
            held_ER[expert, rank] = False
            draft.layers[at] = LayerSplit.of(layer.loads_SE, held_ER)
            limits.free_R[rank] += limits.bytes_E[expert]
            if not limits.present_ER[expert, rank]:
                limits.room[0] += limits.bytes_E[expert]
            wanted -= 1
