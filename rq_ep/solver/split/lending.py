"""What to lend for one step: experts for the emptiest ranks, so that overloaded ones can pass pairs on.

Letters as in `rq_ep.solver.split.min_max_split`: C replicas sorted by expert. N loans.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.solver.compiled import compiled
from rq_ep.solver.split.min_max_split import ByExpert, augment

MIN_GAIN = 0.01  # of a balanced step's modelled time, for which more experts are lent; models are no more exact


class Loans(NamedTuple):
    """Experts to lend, and who computes how much then."""

    transfers: tuple[WeightTransfer, ...]
    replicas: Replicas  # with the borrowed ones
    quotas_ER: IntArray  # [E, R] pairs of each expert on each rank


@dataclass(frozen=True)
class Lending:
    """The tables of one layer, and the choice of what to lend in a step.

    With a cost seconds are modelled; without one a pair takes one second, a transfer none, and thresholds decide.
    """

    replicas: Replicas
    by_expert: ByExpert
    cost: LayerCost | None
    max_borrowed: int  # experts that a rank makes room for
    transient_format: str | None
    max_low_precision_share: float  # of the step's pairs, computed in `transient_format`
    pair_s: float  # that a pair less on the fullest rank saves: its arithmetic and its row's way there and back
    least_pair_s: float  # arithmetic of a pair in the fastest format
    transfer_s_C: FloatArray  # of an expert as it lies
    is_low_C: BoolArray  # whether it lies in the transient format
    low_s: float  # of an expert in the transient format
    latency_s: float
    min_pairs: int  # that an expert must be able to take off the fullest ranks
    min_ratio: float
    min_gain: float  # of a balanced step's time, that more loans must save
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
        """The tables of a layer; `min_pairs` and `min_ratio` are thresholds for want of a cost."""
        (stored, number_P), low = replicas.stored_formats, transient_format
        mixed_formats = replicas.mixed_formats
        if low is not None and low not in mixed_formats:
            mixed_formats = (low, *(mixed_formats or (name for name in stored if name != low)))
        by_expert = ByExpert.of(replicas, num_ranks)
        transfer_s_P = np.array([0.0 if cost is None else cost.transfer_s[name] for name in stored])[number_P]
        pair_s = least_pair_s = 1.0
        if cost is not None:
            least_pair_s = min(cost.pair_s[name] for name in stored)
            pair_s = max(cost.pair_s[name] for name in stored) + 2 * cost.row_s * (num_ranks - 1) / num_ranks
        return cls(
            replicas=replicas,
            by_expert=by_expert,
            cost=cost,
            max_borrowed=max_borrowed,
            transient_format=low,
            max_low_precision_share=float(max_low_precision_share),
            pair_s=float(pair_s),
            least_pair_s=least_pair_s,
            transfer_s_C=transfer_s_P[by_expert.replicas_C],
            is_low_C=np.array([name == low for name in stored])[number_P[by_expert.replicas_C]],
            low_s=0.0 if cost is None or low is None else float(cost.transfer_s[low]),
            latency_s=0.0 if cost is None else float(cost.latency_s),
            min_pairs=max(1, min_pairs if cost is None else 1),
            min_ratio=min_ratio if cost is None else 1.0,
            min_gain=0.0 if cost is None else MIN_GAIN,
            mixed_formats=mixed_formats,
        )

    def may_pay(self, loads_R: IntArray) -> bool:
        """Whether perfect balance by a single transfer would be worth it: if not, nothing is."""
        fullest, total = int(loads_R.max()), int(loads_R.sum())
        excess = fullest - -(-total // len(loads_R))
        transfer_s = float(self.transfer_s_C.min())
        if self.transient_format is not None:
            transfer_s = min(transfer_s, self.low_s)
        return (
            excess >= self.min_pairs
            and fullest * len(loads_R) >= self.min_ratio * total
            and excess * self.pair_s > transfer_s + self.latency_s
        )

    def is_shorter(self, after: DispatchPlan, before: DispatchPlan) -> bool:
        """Whether the modelled step with loans is shorter; without a cost it is."""
        if self.cost is None:
            return True
        after_s = self.cost.step(after).layer_s
        # What the fullest rank computes and receives tells without pricing all of the other plan, mostly.
        rank = int(before.loads_R.argmax())
        pairs, own = int(before.loads_R[rank]), int(before.pairs_RR[rank, rank])
        at_least_s = pairs * self.least_pair_s + 2 * ((pairs - own) * self.cost.row_s + self.latency_s)
        return after_s < at_least_s or after_s < self.cost.step(before).layer_s

    def choose(self, before: DispatchPlan) -> Loans | None:
        """The experts to lend and everybody's pairs then; None if lending saves nothing."""
        found = self._lend(before, self.transient_format is not None)
        if found.is_cut_short:
            found = min(found, self._lend(before, False), key=lambda found: found.step_s)
        by_expert, transfers, borrowed = self.by_expert, [], []
        loans = zip(found.sources_N.tolist(), found.borrowers_N.tolist(), found.is_low_N.tolist(), strict=True)
        for source, borrower, is_low in loans:
            expert, lender = int(by_expert.experts_C[source]), int(by_expert.ranks_C[source])
            if found.quotas_ER[expert, borrower]:
                name = self.replicas.formats_P[by_expert.replicas_C[source]]
                if is_low and self.transient_format is not None:
                    name = self.transient_format
                transfers.append(WeightTransfer(expert, lender, borrower, name))
                borrowed.append(Replica(borrower, expert, name))
        if not transfers:
            return None
        together, _ = self.replicas.joined(borrowed, self.mixed_formats)
        return Loans(tuple(sorted(transfers)), together, found.quotas_ER)

    def _lend(self, before: DispatchPlan, has_low: bool) -> "_Found":
        by_expert = self.by_expert
        return _Found(
            *lend(
                by_expert.first_E,
                by_expert.ranks_C,
                before.pairs_RP.sum(axis=0)[by_expert.replicas_C],
                self.transfer_s_C,
                self.is_low_C,
                by_expert.num_ranks,
                self.max_borrowed,
                self.min_pairs,
                self.pair_s,
                self.latency_s,
                self.min_gain,
                self.low_s,
                self.max_low_precision_share if has_low else -1.0,
            )
        )


