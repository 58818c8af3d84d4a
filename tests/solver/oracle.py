"""The best placement of a small layer, by mixed-integer programming: what the search is tested against.

One layer, one format for each expert, bytes per rank: binary variables for replicas and for low experts, fractions of
each step's load on each replica, and the fullest rank of each step. Exact, and hopeless
beyond some dozens of replicas.
"""

from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray


class Oracle(NamedTuple):
    """The best placement, its max/mean over ranks (mean over steps), and a bound that no placement beats."""

    held_ER: BoolArray
    low_E: BoolArray
    value: float
    bound: float


def best_placement(
    loads_SE: FloatArray,
    budget_R: IntArray,
    native_bytes: int,
    low_bytes: int,
    pairs_E: IntArray,
    max_low_share: float,
    may_be_low_E: BoolArray | None = None,
    time_limit_s: float = 60.0,
) -> Oracle:
    """Solve by HiGHS.

    Args:
        loads_SE: in units of the step's mean rank load.
        budget_R: bytes of each rank.
        native_bytes: of one replica.
        low_bytes: of one replica of an expert stored low.
        pairs_E: what the cap on low experts counts.
        max_low_share: of all pairs that may be on low experts.
        may_be_low_E: experts that may be stored low; None: all.
        time_limit_s: `value` is the best incumbent until then; `bound` is valid anyway.

    Raises:
        ValueError: no placement fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    num_steps, num_experts = loads_SE.shape
    num_ranks, num_replicas = len(budget_R), num_experts * len(budget_R)
    # Columns: native replica, low replica (e, r); low expert e; share of (s, e, r); fullest rank of s.
    low_at, is_low_at = num_replicas, 2 * num_replicas
    share_at = is_low_at + num_experts
    top_at = share_at + num_steps * num_replicas
    rows: list[tuple[dict[int, float], float, float]] = []
    for expert in range(num_experts):
        natives = range(expert * num_ranks, (expert + 1) * num_ranks)
        rows.append((dict.fromkeys([*natives, *(low_at + p for p in natives)], 1.0), 1, np.inf))
        for p in natives:
            rows.append(({p: 1.0, is_low_at + expert: 1.0}, -np.inf, 1))
            rows.append(({low_at + p: 1.0, is_low_at + expert: -1.0}, -np.inf, 0))
        for step in range(num_steps):
            shares = [share_at + step * num_replicas + p for p in natives]
            rows.append((dict.fromkeys(shares, 1.0), 1, 1))
            rows += [({share: 1.0, p: -1.0, low_at + p: -1.0}, -np.inf, 0) for share, p in zip(shares, natives)]
    for rank in range(num_ranks):
        held = range(rank, num_replicas, num_ranks)
        sizes = {p: float(native_bytes) for p in held} | {low_at + p: float(low_bytes) for p in held}
        rows.append((sizes, -np.inf, float(budget_R[rank])))
        for step in range(num_steps):
            here = {
                share_at + step * num_replicas + e * num_ranks + rank: loads_SE[step, e] for e in range(num_experts)
            }
            rows.append((here | {top_at + step: -1.0}, -np.inf, 0))
    cap = max_low_share * float(pairs_E.sum())
    rows.append(({is_low_at + e: float(pairs_E[e]) for e in range(num_experts)}, -np.inf, cap))
    lengths = [len(row) for row, _, _ in rows]
    matrix = csr_array(
        (
            [value for row, _, _ in rows for value in row.values()],
            [column for row, _, _ in rows for column in row],
            np.concatenate([[0], np.cumsum(lengths)]),
        ),
        shape=(len(rows), top_at + num_steps),
    )
    cost = np.zeros(top_at + num_steps)
    cost[top_at:] = 1 / num_steps
    upper = np.ones(top_at + num_steps)
    upper[top_at:] = np.inf
    if may_be_low_E is not None:
        upper[is_low_at:share_at] = may_be_low_E
    solution = milp(
        cost,
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        integrality=np.arange(top_at + num_steps) < share_at,
        bounds=Bounds(np.zeros(top_at + num_steps), upper),
        options={"time_limit": time_limit_s},
    )
    if solution.x is None:
        raise ValueError(f"no placement fits ({solution.message})")
    held = (solution.x[:low_at] + solution.x[low_at:is_low_at]).reshape(num_experts, num_ranks) > 0.5
    return Oracle(held, solution.x[is_low_at:share_at] > 0.5, float(solution.fun), float(solution.mip_dual_bound))
