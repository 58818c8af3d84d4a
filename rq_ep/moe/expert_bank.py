"""The experts that a rank holds in one layer, and their compute together with borrowed ones."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.core.plan import WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.formats import ExpertBuffers, ExpertLayout, WeightFormat, get_format, is_intact
from rq_ep.moe.borrowing import BorrowBuffers, Borrowing, ExpertSlot
from rq_ep.moe.expert_compute import GroupedExperts, add_outputs
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.grouped_gemm import PackedExpert, Stack
from rq_ep.moe.integrity import DamagedExpert, MissingExpert
from rq_ep.parallel import EPGroup, Received

MAX_CONVERTED = 4  # experts of a layer that a rank keeps in a second format, once it has lent them in it


Held = dict[int, tuple[WeightFormat, PackedExpert]]  # by expert


@dataclass
class StagedExpert:
    """An expert that arrives and does not serve yet."""

    format: WeightFormat
    expert: PackedExpert
    is_verified: bool = False


class ExpertBank:
    """The resident experts of one layer on one rank: a stack of packed experts for each format.

    Experts arrive in buffers that do not serve: `stage` one, write to it and verify it, on any thread, while this bank
    computes. `commit`, between two steps, lets the replicas of a new placement serve and frees the others. With
    `expert_buffers` each expert has a buffer of its own, so that nothing is copied then. Without, the experts of a
    format lie in one buffer, as fast kernels want it, and a commit makes a new one beside it.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        replicas: Replicas,
        rank: int,
        device: torch.device | str = "cpu",
        borrow_buffers: BorrowBuffers | None = None,
        layer: int = 0,
        expert_buffers: ExpertBuffers | None = None,
    ) -> None:
        """Allocate this rank's replicas of one layer; `put` fills them.

        Args:
            layout: tensors of one expert.
            replicas: all resident replicas of the layer.
            rank: whose replicas this bank holds.
            device: where they lie.
            borrow_buffers: for borrowed experts, which layers may share; default: this bank's own, without a bound.
            layer: its index in the model.
            expert_buffers: for replicas that come and go without a copy, which layers may share; None: as above.
        """
        self.layer = layer
        self.layout = layout
        self.rank = rank
        self.borrow_buffers = BorrowBuffers(layout, device) if borrow_buffers is None else borrow_buffers
        self.borrow_buffers.join(layer)
        self._device = torch.device(device)
        self.is_stacked = expert_buffers is None
        self._buffers = ExpertBuffers(device) if expert_buffers is None else expert_buffers
        self._converted: dict[tuple[int, str], Tensor] = {}  # (expert, format) -> packed; least recently used first
        self._lock = threading.Lock()  # guards what is staged
        self._staged: dict[int, StagedExpert] = {}
        held = self._own(replicas)
        if not self.is_stacked:
            formats = {replica.expert: get_format(replica.format) for replica in held}
            self._hold({e: (name, PackedExpert.blank(name, layout, self._buffers)) for e, name in formats.items()})
            return
        self._stacks: dict[str, Stack] = {}
        self._slots: dict[int, ExpertSlot] = {}
        for name in sorted({replica.format for replica in held}):
            experts = [replica.expert for replica in held if replica.format == name]
            stack = Stack.empty(get_format(name), layout, len(experts), self._device)
            self._stacks[name] = stack
            self._slots |= {expert: ExpertSlot(stack, slot) for slot, expert in enumerate(experts)}

    @property
    def nbytes(self) -> int:
        """Bytes of the resident experts."""
        return sum(stack.nbytes for stack in self._stacks.values())

    @property
    def staged_bytes(self) -> int:
        """Bytes of the experts that arrive beside them."""
        with self._lock:
            return sum(staged.expert.packed.nbytes for staged in self._staged.values())

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
            packed = self.converted(expert, name)
            if len(self._converted) == MAX_CONVERTED:
                del self._converted[next(iter(self._converted))]
        self._converted[key] = packed
        return packed

    def converted(self, expert: int, name: str) -> Tensor:
        """The bytes of a resident expert in format `name`: as it lies, or converted; on any thread, nothing is kept.

        Raises:
            DamagedExpert: the expert to be converted does not match its checksum any more.
        """
        stack, slot = self._slots[expert]
        if stack.format.name == name:
            return stack.at(slot)
        if not is_intact(stack.at(slot)):  # a new checksum would hide it
            raise DamagedExpert(f"expert {expert} of layer {self.layer} on rank {self.rank} is damaged")
        views = stack.experts[slot]
        weights = {
            tensor: stack.format.dequantize(views, tensor, self.layout, torch.float32) for tensor in self.layout.shapes
        }
        return get_format(name).pack(weights, self.layout)

    def stage(self, expert: int, name: str) -> Tensor:
        """A buffer for an expert that arrives in format `name`, uint8 [nbytes].

        On a GPU it comes from the current stream's memory: another stream waits for that one before it writes.
        """
        format_ = get_format(name)
        held = self._slots.get(expert)
        assert held is None or held.stack.format is not format_, f"expert {expert} is held in {name}"
        staged = StagedExpert(format_, PackedExpert.blank(format_, self.layout, self._buffers))
        with self._lock:
            assert expert not in self._staged, f"expert {expert} arrives already"
            self._staged[expert] = staged
        return staged.expert.packed

    def verify_staged(self, expert: int) -> None:
        """Compare an expert that has arrived with its checksum; one that was not verified cannot serve.

        Raises:
            DamagedExpert: it does not match; it may be written once more.
        """
        with self._lock:
            staged = self._staged[expert]
        staged.is_verified = bool(is_intact(staged.expert.packed))
        if not staged.is_verified:
            raise DamagedExpert(f"expert {expert} of layer {self.layer} arrived damaged on rank {self.rank}")

    def discard_staged(self) -> None:
        """Free the experts that have arrived and do not serve, and the buffers of others that went."""
        with self._lock:
            self._staged = {}
        self._buffers.release()

    def check_commit(self, replicas: Replicas) -> None:
        """Return if `commit` can let these replicas serve.

        Raises:
            MissingExpert: one of this rank is neither held nor staged and verified, or in another format.
        """
        self._after(replicas)

    def commit(self, replicas: Replicas) -> None:
        """Let these replicas serve from the next step on: those that are staged, and those held, where they lie.

        The others are freed. What is staged and not among the replicas stays so.

        Args:
            replicas: all of the layer.

        Raises:
            MissingExpert: as `check_commit`; nothing has changed.
        """
        kept, arrived = self._after(replicas)
        if arrived or kept.keys() != self._slots.keys():
            self._hold(kept | arrived)
        with self._lock:
            for expert in arrived:
                del self._staged[expert]
        self._converted = {key: packed for key, packed in self._converted.items() if key[0] in kept}

    def _own(self, replicas: Replicas) -> list[Replica]:
        return [replicas[p] for p in replicas.on_rank(self.rank)]

    def _after(self, replicas: Replicas) -> tuple[Held, Held]:
        """What this rank holds after a commit: what it keeps, and what has arrived."""
        with self._lock:
            staged = dict(self._staged)
        kept: Held = {}
        added: Held = {}
        for _, expert, name in self._own(replicas):
            arrived, resident = staged.get(expert), self._slots.get(expert)
            where = f"expert {expert} of layer {self.layer}"
            if resident is not None and resident.stack.format.name == name:
                kept[expert] = (resident.stack.format, resident.stack.expert(resident.slot))
            elif arrived is None:
                raise MissingExpert(f"{where} in {name} is to serve on rank {self.rank}, which has not received it")
            elif arrived.format.name != name:
                raise MissingExpert(
                    f"{where} is to serve in {name} on rank {self.rank}, which received {arrived.format.name}"
                )
            elif not arrived.is_verified:
                raise MissingExpert(f"{where} in {name} is to serve on rank {self.rank}, which has not verified it")
            else:
                added[expert] = (arrived.format, arrived.expert)
        return kept, added

    def _hold(self, held: Held) -> None:
        """Let these experts serve and no others. Threads that read meanwhile see the old or the new ones."""
        stacks: dict[str, Stack] = {}
        slots: dict[int, ExpertSlot] = {}
        for format_ in sorted({format_ for format_, _ in held.values()}, key=lambda format_: format_.name):
            experts = sorted(expert for expert in held if held[expert][0] is format_)
            stack = self._stack(format_, [held[expert][1] for expert in experts])
            stacks[format_.name] = stack
            slots |= {expert: ExpertSlot(stack, slot) for slot, expert in enumerate(experts)}
        self._stacks, self._slots = stacks, slots

    def _stack(self, format_: WeightFormat, experts: Sequence[PackedExpert]) -> Stack:
        """The experts of a format, where they lie or copied into one buffer."""
        if not self.is_stacked:
            return Stack(format_, self.layout, None, tuple(experts))
        with torch.inference_mode(False):  # an engine commits in it, and others write to the buffer outside of it
            stack = Stack.empty(format_, self.layout, len(experts), self._device)
        for slot, expert in enumerate(experts):
            stack.at(slot).copy_(expert.packed)
        return stack

    def borrow(self, transfers: Sequence[WeightTransfer], group: EPGroup) -> Borrowing:
        """Start this rank's part of a step's transfers; `compute` waits for them. Verifies the layer before.

        Raises:
            DamagedExpert: this layer's expert is damaged, or one that the layer before has borrowed.
            UserError: the buffers are too small for what this rank borrows.
        """
        return self.borrow_buffers.start(self.layer, self.rank, transfers, self._lend, group)

    def _lend(self, transfer: WeightTransfer) -> Tensor:
        return self.packed_as(transfer.expert, transfer.format)

    def compute(
        self, received: Received, family: ExpertFamily, borrowed: Borrowing, norms_VE: Tensor | None = None
    ) -> Tensor:
        """partial_MD [M, D] fp32: for every received row the weighted sum over this rank's replicas.

        Sums run over the resident formats, then over the borrowed experts, each in the order of the pairs. Borrowed
        experts are waited for after the resident ones are computed. They are verified by the next layer or, at the end
        of a forward pass, here. The norms of outputs are added to the sums `norms_VE`, if there are any.

        Raises:
            RankFailure: a borrowed expert did not arrive.
            DamagedExpert: one arrived damaged, and this layer is the last.
        """
        rows_MD = received.rows_MD
        partial_MD = rows_MD.new_zeros(rows_MD.shape, dtype=torch.float32)
        for grouped in _grouped(received, self._slots):
            add_outputs(partial_MD, received, grouped, family, norms_VE=norms_VE)
        borrowed.wait()
        if borrowed.slots:
            for grouped in _grouped(received, borrowed.slots):
                add_outputs(partial_MD, received, grouped, family, norms_VE=norms_VE)
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
