"""What a rank records of its layers' calls: the load of the group while it leads, else what a leader has to know."""

from collections.abc import Callable, Sequence

from rq_ep.core.arrays import IntArray
from rq_ep.moe import Telemetry
from rq_ep.moe.telemetry import CallRecorder
from rq_ep.serve.rank.loads.load_totals import LoadTotals
from rq_ep.serve.rank.loads.recent_pairs import RecentPairs
from rq_ep.serve.rank.loads.step_loads import StepLoads


class LoadRecorders:
    """The recorders of a rank, of which its part in the group chooses one.

    Args:
        members: the ranks that take part now.
        survives: whether the group goes on without ranks that fail: then any rank may come to lead it.
        rebalances: whether the leader decides on the loads of single steps.
    """

    def __init__(self, members: Callable[[], Sequence[int]], *, survives: bool, rebalances: bool) -> None:
        self._survives = survives
        self._pairs = RecentPairs()
        self.totals = LoadTotals(members, awaits_ends=survives, also=self._pairs if survives else None)
        self.steps = StepLoads(self.totals) if rebalances else None

    def recorder(self, leads: bool) -> CallRecorder:
        """What the layers record with on a rank that leads, or on another one."""
        if leads:
            return self.steps or self.totals
        return self._pairs if self._survives else Telemetry(max_records=0)

    def recent_pairs_LE(self, num_layers: int) -> IntArray | None:
        """[L, E] pairs of each expert, lately; None: nothing is known of some layer yet."""
        return self._pairs.counts_LE(num_layers)

    # On the engine's thread

    def between_steps(self, is_prefill: bool) -> None:
        """Count the step that has ended; `is_prefill`: whether any rank prefills in the one that begins."""
        self.totals.between_steps()
        if self.steps is not None:
            self.steps.between_steps(is_prefill)

    def end_generation(self, is_cut_off: bool) -> None:
        """The members of the group change.

        The last step counts in the totals unless it was cut off, as it is made again then. What is known of single
        steps is forgotten: it is the load of another placement.
        """
        if is_cut_off:
            self.totals.discard()
        else:
            self.totals.between_steps()
        if self.steps is not None:
            self.steps.discard()
