"""Slot maps and placements for the tests of other engines' files."""

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.interchange import SlotMap

SIZES = {"bf16": 1000, "int8": 504}


def slot_map(num_layers: int, num_ranks: int, per_rank: int, num_experts: int, seed: int, duplicates: bool) -> SlotMap:
    """Random slots that hold every expert; `duplicates`: a rank may hold one twice."""
    generator = np.random.default_rng(seed)
    num_slots = num_ranks * per_rank
    rows = []
    while len(rows) < num_layers:
        row_S = np.concatenate([np.arange(num_experts), generator.integers(num_experts, size=num_slots - num_experts)])
        row_RK = generator.permutation(row_S).reshape(num_ranks, per_rank)
        for _ in range(200):
            duplicate = np.argwhere(np.diff(np.sort(row_RK, axis=1), axis=1) == 0)
            if duplicates or not len(duplicate):
                rows.append(row_RK.ravel())
                break
            row_RK = generator.permutation(row_RK.ravel()).reshape(num_ranks, per_rank)
        else:  # so many copies that chance does not part them: neighbours in a cycle
            rows.append(np.arange(num_slots) % num_experts)
    layers = tuple(np.sort(generator.permutation(2 * num_layers + 1)[:num_layers]).tolist())
    return SlotMap(np.array(rows, np.int64), layers, num_ranks, num_experts)


@st.composite
def slot_maps(draw: st.DrawFn, duplicates: bool = False) -> SlotMap:
    num_ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    num_experts = draw(st.integers(per_rank, num_ranks * per_rank))
    return slot_map(draw(st.integers(1, 3)), num_ranks, per_rank, num_experts, draw(st.integers(0, 10**6)), duplicates)


def placement(*layers: list[tuple[int, int, str, float]], num_ranks: int = 2) -> Placement:
    """A placement from (rank, expert, format, share) of every replica of every layer."""
    tables = []
    for number, rows in enumerate(layers):
        num_experts = 1 + max(expert for _, expert, _, _ in rows)
        even = LayerPlacement.even(number, num_experts, [Replica(*row[:3]) for row in rows])
        shares = {(rank, expert): share for rank, expert, _, share in rows}
        shares_P = np.array([shares[replica.rank, replica.expert] for replica in even.replicas])
        tables.append(LayerPlacement(number, num_experts, even.replicas, shares_P))
    return Placement(tuple(tables), "rq", Topology(num_ranks), (0,) * num_ranks)


def damage(path: Path, data: st.DataObject) -> None:
    """Cut a file short, or change one bit of it."""
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
