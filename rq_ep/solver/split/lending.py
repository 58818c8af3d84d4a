"""Lending for one step (as in LLEP): the emptiest ranks borrow experts, so that overloaded ranks can pass pairs on.

Axes: C resident replicas sorted by expert; B these and the borrowed ones, sorted by expert; J loans.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.solver.compiled import compiled, compiled_part
from rq_ep.solver.split.min_max_split import ByExpert, augment

MIN_GAIN = 0.01  # of a balanced step's modelled time, for which more experts are lent; models are no more exact


class Loans(NamedTuple):
    """The experts to lend, and the pairs that each rank then computes."""

    transfers: tuple[WeightTransfer, ...]
    replicas: Replicas  # with the borrowed ones
    quotas_ER: IntArray  # [E, R] pairs of each expert on each rank


class LendingTables(NamedTuple):
    """A layer's replicas, and what pairs and transfers cost, for compiled code.

    With a cost, seconds are modelled; without one, a pair takes one second and a transfer none.
    """

    first_E: IntArray  # [E + 1] index into C of each expert's first replica
    ranks_C: IntArray
    transfer_s_C: FloatArray  # seconds that the replica travels in the format it is stored in
    is_low_C: BoolArray  # whether that is the transient format
    num_ranks: int
    max_borrowed: int  # experts that a rank makes room for
    min_pairs: int  # that a loan must be able to take off the fullest ranks
    min_gain: float  # of a balanced step's time, that more loans must save
    pair_s: float  # that a pair less on the fullest rank saves: its arithmetic, and its row's way there and back
    latency_s: float  # of a round of transfers
    low_s: float  # seconds that an expert travels in the transient format


@dataclass(frozen=True)
class Lending:
    """The choice of what to lend in a step of one layer.

    With a cost, a loan must shorten the modelled step; without one, thresholds decide.
    """

    replicas: Replicas
    by_expert: ByExpert
    tables: LendingTables
    cost: LayerCost | None
    transient_format: str | None
    max_low_precision_share: float  # of the step's pairs, computed in `transient_format`
    least_pair_s: float  # arithmetic of a pair in the fastest format
    min_ratio: float  # max/mean below which nothing is lent
    mixed_formats: tuple[str, ...]  # of plans with borrowed experts

    @classmethod
    def of(
        cls,
        replicas: Replicas,
        num_ranks: int,
        cost: LayerCost | None,
        *,
        max_borrowed: int,
        transient_format: str | None,
        max_low_precision_share: float,
        min_pairs: int,
        min_ratio: float,
    ) -> "Lending":
        """Prepare a layer; the thresholds `min_pairs` and `min_ratio` hold only where there is no cost."""
        (stored, number_P), low = replicas.stored_formats, transient_format
        mixed_formats = replicas.mixed_formats
        if low is not None and low not in mixed_formats:
            mixed_formats = (low, *(mixed_formats or (name for name in stored if name != low)))
        by_expert = ByExpert.of(replicas, num_ranks)
        number_C = number_P[by_expert.replicas_C]
        transfer_s = np.array([0.0 if cost is None else cost.transfer_s[name] for name in stored])
        pair_s = least_pair_s = 1.0
        if cost is not None:
            least_pair_s = min(cost.pair_s[name] for name in stored)
            pair_s = max(cost.pair_s[name] for name in stored) + 2 * cost.row_s * (num_ranks - 1) / num_ranks
        tables = LendingTables(
            first_E=by_expert.first_E,
            ranks_C=by_expert.ranks_C,
            transfer_s_C=transfer_s[number_C],
            is_low_C=np.array([name == low for name in stored])[number_C],
            num_ranks=num_ranks,
            max_borrowed=max_borrowed,
            min_pairs=max(1, min_pairs if cost is None else 1),
            min_gain=0.0 if cost is None else MIN_GAIN,
            pair_s=float(pair_s),
            latency_s=0.0 if cost is None else float(cost.latency_s),
            low_s=0.0 if cost is None or low is None else float(cost.transfer_s[low]),
        )
        return cls(
            replicas=replicas,
            by_expert=by_expert,
            tables=tables,
            cost=cost,
            transient_format=low,
            max_low_precision_share=float(max_low_precision_share),
            least_pair_s=least_pair_s,
            min_ratio=min_ratio if cost is None else 1.0,
            mixed_formats=mixed_formats,
        )

    def may_pay(self, loads_R: IntArray) -> bool:
        """Whether perfect balance by a single transfer would be worth it; if not, no loan is."""
        fullest, total = int(loads_R.max()), int(loads_R.sum())
        excess = fullest - -(-total // len(loads_R))
        transfer_s = float(self.tables.transfer_s_C.min())
        if self.transient_format is not None:
            transfer_s = min(transfer_s, self.tables.low_s)
        return (
            excess >= self.tables.min_pairs
            and fullest * len(loads_R) >= self.min_ratio * total
            and excess * self.tables.pair_s > transfer_s + self.tables.latency_s
        )

    def is_shorter(self, after: DispatchPlan, before: DispatchPlan) -> bool:
        """Whether the modelled step with loans is the shorter one; without a cost it is taken to be."""
        if self.cost is None:
            return True
        after_s = self.cost.step(after).layer_s
        # Mostly, what the fullest rank computes and receives decides without pricing all of the other plan.
        rank = int(before.loads_R.argmax())
        pairs, own = int(before.loads_R[rank]), int(before.pairs_RR[rank, rank])
        at_least_s = pairs * self.least_pair_s + 2 * ((pairs - own) * self.cost.row_s + self.tables.latency_s)
        return after_s < at_least_s or after_s < self.cost.step(before).layer_s

    def choose(self, before: DispatchPlan) -> Loans | None:
        """The experts to lend and the pairs of every rank then; None if lending saves nothing."""
        quotas_C = before.pairs_RP.sum(axis=0)[self.by_expert.replicas_C]
        best = lend(self.tables, quotas_C, -1.0 if self.transient_format is None else self.max_low_precision_share)
        if best.is_capped:
            best = min(best, lend(self.tables, quotas_C, -1.0), key=lambda loans: loans.step_s)
        by_expert, transfers, borrowed = self.by_expert, [], []
        loans = zip(best.lent_J.tolist(), best.borrowers_J.tolist(), best.is_low_J.tolist(), strict=True)
        for lent, borrower, is_low in loans:
            expert, lender = int(by_expert.experts_C[lent]), int(by_expert.ranks_C[lent])
            if best.quotas_ER[expert, borrower]:
                name = self.replicas.formats_P[by_expert.replicas_C[lent]]
                if is_low and self.transient_format is not None:
                    name = self.transient_format
                transfers.append(WeightTransfer(expert, lender, borrower, name))
                borrowed.append(Replica(borrower, expert, name))
        if not transfers:
            return None
        together, _ = self.replicas.joined(borrowed, self.mixed_formats)
        return Loans(tuple(sorted(transfers)), together, best.quotas_ER)


class ShortestStep(NamedTuple):
    """The loans of the shortest step that was met."""

    step_s: float  # as estimated: the fullest rank and the busiest link
    is_capped: bool  # the cap on low precision stopped further loans
    lent_J: IntArray  # index into C of the replica that is sent
    borrowers_J: IntArray
    is_low_J: BoolArray  # sent in the transient format
    quotas_ER: IntArray


class _Replicas(NamedTuple):
    """The replicas with the borrowed ones, which stand behind the others of their expert; room for more of them."""

    first_E: IntArray
    ranks_B: IntArray
    quotas_B: IntArray
    is_low_B: BoolArray
    resident_B: IntArray  # index into C; of a borrowed one -1


class _Links(NamedTuple):
    """What ranks send and receive."""

    sent_s_R: FloatArray
    received_s_R: FloatArray
    num_borrowed_R: IntArray


@compiled
def lend(tables: LendingTables, quotas_C: IntArray, max_low_share: float) -> ShortestStep:
    """Lend one expert after another while that may shorten the step, and return the shortest step (greedy).

    The emptiest rank borrows the expert that is worth most to it: seconds of the pairs it takes off the cut, the ranks
    which bound the fullest one, less what the transfer adds to the busiest link. After each loan augmenting paths carry
    pairs to where there is room now.

    Args:
        tables: the layer.
        quotas_C: [C] pairs of each resident replica under the best split without loans.
        max_low_share: of the pairs, computed in the transient format; negative: nothing is lent in it.
    """
    num_ranks, pair_s = tables.num_ranks, tables.pair_s
    max_loans = num_ranks * min(tables.max_borrowed, len(tables.first_E) - 1)
    replicas, num_replicas = _with_room(tables, quotas_C, max_loans), len(tables.ranks_C)
    links = _Links(np.zeros(num_ranks), np.zeros(num_ranks), np.zeros(num_ranks, np.int64))
    links_s = 0.0  # of the busiest link, all rounds of transfers together
    lent_J, borrowers_J = np.zeros(max_loans, np.int64), np.zeros(max_loans, np.int64)
    is_low_J = np.zeros(max_loans, np.bool_)

    loads_R, cut_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.bool_)
    total = 0
    for c in range(num_replicas):
        loads_R[tables.ranks_C[c]] += quotas_C[c]
        total += quotas_C[c]
    mean = -(-total // num_ranks)
    low_pairs = _low_pairs(replicas, num_replicas)
    max_low_pairs = max(max_low_share * total, low_pairs)
    best_s, num_best, num_loans, is_capped = _largest(loads_R) * pair_s, 0, 0, False
    best_ER = np.zeros((len(tables.first_E) - 1, num_ranks), np.int64)
    _write_quotas(replicas, best_ER)
    fullest = _augment(replicas, num_replicas, loads_R, mean, cut_R)
    while fullest > mean and num_loans < max_loans:
        borrower = _emptiest(loads_R, links.num_borrowed_R, tables.max_borrowed)
        room = mean - loads_R[borrower]
        expert, lent, pairs = _best_loan(tables, replicas, links, links_s, cut_R, borrower, room)
        if expert < 0:
            break
        becomes_low = max_low_share >= 0 and low_pairs + pairs <= max_low_pairs
        seconds = tables.low_s if becomes_low else tables.transfer_s_C[replicas.resident_B[lent]]
        links.sent_s_R[replicas.ranks_B[lent]] += seconds
        links.received_s_R[borrower] += seconds
        links.num_borrowed_R[borrower] += 1
        links_s = max(_largest(links.sent_s_R), _largest(links.received_s_R))
        transfers_s = links_s + tables.latency_s
        goal_s = best_s - tables.min_gain * mean * pair_s
        if transfers_s > 0 and mean * pair_s + transfers_s >= goal_s:
            break
        lent_J[num_loans], borrowers_J[num_loans] = replicas.resident_B[lent], borrower
        is_low_J[num_loans] = becomes_low
        num_loans += 1
        _insert(replicas, num_replicas, expert, borrower, becomes_low or replicas.is_low_B[lent])
        num_replicas += 1
        fullest = _augment(replicas, num_replicas, loads_R, mean, cut_R)
        low_pairs = _low_pairs(replicas, num_replicas)
        if max_low_share >= 0 and low_pairs > max_low_pairs:
            is_capped = True
            break
        if fullest * pair_s + transfers_s < goal_s:
            best_s, num_best = fullest * pair_s + transfers_s, num_loans
            _write_quotas(replicas, best_ER)
    return ShortestStep(best_s, is_capped, lent_J[:num_best], borrowers_J[:num_best], is_low_J[:num_best], best_ER)


@compiled_part
def _with_room(tables: LendingTables, quotas_C: IntArray, max_loans: int) -> _Replicas:
    """The resident replicas in arrays with room for `max_loans` more."""
    num_resident = len(tables.ranks_C)
    replicas = _Replicas(
        tables.first_E.copy(),
        np.zeros(num_resident + max_loans, np.int64),
        np.zeros(num_resident + max_loans, np.int64),
        np.zeros(num_resident + max_loans, np.bool_),
        np.zeros(num_resident + max_loans, np.int64),
    )
    for c in range(num_resident):
        replicas.ranks_B[c], replicas.quotas_B[c] = tables.ranks_C[c], quotas_C[c]
        replicas.is_low_B[c], replicas.resident_B[c] = tables.is_low_C[c], c
    return replicas


@compiled_part
def _largest(values_R: IntArray | FloatArray) -> float:
    largest: float = values_R[0]
    for value in values_R:
        largest = max(largest, value)
    return largest


@compiled_part
def _insert(replicas: _Replicas, num_replicas: int, expert: int, rank: int, is_low: bool) -> None:
    """Add a borrowed replica without pairs behind the others of its expert."""
    first_E, ranks_B, quotas_B, is_low_B, resident_B = replicas
    end = first_E[expert + 1]
    for b in range(num_replicas, end, -1):
        ranks_B[b], quotas_B[b] = ranks_B[b - 1], quotas_B[b - 1]
        is_low_B[b], resident_B[b] = is_low_B[b - 1], resident_B[b - 1]
    ranks_B[end], quotas_B[end], is_low_B[end], resident_B[end] = rank, 0, is_low, -1
    for behind in range(expert + 1, len(first_E)):
        first_E[behind] += 1


@compiled_part
def _augment(replicas: _Replicas, num_replicas: int, loads_R: IntArray, mean: int, cut_R: BoolArray) -> int:
    """Make the split optimal; write the cut that proves it, and return the pairs of the fullest rank."""
    ranks_B, quotas_B = replicas.ranks_B[:num_replicas], replicas.quotas_B[:num_replicas]
    return augment(replicas.first_E, ranks_B, quotas_B, loads_R, mean, cut_R)


@compiled_part
def _emptiest(loads_R: IntArray, num_borrowed_R: IntArray, max_borrowed: int) -> int:
    """The first rank of fewest pairs among those that may still borrow."""
    emptiest = -1
    for rank in range(len(loads_R)):
        if num_borrowed_R[rank] < max_borrowed and (emptiest < 0 or loads_R[rank] < loads_R[emptiest]):
            emptiest = rank
    return emptiest


@compiled_part
def _best_loan(
    tables: LendingTables,
    replicas: _Replicas,
    links: _Links,
    links_s: float,
    cut_R: BoolArray,
    borrower: int,
    room: int,
) -> tuple[int, int, int]:
    """The loan that is worth most: an expert, its resident replica on the rank that has sent least, and pairs it takes.

    Of experts that are worth the same, the one of most pairs on the cut; the expert is -1 if there is no loan.
    """
    first_E, ranks_B, quotas_B, _, resident_B = replicas
    sent_s_R, received_s = links.sent_s_R, links.received_s_R[borrower]
    best, best_lent, most_pairs, most_s = -1, -1, 0, 0.0
    for expert in range(len(first_E) - 1):
        pairs, lent = 0, -1
        for b in range(first_E[expert], first_E[expert + 1]):
            rank = ranks_B[b]
            if rank == borrower:
                pairs = 0
                break
            if cut_R[rank]:
                pairs += quotas_B[b]
            if resident_B[b] >= 0 and (lent < 0 or sent_s_R[rank] < sent_s_R[ranks_B[lent]]):
                lent = b
        if min(pairs, room) < tables.min_pairs:
            continue
        link_s = max(sent_s_R[ranks_B[lent]], received_s) + tables.transfer_s_C[resident_B[lent]]
        worth_s = min(pairs, room) * tables.pair_s - max(link_s - links_s, 0.0)
        if best < 0 or worth_s > most_s or (worth_s == most_s and pairs > most_pairs):
            best, best_lent, most_pairs, most_s = expert, lent, pairs, worth_s
    return best, best_lent, min(most_pairs, room)


@compiled_part
def _low_pairs(replicas: _Replicas, num_replicas: int) -> int:
    """Pairs computed in the transient format."""
    quotas_B, is_low_B, pairs = replicas.quotas_B, replicas.is_low_B, 0
    for b in range(num_replicas):
        if is_low_B[b]:
            pairs += quotas_B[b]
    return pairs


@compiled_part
def _write_quotas(replicas: _Replicas, quotas_ER: IntArray) -> None:
    """Write pairs of each expert on each rank."""
    first_E, ranks_B, quotas_B, _, _ = replicas
    for expert in range(len(first_E) - 1):
        for rank in range(quotas_ER.shape[1]):
            quotas_ER[expert, rank] = 0
        for b in range(first_E[expert], first_E[expert + 1]):
            quotas_ER[expert, ranks_B[b]] = quotas_B[b]
