"""Slot maps: a placement for engines with the same number of slots on every rank, each of which holds one expert.

Such engines split the pairs of an expert evenly over its slots and store all experts in one format. Any other placement
is refused, with the reason. A rank may hold an expert in two slots: EPLB does that.

Axes: S slots of all ranks, K slots of a rank, C replicas of one expert.
"""

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.stats import ModelIdentity
from rq_ep.core.topology import Topology
from rq_ep.interchange.rows import select_rows
from rq_ep.interchange.tensors import MAX_CELLS

SHARE_TOLERANCE = 1e-6
SERVED_BY = "eplb"  # the strategy that splits pairs as these engines do


class DuplicateSlot(NamedTuple):
    """An expert that a rank holds in two slots."""

    layer: int
    rank: int
    expert: int


@dataclass(frozen=True)
class SlotMap:
    """S slots in each of L layers; of R ranks, rank r owns slots [r * S / R, (r + 1) * S / R)."""

    experts_LS: IntArray
    layers: tuple[int, ...]  # index of each layer in the model
    num_ranks: int
    num_experts: int
    num_model_layers: int = 0  # layers of the model, dense ones included; 0: up to the last MoE layer

    def __post_init__(self) -> None:
        num_layers, num_slots = self.experts_LS.shape
        assert len(self.layers) == num_layers
        if not num_slots or num_slots % self.num_ranks:
            raise UserError(f"{num_slots} slots do not divide by {self.num_ranks} ranks: --num-ranks must be another")
        if self.num_model_layers and self.num_model_layers <= max(self.layers):
            raise UserError(
                f"--num-model-layers {self.num_model_layers}: layer {max(self.layers)} is placed, so there are more"
            )
        for layer, experts_S in zip(self.layers, self.experts_LS, strict=True):
            copies_E = np.bincount(experts_S, minlength=self.num_experts)
            if len(copies_E) > self.num_experts:
                raise UserError(f"layer {layer}: expert {len(copies_E) - 1}, but there are {self.num_experts} experts")
            if not copies_E.all():
                raise UserError(
                    f"layer {layer}: expert {int(np.argmin(copies_E))} is in no slot; if this layer is dense, or its "
                    "experts are fewer, name the layers that are not with --layers"
                )

    @property
    def slots_LRK(self) -> IntArray:
        """[L, R, K] the expert in each slot of each rank."""
        return self.experts_LS.reshape(len(self.layers), self.num_ranks, -1)

    @property
    def first_duplicate(self) -> DuplicateSlot | None:
        """The first slot whose expert its rank holds in another slot already, if there is one."""
        duplicates = np.argwhere(self._duplicates_LRK)
        if not len(duplicates):
            return None
        at, rank, k = duplicates[0].tolist()
        return DuplicateSlot(self.layers[at], rank, int(np.sort(self.slots_LRK[at, rank])[k]))

    @property
    def num_duplicates(self) -> int:
        """Slots whose expert their rank holds in another slot already."""
        return int(self._duplicates_LRK.sum())

    @property
    def _duplicates_LRK(self) -> BoolArray:
        """[L, R, K - 1] where a slot, sorted within its rank, equals the next."""
        return np.asarray(np.diff(np.sort(self.slots_LRK, axis=2), axis=2) == 0)

    @classmethod
    def of(cls, placement: Placement, num_model_layers: int = 0) -> "SlotMap":
        """The slots of a placement.

        Raises:
            UserError: it has several formats, low precision, uneven shares or uneven slots.
        """
        if len(placement.formats) > 1 or placement.low_precision_planned > 0:
            raise UserError(
                f"formats {', '.join(placement.formats)}: engines of equal slots store all experts in one, the native "
                "one; place with --for, or with --formats naming the native one alone"
            )
        num_ranks = placement.topology.num_ranks
        slots = [_slots_of(layer, num_ranks) for layer in placement.layers]
        if len({experts_S.size for experts_S in slots}) > 1:
            numbers = ", ".join(
                f"{experts_S.size} in layer {layer.index}"
                for layer, experts_S in zip(placement.layers, slots, strict=True)
            )
            raise UserError(
                f"layers differ in slots ({numbers:.100}), but these engines have one number: place with --for"
            )
        return cls(
            experts_LS=np.stack(slots),
            layers=tuple(layer.index for layer in placement.layers),
            num_ranks=num_ranks,
            num_experts=placement.layers[0].num_experts,
            num_model_layers=num_model_layers,
        )

    def to_placement(
        self,
        expert_bytes: Mapping[str, int],
        native_format: str,
        ranks_per_node: int = 0,
        model: ModelIdentity | None = None,
    ) -> Placement:
        """The placement of these slots, to be served with the even split of `eplb`.

        Two slots of an expert on a rank become one replica of twice the share; its bytes count once.
        """
        topology = Topology(self.num_ranks, ranks_per_node)
        layers = [
            _to_layer(layer, self.num_experts, slots_RK, native_format)
            for layer, slots_RK in zip(self.layers, self.slots_LRK, strict=True)
        ]
        bytes_R = bytes_by_rank(layers, self.num_ranks, expert_bytes)
        certificate = {"slots per rank and layer": self.slots_LRK.shape[2]}
        return Placement(
            tuple(layers), SERVED_BY, topology, tuple(bytes_R.tolist()), model=model, certificate=certificate
        )


