"""The experts that a rank holds in one layer, and their compute together with borrowed ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.core.plan import WeightTransfer
from rq_ep.core.replicas import Replicas
from rq_ep.formats import ExpertLayout, WeightFormat, get_format, is_intact
from rq_ep.moe.borrowing import BorrowBuffers, Borrowing, ExpertSlot
from rq_ep.moe.expert_compute import GroupedExperts, add_outputs
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.grouped_gemm import Stack
from rq_ep.moe.integrity import DamagedExpert
from rq_ep.parallel import EPGroup, Received

MAX_CONVERTED = 4  # experts of a layer that a rank keeps in a second format, once it has lent them in it


class ExpertBank:
    """The resident experts of one layer on one rank: a stack of packed experts for each format."""

    def __init__(
        self,
        layout: ExpertLayout,
        replicas: Replicas,
        rank: int,
        device: torch.device | str = "cpu",
        borrow_buffers: BorrowBuffers | None = None,
        layer: int = 0,
    ) -> None:
        """Allocate this rank's replicas of one layer; `put` fills them.

        Args:
            layout: tensors of one expert.
            replicas: all resident replicas of the layer.
            rank: whose replicas this bank holds.
            device: where they lie.
            borrow_buffers: for borrowed experts, which layers may share; default: this bank's own, without a bound.
            layer: its index in the model.
        """
        self.layer = layer
        self.layout = layout
        self.rank = rank
        self.borrow_buffers = BorrowBuffers(layout, device) if borrow_buffers is None else borrow_buffers
        self.borrow_buffers.join(layer)
        held = [replicas[p] for p in replicas.on_rank(rank)]
        self._stacks: dict[str, Stack] = {}
        self._slots: dict[int, ExpertSlot] = {}
        for name in sorted({replica.format for replica in held}):
            experts = [replica.expert for replica in held if replica.format == name]
            stack = Stack.empty(get_format(name), layout, len(experts), torch.device(device))
            self._stacks[name] = stack
            self._slots |= {expert: ExpertSlot(stack, slot) for slot, expert in enumerate(experts)}
        self._converted: dict[tuple[int, str], Tensor] = {}  # (expert, format) -> packed; least recently used first

    @property
    def nbytes(self) -> int:
        """Bytes of the resident experts."""
        return sum(stack.packed.nbytes for stack in self._stacks.values())

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts this rank holds, ascending."""
        return tuple(sorted(self._slots))

    def packed(self, expert: int) -> Tensor:
        """The bytes of a resident expert, uint8 [nbytes]."""
        return self._slots[expert].packed

    def format_of(self, expert: int) -> WeightFormat:
        """The format that a resident expert is stored in."""
        return self._slots[expert].stack.format

    def put(self, expert: int, weights: Mapping[str, Tensor]) -> None:
        """Pack an expert into the format its replica on this rank has.

        Args:
            expert: one of `experts`.
            weights: its tensors, named and shaped as in the layout.
        """
        self.packed(expert).copy_(self.format_of(expert).pack(weights, self.layout))
        self._converted.clear()

    def put_packed(self, expert: int, packed: Tensor) -> None:
        """Store an expert that is packed already, uint8 [nbytes].

        Raises:
            UserError: it has another size than its format takes, or does not match its checksum.
        """
        slot = self.packed(expert)
        if packed.shape != slot.shape or packed.dtype != torch.uint8:
            raise UserError(
                f"packed expert {expert} is {packed.dtype} {list(packed.shape)}, not uint8 {list(slot.shape)}: "
                "quantize the model again"
            )
        if not is_intact(packed):
            raise UserError(f"packed expert {expert} does not match its checksum: quantize the model again")
        slot.copy_(packed)
        self._converted.clear()

    def packed_as(self, expert: int, name: str) -> Tensor:
        """The bytes of a resident expert in format `name`: as it lies, or converted once and kept for a while.

        Raises:
            DamagedExpert: the expert to be converted does not match its checksum any more.
        """
        if self.format_of(expert).name == name:
            return self.packed(expert)
        key = (expert, name)
        packed = self._converted.pop(key, None)
        if packed is None:
            packed = self._convert(expert, name)
            if len(self._converted) == MAX_CONVERTED:
                del self._converted[next(iter(self._converted))]
        self._converted[key] = packed
        return packed

    def _convert(self, expert: int, name: str) -> Tensor:
        stack, slot = self._slots[expert]
        if not is_intact(stack.packed[slot]):  # a new checksum would hide it
            raise DamagedExpert(f"expert {expert} of layer {self.layer} on rank {self.rank} is damaged")
        views = stack.experts[slot]
        weights = {
            tensor: stack.format.dequantize(views, tensor, self.layout, torch.float32) for tensor in self.layout.shapes
        }
        return get_format(name).pack(weights, self.layout)

    def borrow(self, transfers: Sequence[WeightTransfer], group: EPGroup) -> Borrowing:
        """Start this rank's part of a step's transfers; `compute` waits for them. Verifies the layer before.

        Raises:
            DamagedExpert: this layer's expert is damaged, or one that the layer before has borrowed.
            UserError: the buffers are too small for what this rank borrows.
        """
        return self.borrow_buffers.start(self.layer, self.rank, transfers, self._lend, group)

    def _lend(self, transfer: WeightTransfer) -> Tensor:
        return self.packed_as(transfer.expert, transfer.format)

    def compute(self, received: Received, family: ExpertFamily, borrowed: Borrowing) -> Tensor:
        """partial_MD [M, D] fp32: for every received row the weighted sum over this rank's replicas.

        Sums run over the resident formats, then over the borrowed experts, each in the order of the pairs. Borrowed
        experts are waited for after the resident ones are computed. They are verified by the next layer or, at the end
        of a forward pass, here.

        Raises:
            RankFailure: a borrowed expert did not arrive.
            DamagedExpert: one arrived damaged, and this layer is the last.
        """
        rows_MD = received.rows_MD
        partial_MD = rows_MD.new_zeros(rows_MD.shape, dtype=torch.float32)
        for grouped in _grouped(received, self._slots):
            add_outputs(partial_MD, received, grouped, family)
        borrowed.wait()
        for grouped in _grouped(received, borrowed.slots):
            add_outputs(partial_MD, received, grouped, family)
        if self.borrow_buffers.is_last(self.layer):
            borrowed.verify()
        return partial_MD


def _grouped(received: Received, slots: Mapping[int, ExpertSlot]) -> list[GroupedExperts]:
    """The local replicas that have pairs and whose experts lie in `slots`, format by format."""
    by_format: dict[str, GroupedExperts] = {}
    for replica, expert in enumerate(received.experts):
        if expert in slots and received.offsets[replica] < received.offsets[replica + 1]:
            stack, slot = slots[expert]
            grouped = by_format.setdefault(stack.format.name, GroupedExperts(stack, [], []))
            grouped.slots.append(slot)
            grouped.replicas.append(replica)
    return [by_format[name] for name in sorted(by_format)]
