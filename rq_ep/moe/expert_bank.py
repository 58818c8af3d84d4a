"""The experts a rank holds in one layer, and the ones it borrows for a step."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.core.plan import WeightTransfer
from rq_ep.core.replicas import Replicas
from rq_ep.formats import ExpertLayout, WeightFormat, get_format, is_intact
from rq_ep.moe.expert_compute import Share, add_outputs
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.grouped_gemm import Stack
from rq_ep.parallel import EPGroup, Piece, Received, Transfers

MAX_REPACKED = 4  # experts of a layer that a rank keeps in a second format, once it has lent them in it


class DamagedExpert(RuntimeError):
    """The bytes of an expert are not those it was sealed with; the message names it."""


class Home(NamedTuple):
    """Where an expert lies."""

    stack: Stack
    slot: int

    @property
    def packed(self) -> Tensor:
        """The expert's bytes, uint8 [nbytes]."""
        return self.stack.packed[self.slot]


class Verdict(NamedTuple):
    """Whether borrowed experts are intact."""

    wait: Callable[[], list[bool]]  # returns when it is known
    names: Iterable[str]  # looked at when it is known


Messages = tuple[list[Piece], list[Piece]]  # that a rank sends, and that it receives


class Arriving(NamedTuple):
    """Borrowed experts on their way."""

    group: EPGroup
    handle: Transfers  # of the first round
    later: list[Messages]  # of the other rounds
    wanted: list[WeightTransfer]  # that come to this rank


class _ThreadChecker:
    """Compares experts with their checksums on a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksums")  # starts with the first expert

    def start(self, packed: Sequence[Tensor]) -> Callable[[], list[bool]]:
        return self._thread.submit(lambda: [bool(is_intact(expert)) for expert in packed]).result


class _StreamChecker:
    """Compares experts with their checksums on a stream of its own; the host waits for that stream alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, packed: Sequence[Tensor]) -> Callable[[], list[bool]]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # on which they have arrived
        with torch.cuda.stream(self._stream):
            found_N = torch.stack([is_intact(expert) for expert in packed])
            is_intact_N = torch.empty(len(packed), dtype=torch.bool, pin_memory=True).copy_(found_N, non_blocking=True)
            is_known = torch.cuda.Event()  # type: ignore[no-untyped-call]
            is_known.record()

        def wait() -> list[bool]:
            is_known.synchronize()
            found: list[bool] = is_intact_N.tolist()
            return found

        return wait


class SpareRoom:
    """Slots for borrowed experts. Layers that compute one after another can share it; it grows to what is needed.

    Borrowed experts are verified beside what is computed with them, on a thread of its own or a GPU's own stream.
    Whoever shares the room asks for the verdict before anything leaves this rank that came of them.
    """

    def __init__(self, layout: ExpertLayout, device: torch.device | str, max_bytes: int | None = None) -> None:
        self.layout = layout
        self.device = torch.device(device)
        self.max_bytes = max_bytes
        self._stacks: dict[str, Stack] = {}
        self._checker = _StreamChecker(self.device) if self.device.type == "cuda" else _ThreadChecker()
        self._verdict: Verdict | None = None

    @property
    def nbytes(self) -> int:
        return sum(stack.packed.nbytes for stack in self._stacks.values())

    def verify(self, homes: Sequence[Home], names: Iterable[str]) -> None:
        """Start to compare experts that have arrived with their checksums; `settle` tells how it ended.

        Args:
            homes: where they lie.
            names: what to call each in a message, looked at by `settle`.
        """
        self._verdict = Verdict(self._checker.start([home.packed for home in homes]), names)

    def settle(self) -> None:
        """Return when everything that `verify` was given is known to be intact.

        Raises:
            DamagedExpert: something is not.
        """
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        for name, whole in zip(verdict.names, verdict.wait(), strict=True):
            if not whole:
                raise DamagedExpert(f"{name} arrived damaged")

    def take(self, formats: Sequence[str]) -> list[Home]:
        """A slot for an expert in each of `formats`; what was there before is given up.

        Raises:
            UserError: together they take more than `max_bytes`.
            DamagedExpert: one that was there before is.
        """
        self.settle()
        places = [(name, formats[:n].count(name)) for n, name in enumerate(formats)]
        if not all(name in self._stacks and slot < len(self._stacks[name].packed) for name, slot in places):
            self._make_room(Counter(formats))
        return [Home(self._stacks[name], slot) for name, slot in places]

    def _make_room(self, wanted: Counter[str]) -> None:
        """Have at least so many slots of each format, and those there are, if all of them fit."""
        wanted_bytes = self._nbytes_of(wanted)
        if self.max_bytes is not None and wanted_bytes > self.max_bytes:
            raise UserError(
                f"borrowing {wanted.total()} experts takes {wanted_bytes} bytes, but only {self.max_bytes} are set "
                "aside: allow more, or let the strategy move fewer experts"
            )
        present = Counter({name: len(stack.packed) for name, stack in self._stacks.items()})
        slots = present | wanted
        if self.max_bytes is not None and self._nbytes_of(slots) > self.max_bytes:
            slots = wanted
        self._stacks = {name: stack for name, stack in self._stacks.items() if slots[name] == present[name]}
        for name in slots.keys() - self._stacks.keys():
            self._stacks[name] = Stack.empty(get_format(name), self.layout, slots[name], self.device)

    def _nbytes_of(self, slots: Counter[str]) -> int:
        return sum(get_format(name).nbytes(self.layout) * number for name, number in slots.items())