def read_slots(
    source: Path,
    rows: Any,
    num_ranks: int | None,
    labels: Sequence[int] | None = None,
    selected: Sequence[int] | None = None,
) -> SlotMap:
    """Check rows of slots that a file holds.

    Args:
        source: the file, for messages.
        rows: a list or array of L rows of S expert numbers.
        num_ranks: as `--num-ranks` or the file says.
        labels: the layer of each row, where the file says it.
        selected: the layers of `--layers`.
    """
    if num_ranks is None:
        raise UserError(f"--num-ranks: {source} does not say how many ranks share its slots")
    if (
        not isinstance(rows, list | np.ndarray)
        or not len(rows)
        or any(not isinstance(row, list | np.ndarray) for row in rows)
    ):
        raise UserError(f"{source}: has no rows of slots")
    num_slots = len(rows[0])
    if len(rows) * num_slots > MAX_CELLS or any(len(row) != num_slots for row in rows):
        raise UserError(f"{source}: layers must have equally many slots, {MAX_CELLS} in all at most")
    for row in rows:
        for expert in row if isinstance(row, list) else row.tolist():
            if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_slots:
                shown = reprlib.repr(expert)  # short, even of a list that holds itself
                raise UserError(f"{source}: {shown} in a slot: must be an expert, 0 to {num_slots - 1} at most")
    taken, layers = select_rows(str(source), len(rows), labels, selected)
    experts_LS = np.array([rows[row] for row in taken], np.int64).reshape(len(taken), num_slots)
    try:
        return SlotMap(experts_LS, layers, num_ranks, int(experts_LS.max(initial=0)) + 1)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _slots_of(layer: LayerPlacement, num_ranks: int) -> IntArray:
    """[S] the expert in each slot, rank by rank."""
    replicas = layer.replicas
    slots_P = _slots_by_share(layer.shares_P, replicas.experts_P, layer.num_experts)
    uneven = np.flatnonzero(slots_P == 0)
    if len(uneven):
        expert = int(replicas.experts_P[uneven[0]])
        shares = ", ".join(f"{share:.3g}" for share in layer.shares_P[replicas.experts_P == expert])
        raise UserError(
            f"layer {layer.index}: expert {expert} has shares {shares}, but these engines split evenly over its slots: "
            "place with --for"
        )
    on_rank_R = np.bincount(replicas.ranks_P, slots_P, minlength=num_ranks).astype(np.int64)
    if on_rank_R.min() != on_rank_R.max():
        raise UserError(
            f"layer {layer.index}: {on_rank_R.max()} slots on rank {on_rank_R.argmax()}, {on_rank_R.min()} on rank "
            f"{on_rank_R.argmin()}, but these engines have equally many on each: place with --for"
        )
    return np.repeat(replicas.experts_P, slots_P)


def _slots_by_share(shares_P: FloatArray, experts_P: IntArray, num_experts: int) -> IntArray:
    """[P] the fewest slots for each replica that make an even split these shares; 0 where no number does."""
    copies_P = np.bincount(experts_P, minlength=num_experts)[experts_P]
    slots_P = (np.abs(shares_P * copies_P - 1) < SHARE_TOLERANCE).astype(np.int64)
    for expert in np.unique(experts_P[slots_P == 0]).tolist():
        shares_C = shares_P[experts_P == expert]
        total = min((len(shares_C) + more for more in range(len(shares_C) + 1) if _whole(shares_C, more)), default=0)
        slots_P[experts_P == expert] = np.rint(shares_C * total)
    return slots_P


def _whole(shares_C: FloatArray, more: int) -> bool:
    """Whether as many slots as there are replicas, and `more`, divide by these shares without rest."""
    slots_C = shares_C * (len(shares_C) + more)
    return bool((np.abs(slots_C - np.rint(slots_C)) < SHARE_TOLERANCE * len(slots_C)).all() and (slots_C > 0.5).all())


def _to_layer(layer: int, num_experts: int, slots_RK: IntArray, native_format: str) -> LayerPlacement:
    copies = Counter(
        Replica(rank, expert, native_format) for rank, row in enumerate(slots_RK.tolist()) for expert in row
    )
    replicas = Replicas.of(copies)
    slots_P = np.array([copies[replica] for replica in replicas])
    slots_E = np.bincount(slots_RK.ravel(), minlength=num_experts)
    return LayerPlacement(layer, num_experts, replicas, slots_P / slots_E[replicas.experts_P])
