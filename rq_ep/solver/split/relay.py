"""Broadcast of experts that several ranks borrow: ranks that have received one pass it on (binomial trees)."""

from collections import Counter
from collections.abc import Sequence

from rq_ep.core.plan import WeightTransfer

MIN_COPIES = 3  # of an expert from one rank; two copies take two rounds either way


def may_relay(transfers: Sequence[WeightTransfer]) -> bool:
    """Whether some rank sends an expert so often that a broadcast tree can take less time."""
    copies = Counter((transfer.expert, transfer.format, transfer.src) for transfer in transfers)
    return max(copies.values(), default=0) >= MIN_COPIES


def relay(transfers: Sequence[WeightTransfer]) -> tuple[WeightTransfer, ...]:
    """The same loans in rounds, in each of which a rank sends at most one expert and receives at most one.

    Every rank that holds an expert when a round begins sends it to a rank that still waits for it; experts for which
    most ranks wait come first. n copies take 1 + log2(n) rounds, rounded down, instead of n, unless two experts need
    the same link.
    """
    holders: dict[tuple[int, str], list[int]] = {}
    waiting: dict[tuple[int, str], list[int]] = {}
    for transfer in sorted(transfers):
        key = (transfer.expert, transfer.format)
        waiting.setdefault(key, []).append(transfer.dst)
        if transfer.src not in holders.setdefault(key, []):
            holders[key].append(transfer.src)
    relayed: list[WeightTransfer] = []
    round_index = 0
    while waiting:
        senders: set[int] = set()
        receivers: set[int] = set()
        for key in sorted(waiting, key=lambda key: -len(waiting[key])):
            served = []
            for src in holders[key]:
                dst = next((rank for rank in waiting[key] if rank not in receivers), None)
                if dst is None:
                    break
                if src not in senders:
                    relayed.append(WeightTransfer(key[0], src, dst, key[1], round_index))
                    waiting[key].remove(dst)
                    senders.add(src)
                    receivers.add(dst)
                    served.append(dst)
            holders[key] += served
        waiting = {key: ranks for key, ranks in waiting.items() if ranks}
        round_index += 1
    return tuple(sorted(relayed))
