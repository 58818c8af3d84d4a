"""What to do with the bytes that homes leave: replicas by gain per byte, over all layers at once; then more bits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.solver.cuts import LayerBalance
from rq_ep.solver.precision import Formats

GOOD_ENOUGH = 1.0005  # max/mean at which a layer needs nothing more
LEAST_GAIN = 1e-6  # of the soft maximum: below it a replica is not worth its bytes
REFINE_EVERY = 8  # replicas added to a layer between two exact splits of its steps


def fill(layers: Sequence[LayerBalance], bytes_LE: IntArray, free_R: IntArray) -> None:
    """Add replicas to `layers`, the largest gain per byte first, while they fit; takes their bytes off `free_R`."""
    gains_LER = np.stack([_gains(layer, sizes_E) for layer, sizes_E in zip(layers, bytes_LE, strict=True)])
    num_added = [0] * len(layers)
    least_gain_LE1 = LEAST_GAIN / bytes_LE[:, :, None]
    while True:
        fits_LER = bytes_LE[:, :, None] <= free_R
        worth_LER = np.where(fits_LER & (gains_LER > least_gain_LE1), gains_LER, 0)
        best = int(worth_LER.argmax())
        if not worth_LER.flat[best]:
            return
        at, expert, rank = (int(i) for i in np.unravel_index(best, worth_LER.shape))
        layer = layers[at]
        held_R = layer.held_ER[expert].copy()
        held_R[rank] = True
        layer.hold([expert], held_R[None])
        free_R[rank] -= bytes_LE[at, expert]
        num_added[at] += 1
        if num_added[at] % REFINE_EVERY == 0:
            layer.refine()
        gains_LER[at] = _gains(layer, bytes_LE[at])


def _gains(layer: LayerBalance, bytes_E: IntArray) -> FloatArray:
    if layer.imbalance <= GOOD_ENOUGH and layer.refine() <= GOOD_ENOUGH:
        return np.zeros(layer.held_ER.shape)
    return layer.gains_ER(bytes_E.astype(np.float64))


def promote(
    layers: Sequence[LayerBalance],
    low_LE: npt.NDArray[np.bool_],
    damage_LE: FloatArray,
    formats: Formats,
    free_R: IntArray,
) -> None:
    """Give bytes that are left to the low experts missed most: all replicas of one turn native, or none."""
    more = formats.native_bytes - formats.low_bytes
    by_damage = np.argsort(-damage_LE, axis=None, kind="stable")
    for at, expert in zip(*(axis.tolist() for axis in np.unravel_index(by_damage, damage_LE.shape)), strict=True):
        held_R = layers[at].held_ER[expert]
        if low_LE[at, expert] and (free_R[held_R] >= more).all():
            low_LE[at, expert] = False
            free_R[held_R] -= more