class ExpertBank:
    """One stack of packed experts for each format a rank holds; borrowed experts lie in spare room."""

    def __init__(
        self,
        layout: ExpertLayout,
        replicas: Replicas,
        rank: int,
        device: torch.device | str = "cpu",
        spare: SpareRoom | None = None,
        layer: int = 0,
    ) -> None:
        """Reserve room for this rank's replicas of one layer; `put` fills it.

        Args:
            layout: tensors of one expert.
            replicas: all resident replicas of the layer.
            rank: whose replicas this bank holds.
            device: where they lie.
            spare: room for borrowed experts; default: this bank's own, without a bound.
            layer: number to name in messages.
        """
        self.layer = layer
        self.layout = layout
        self.rank = rank
        self.spare = SpareRoom(layout, device) if spare is None else spare
        held = [replicas[p] for p in replicas.on_rank(rank)]
        self._stacks: dict[str, Stack] = {}
        self._homes: dict[int, Home] = {}
        for name in sorted({replica.format for replica in held}):
            experts = [replica.expert for replica in held if replica.format == name]
            stack = Stack.empty(get_format(name), layout, len(experts), torch.device(device))
            self._stacks[name] = stack
            self._homes |= {expert: Home(stack, slot) for slot, expert in enumerate(experts)}
        self._borrowed: dict[int, Home] = {}
        self._repacked: dict[tuple[int, str], Tensor] = {}  # the one used last comes last
        self._arriving: Arriving | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the resident experts."""
        return sum(stack.packed.nbytes for stack in self._stacks.values())

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts this rank holds, ascending."""
        return tuple(sorted(self._homes))

    def packed(self, expert: int) -> Tensor:
        """The bytes of a resident expert, uint8 [nbytes]."""
        return self._homes[expert].packed

    def format_of(self, expert: int) -> WeightFormat:
        """The format that a resident expert is stored in."""
        return self._homes[expert].stack.format

    def put(self, expert: int, weights: Mapping[str, Tensor]) -> None:
        """Pack an expert into the format its replica on this rank has.

        Args:
            expert: one of `experts`.
            weights: its tensors, named and shaped as in the layout.
        """
        self.packed(expert).copy_(self._homes[expert].stack.format.pack(weights, self.layout))
        self._repacked.clear()

    def put_packed(self, expert: int, packed: Tensor) -> None:
        """Take over an expert that is packed already, uint8 [nbytes].

        Raises:
            UserError: it has another size than its format takes, or does not match its checksum.
        """
        slot = self.packed(expert)
        if packed.shape != slot.shape or packed.dtype != torch.uint8:
            found = f"{packed.dtype} {list(packed.shape)}"
            raise UserError(
                f"packed expert {expert} is {found}, not uint8 {list(slot.shape)}: quantize the model again"
            )
        if not is_intact(packed):
            raise UserError(f"packed expert {expert} does not match its checksum: quantize the model again")
        slot.copy_(packed)
        self._repacked.clear()

    def packed_as(self, expert: int, name: str) -> Tensor:
        """The bytes of a resident expert in format `name`: as it lies, or packed anew, once, and kept for a while.

        Raises:
            DamagedExpert: the expert to be packed anew does not match its checksum any more.
        """
        stack, slot = self._homes[expert]
        if stack.format.name == name:
            return stack.packed[slot]
        key = (expert, name)
        packed = self._repacked.pop(key, None)
        if packed is None:
            if not is_intact(stack.packed[slot]):  # a new seal would hide it
                raise DamagedExpert(f"expert {expert} of layer {self.layer} on rank {self.rank} is damaged")
            views, format_ = stack.experts[slot], stack.format
            weights = {
                tensor: format_.dequantize(views, tensor, self.layout, torch.float32) for tensor in self.layout.shapes
            }
            packed = get_format(name).pack(weights, self.layout)
            if len(self._repacked) == MAX_REPACKED:
                del self._repacked[next(iter(self._repacked))]
        self._repacked[key] = packed
        return packed

    def borrow(self, transfers: Sequence[WeightTransfer], group: EPGroup) -> None:
        """Start this rank's part of a step's transfers; `compute` waits for them, and hands on what others wait for.

        Raises:
            UserError: the spare room is too small for what this rank borrows.
        """
        assert self._arriving is None, "the last step's borrowed experts were never computed"
        self._borrowed = {}
        if not transfers:
            return
        wanted = sorted(transfer for transfer in transfers if transfer.dst == self.rank)
        homes = self.spare.take([transfer.format for transfer in wanted])
        self._borrowed = {transfer.expert: home for transfer, home in zip(wanted, homes, strict=True)}
        rounds: dict[int, Messages] = {number: ([], []) for number in sorted({each.round for each in transfers})}
        for transfer in sorted(transfers):  # both ends name the messages between them in the same order
            sends, receives = rounds[transfer.round]
            if transfer.dst == self.rank:
                receives.append((self._borrowed[transfer.expert].packed, transfer.src))
            elif transfer.src == self.rank:
                sends.append((self._lent(transfer), transfer.dst))
        first, *later = rounds.values()
        self._arriving = Arriving(group, group.start_transfers(*first), later, wanted)

    def _lent(self, transfer: WeightTransfer) -> Tensor:
        """The bytes to send: of an expert that lies here, or that will when it is handed on."""
        if transfer.expert in self._borrowed:
            return self._borrowed[transfer.expert].packed
        return self.packed_as(transfer.expert, transfer.format)

    def compute(self, received: Received, family: ExpertFamily) -> Tensor:
        """partial_MD [M, D] fp32: for every received row the weighted sum over this rank's replicas.

        Sums run over the resident formats, then over the borrowed experts, each in the order of the pairs. Borrowed
        experts are waited for after the resident ones are computed. Whether they are as they were sent is known when
        the spare room's `settle` has returned.

        Raises:
            RankFailure: a borrowed expert did not arrive.
        """
        rows_MD = received.rows_MD
        partial_MD = rows_MD.new_zeros(rows_MD.shape, dtype=torch.float32)
        for share in self._shares(received, self._homes):
            add_outputs(partial_MD, received, share, family)
        if self._arriving is not None:
            self.await_borrowed()
        for share in self._shares(received, self._borrowed):
            add_outputs(partial_MD, received, share, family)
        return partial_MD

    def _shares(self, received: Received, homes: Mapping[int, Home]) -> list[Share]:
        """The local replicas that have pairs and whose experts are at home in `homes`, format by format."""
        by_format: dict[str, Share] = {}
        for replica, expert in enumerate(received.experts):
            if expert in homes and received.offsets[replica] < received.offsets[replica + 1]:
                stack, slot = homes[expert]
                share = by_format.setdefault(stack.format.name, Share(stack, [], []))
                share.slots.append(slot)
                share.replicas.append(replica)
        return [by_format[name] for name in sorted(by_format)]

    def await_borrowed(self) -> None:
        """Return when this step's borrowed experts are here; they are verified from then on.

        Raises:
            RankFailure: one did not arrive.
        """
        assert self._arriving is not None
        (group, handle, later, wanted), self._arriving = self._arriving, None
        handle.wait()
        for sends, receives in later:  # who sends has waited for earlier rounds only: nobody waits in a circle
            handle = group.start_transfers(sends, receives)
            handle.wait()
        del handle  # now: it lets go of Python's lock, which the thread that verifies would then hold
        if wanted:
            homes = [self._borrowed[transfer.expert] for transfer in wanted]
            whence = (f"expert {item.expert} of layer {self.layer} from rank {item.src}" for item in wanted)
            self.spare.verify(homes, whence)
