"""How fast experts move beside the steps: by bytes, or by the time that moving takes of a core."""

from dataclasses import dataclass

MIN_SHARE = 0.04  # of a core's time; all ranks wait for the one whose core computes a step and moves an expert
MAX_SHARE = 0.5  # where a rank has a core to spare: both threads still take turns in the interpreter
MAX_REST_S = 1.0  # after an expert that took long to pack; a thread that rests for longer would be taken for stuck


@dataclass(frozen=True)
class Pace:
    """The limits of a thread that moves experts.

    Args:
        bytes_per_step: of an expert that leave a rank in a step at most; None: as many as the thread moves in its
            share of the time.
        share: of a core's time that the thread takes without such a bound.
    """

    bytes_per_step: int | None = None
    share: float = MIN_SHARE

    def rest_s(self, elapsed_s: float, busy_s: float) -> float:
        """Seconds that the thread is to rest so that it has worked for its share of the time. To wait is to rest.

        Args:
            elapsed_s: since its last rest.
            busy_s: CPU time that it has taken of them.
        """
        return min(max(busy_s / self.share - elapsed_s, 0.0), MAX_REST_S)


def share_of_a_core(num_cores: int, num_ranks: int, num_threads: int) -> float:
    """The share of a core's time that moving takes, by whether steps leave a core of each rank idle.

    Args:
        num_cores: of a host.
        num_ranks: that share them.
        num_threads: with which each rank computes.
    """
    return MAX_SHARE if num_cores >= num_ranks * (num_threads + 1) else MIN_SHARE
