"""Borrowing: experts that a rank receives for one step of one layer, computes with, and verifies."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.core.plan import WeightTransfer
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.moe.grouped_gemm import Stack
from rq_ep.moe.integrity import ChecksumVerifier, DamagedExpert, checksum_verifier
from rq_ep.parallel import EPGroup, PeerTensor, Transfers


class ExpertSlot(NamedTuple):
    """Where a packed expert lies."""

    stack: Stack
    slot: int

    @property
    def packed(self) -> Tensor:
        """The expert's bytes, uint8 [nbytes]."""
        return self.stack.at(self.slot)


class Round(NamedTuple):
    """Messages of one rank that start together."""

    sends: list[PeerTensor]
    receives: list[PeerTensor]


class Borrowing:
    """One rank's part of the transfers of one layer and step, under way: `wait`, compute, `verify`."""

    def __init__(
        self,
        layer: int,
        received: Mapping[WeightTransfer, ExpertSlot],
        rounds: Sequence[Round],
        group: EPGroup,
        verifier: ChecksumVerifier,
    ) -> None:
        """Start the first round.

        Args:
            layer: that borrows, to name in messages.
            received: the transfers to this rank, and where their experts arrive.
            rounds: this rank's messages; every rank that takes part has as many rounds.
            group: the ranks.
            verifier: of the experts that arrive.
        """
        self.slots = {transfer.expert: slot for transfer, slot in received.items()}
        self._layer = layer
        self._received = received
        self._group = group
        self._verifier = verifier
        self._later_rounds = rounds[1:]
        self._transfers: Transfers | None = group.start_transfers(*rounds[0]) if rounds else None
        self._verification: Callable[[], list[bool]] | None = None

    def wait(self) -> None:
        """Return when the borrowed experts are here and those to be handed on are sent. Their verification begins.

        Raises:
            RankFailure: one did not arrive.
        """
        if self._transfers is None:
            return
        self._transfers.wait()
        for messages in self._later_rounds:  # a sender has waited for earlier rounds only: there is no deadlock
            self._transfers = self._group.start_transfers(*messages)
            self._transfers.wait()
        self._transfers = None  # now: freeing it takes Python's lock, which the verifying thread would then hold
        if self._received:
            self._verification = self._verifier.start([slot.packed for slot in self._received.values()])

    def verify(self) -> None:
        """Return when the borrowed experts are known to be intact.

        Raises:
            DamagedExpert: one is not.
        """
        assert self._transfers is None, "borrowed experts were never computed with"
        if self._verification is None:
            return
        is_intact, self._verification = self._verification(), None
        for transfer, intact in zip(self._received, is_intact, strict=True):
            if not intact:
                raise DamagedExpert(
                    f"expert {transfer.expert} of layer {self._layer} from rank {transfer.src} arrived damaged"
                )


class BorrowBuffers:
    """Slots for borrowed experts, for the layers of a rank that compute one after another.

    Borrowed experts are verified beside the compute, and no layer waits for its own but the last one of a forward pass:
    `start` verifies what the layer before has borrowed, and every layer calls it in every step to get the `Borrowing`
    that it computes with. Layers compute in the order of their indices in the model, so that the last one is known as
    soon as all have joined; a layer with buffers of its own is the last one. What a pass that was cut short has
    borrowed is verified when the next one begins.
    """

    def __init__(self, layout: ExpertLayout, device: torch.device | str, max_bytes: int | None = None) -> None:
        """Slots are allocated when they are needed and then kept.

        Args:
            layout: tensors of one expert.
            device: where they lie.
            max_bytes: of all slots together; default: without a bound.
        """
        self.layout = layout
        self.device = torch.device(device)
        self.max_bytes = max_bytes
        self._stacks: dict[str, Stack] = {}
        self._verifier = checksum_verifier(self.device)
        self._last_layer = -1
        self._last: Borrowing | None = None

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self._stacks.values())

    def join(self, layer: int) -> None:
        """Add a layer that shares the slots, by its index in the model."""
        self._last_layer = max(self._last_layer, layer)

    def discard(self) -> None:
        """Forget what a step that was cut off has borrowed."""
        self._last = None

    def is_last(self, layer: int) -> bool:
        """Whether a layer is the last of a forward pass, and so verifies itself what it has borrowed."""
        return layer == self._last_layer

    def start(
        self,
        layer: int,
        rank: int,
        transfers: Sequence[WeightTransfer],
        lend: Callable[[WeightTransfer], Tensor],
        group: EPGroup,
    ) -> Borrowing:
        """Verify the layer before, and start this rank's part of a step's transfers.

        Args:
            layer: that borrows, by its index in the model.
            rank: this one.
            transfers: of all ranks.
            lend: the packed expert that this rank sends.
            group: the ranks.

        Raises:
            DamagedExpert: the layer before has borrowed a damaged expert.
            UserError: `max_bytes` is too small for what this rank borrows.
        """
        last, self._last = self._last, None
        if last is not None:
            last.verify()
        if not transfers:
            return Borrowing(layer, {}, (), group, self._verifier)
        incoming = sorted(transfer for transfer in transfers if transfer.dst == rank)
        received = dict(zip(incoming, self.take([transfer.format for transfer in incoming]), strict=True))
        slots = {transfer.expert: slot for transfer, slot in received.items()}
        rounds = {number: Round([], []) for number in sorted({transfer.round for transfer in transfers})}
        for transfer in sorted(transfers):  # both ends name the messages between them in the same order
            sends, receives = rounds[transfer.round]
            if transfer.dst == rank:
                receives.append((slots[transfer.expert].packed, transfer.src))
            elif transfer.src == rank:
                is_handed_on = transfer.expert in slots  # it lies here when its round begins
                packed = slots[transfer.expert].packed if is_handed_on else lend(transfer)
                sends.append((packed, transfer.dst))
        self._last = Borrowing(layer, received, list(rounds.values()), group, self._verifier)
        return self._last

    def take(self, formats: Sequence[str]) -> list[ExpertSlot]:
        """A slot for an expert in each of `formats`; earlier contents are given up.

        Raises:
            UserError: together they take more than `max_bytes`.
        """
        slots = [(name, formats[:n].count(name)) for n, name in enumerate(formats)]
        if not all(name in self._stacks and slot < len(self._stacks[name]) for name, slot in slots):
            self._allocate(Counter(formats))
        return [ExpertSlot(self._stacks[name], slot) for name, slot in slots]

    def _allocate(self, needed: Counter[str]) -> None:
        """Have at least the needed slots of each format, and those there are, if all of them fit."""
        needed_bytes = self._nbytes_of(needed)
        if self.max_bytes is not None and needed_bytes > self.max_bytes:
            raise UserError(
                f"borrowing {needed.total()} experts takes {needed_bytes} bytes, but only {self.max_bytes} are set "
                "aside: allow more, or let the strategy move fewer experts"
            )
        present = Counter({name: len(stack) for name, stack in self._stacks.items()})
        slots = present | needed
        if self.max_bytes is not None and self._nbytes_of(slots) > self.max_bytes:
            slots = needed
        self._stacks = {name: stack for name, stack in self._stacks.items() if slots[name] == present[name]}
        for name in slots.keys() - self._stacks.keys():
            self._stacks[name] = Stack.empty(get_format(name), self.layout, slots[name], self.device)

    def _nbytes_of(self, slots: Counter[str]) -> int:
        return sum(get_format(name).nbytes(self.layout) * number for name, number in slots.items())
