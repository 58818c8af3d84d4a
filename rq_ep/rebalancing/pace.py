"""How fast experts move beside the steps, where no bound of bytes was set: by the time that moving takes of a core."""

SHARE = 0.04  # of a core's time; all ranks wait for the one whose core computes a step and moves an expert
MAX_REST_S = 1.0  # after an expert that took long to pack; a thread that rests for longer would be taken for stuck


def rest_s(elapsed_s: float, busy_s: float) -> float:
    """Seconds that a thread is to rest so that it has worked for its share of the time. To wait is to rest.

    Args:
        elapsed_s: since its last rest.
        busy_s: CPU time that it has taken of them.
    """
    return min(max(busy_s / SHARE - elapsed_s, 0.0), MAX_REST_S)