class _Found(NamedTuple):
    step_s: float  # as estimated: the fullest rank and the busiest link
    is_cut_short: bool  # by the cap on low precision
    sources_N: IntArray  # index into C of the replica that is sent
    borrowers_N: IntArray
    is_low_N: BoolArray  # sent in the transient format
    quotas_ER: IntArray


@compiled
def lend(
    first_E: IntArray,
    ranks_C: IntArray,
    quotas_C: IntArray,
    transfer_s_C: FloatArray,
    is_low_C: BoolArray,
    num_ranks: int,
    max_borrowed: int,
    min_pairs: int,
    pair_s: float,
    latency_s: float,
    min_gain: float,
    low_s: float,
    max_low_share: float,
) -> tuple[float, bool, IntArray, IntArray, BoolArray, IntArray]:
    """Lend one expert after another, as long as that may shorten the step, and return the shortest, as `_Found`.

    The emptiest rank borrows, and always the expert worth most: the pairs it takes off the ranks that hold each other
    up, the cut which bounds the fullest one, less what it adds to the busiest link. After each loan paths of replicas
    carry pairs to where room has become.

    Args:
        first_E: [E + 1] index into C of each expert's first replica.
        ranks_C: [C] rank of each resident replica.
        quotas_C: [C] its pairs under the best split without loans.
        transfer_s_C: [C] seconds it travels as it lies.
        is_low_C: [C] whether it lies in the transient format.
        num_ranks: R.
        max_borrowed: experts that a rank makes room for.
        min_pairs: least that a loan must take off the fullest ranks.
        pair_s: seconds of a pair.
        latency_s: of a round of transfers.
        min_gain: of a balanced step's time, that more loans must save.
        low_s: seconds an expert travels in the transient format.
        max_low_share: of the pairs, in the transient format; negative: nothing is lent in it.
    """
    num_experts, num_resident = len(first_E) - 1, len(ranks_C)
    max_loans = num_ranks * min(max_borrowed, num_experts)
    # The replicas with the borrowed ones, which are put behind the others of their expert.
    first_E = first_E.copy()
    num_replicas = num_resident
    ranks = np.zeros(num_resident + max_loans, np.int64)
    quotas = np.zeros(num_resident + max_loans, np.int64)
    is_low = np.zeros(num_resident + max_loans, np.bool_)
    source = np.zeros(num_resident + max_loans, np.int64)  # index into C; of a borrowed one -1
    ranks[:num_resident], quotas[:num_resident], is_low[:num_resident] = ranks_C, quotas_C, is_low_C
    source[:num_resident] = np.arange(num_resident)

    loads_R = np.zeros(num_ranks, np.int64)
    for c in range(num_resident):
        loads_R[ranks_C[c]] += quotas_C[c]
    sent_s_R, received_s_R = np.zeros(num_ranks), np.zeros(num_ranks)
    moved_s = 0.0  # of the busiest link
    num_borrowed_R = np.zeros(num_ranks, np.int64)
    cut_R = np.zeros(num_ranks, np.bool_)
    sources_N, borrowers_N = np.zeros(max_loans, np.int64), np.zeros(max_loans, np.int64)
    is_low_N = np.zeros(max_loans, np.bool_)

    total = loads_R.sum()
    mean = -(-total // num_ranks)
    low_pairs = _low_pairs(quotas, is_low, num_replicas)
    max_low_pairs = max(max_low_share * total, low_pairs)
    best_s, num_best, num_loans, is_cut_short = loads_R.max() * pair_s, 0, 0, False
    best_ER = np.zeros((num_experts, num_ranks), np.int64)
    _write_table(first_E, ranks, quotas, best_ER)
    fullest = augment(first_E, ranks[:num_replicas], quotas[:num_replicas], loads_R, mean, cut_R)
    while fullest > mean and num_loans < max_loans:
        borrower = -1
        for rank in range(num_ranks):
            if num_borrowed_R[rank] < max_borrowed and (borrower < 0 or loads_R[rank] < loads_R[borrower]):
                borrower = rank
        expert, sender, amount = _worthiest(
            first_E, ranks, quotas, source, transfer_s_C, cut_R, sent_s_R, received_s_R[borrower], moved_s,
            borrower, mean - loads_R[borrower], min_pairs, pair_s,
        )  # fmt: skip
        if expert < 0:
            break
        becomes_low = max_low_share >= 0 and low_pairs + amount <= max_low_pairs
        seconds = low_s if becomes_low else transfer_s_C[source[sender]]
        sent_s_R[ranks[sender]] += seconds
        received_s_R[borrower] += seconds
        moved_s = max(sent_s_R.max(), received_s_R.max())
        links_s = moved_s + latency_s
        if links_s > 0 and mean * pair_s + links_s >= best_s - min_gain * mean * pair_s:
            break
        sources_N[num_loans], borrowers_N[num_loans], is_low_N[num_loans] = source[sender], borrower, becomes_low
        num_loans += 1
        num_borrowed_R[borrower] += 1
        is_low_there = becomes_low or is_low[sender]
        end = first_E[expert + 1]
        for n in range(num_replicas, end, -1):
            ranks[n], quotas[n], is_low[n], source[n] = ranks[n - 1], quotas[n - 1], is_low[n - 1], source[n - 1]
        ranks[end], quotas[end], is_low[end], source[end] = borrower, 0, is_low_there, -1
        first_E[expert + 1 :] += 1
        num_replicas += 1
        fullest = augment(first_E, ranks[:num_replicas], quotas[:num_replicas], loads_R, mean, cut_R)
        low_pairs = _low_pairs(quotas, is_low, num_replicas)
        if max_low_share >= 0 and low_pairs > max_low_pairs:
            is_cut_short = True
            break
        if fullest * pair_s + links_s < best_s - min_gain * mean * pair_s:
            best_s, num_best = fullest * pair_s + links_s, num_loans
            _write_table(first_E, ranks, quotas, best_ER)
    return best_s, is_cut_short, sources_N[:num_best], borrowers_N[:num_best], is_low_N[:num_best], best_ER


@compiled
def _worthiest(
    first_E: IntArray,
    ranks: IntArray,
    quotas: IntArray,
    source: IntArray,
    transfer_s_C: FloatArray,
    cut_R: BoolArray,
    sent_s_R: FloatArray,
    received_s: float,
    moved_s: float,
    borrower: int,
    room: int,
    min_pairs: int,
    pair_s: float,
) -> tuple[int, int, int]:
    """The expert whose loan is worth most, its resident replica on the rank that has sent least, and pairs it takes.

    Of experts worth the same, the one with most pairs on the cut; no expert is -1.
    """
    found, sender, most, most_s = -1, -1, 0, 0.0
    for expert in range(len(first_E) - 1):
        pairs, holder = 0, -1
        for n in range(first_E[expert], first_E[expert + 1]):
            if ranks[n] == borrower:
                pairs = 0
                break
            if cut_R[ranks[n]]:
                pairs += quotas[n]
            if source[n] >= 0 and (holder < 0 or sent_s_R[ranks[n]] < sent_s_R[ranks[holder]]):
                holder = n
        if min(pairs, room) < min_pairs:
            continue
        link_s = max(sent_s_R[ranks[holder]], received_s) + transfer_s_C[source[holder]]
        worth_s = min(pairs, room) * pair_s - max(link_s - moved_s, 0.0)
        if found < 0 or worth_s > most_s or (worth_s == most_s and pairs > most):
            found, sender, most, most_s = expert, holder, pairs, worth_s
    return found, sender, min(most, room)


@compiled
def _low_pairs(quotas: IntArray, is_low: BoolArray, num_replicas: int) -> int:
    pairs = 0
    for n in range(num_replicas):
        if is_low[n]:
            pairs += quotas[n]
    return pairs


@compiled
def _write_table(first_E: IntArray, ranks: IntArray, quotas: IntArray, quotas_ER: IntArray) -> None:
    quotas_ER[:] = 0
    for expert in range(len(first_E) - 1):
        for n in range(first_E[expert], first_E[expert + 1]):
            quotas_ER[expert, ranks[n]] = quotas[n]
