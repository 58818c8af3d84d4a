"""Expert groups on nodes, for models that route each token to a few groups only (DeepSeek's node-limited routing)."""

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray


def nodes_of_groups(loads_G: FloatArray, num_nodes: int) -> IntArray:
    """[G] a node for each group: heaviest first onto the least loaded node with room, as `balanced_packing` of EPLB.

    Nodes take the same number of groups; where they do not divide, the first nodes take one more.
    """
    share, rest = divmod(len(loads_G), num_nodes)
    room_N = share + (np.arange(num_nodes) < rest)
    load_N = np.zeros(num_nodes)
    nodes_G = np.zeros(len(loads_G), np.int64)
    for group in np.argsort(-loads_G, kind="stable").tolist():
        node = int(np.where(room_N > 0, load_N, np.inf).argmin())
        nodes_G[group] = node
        room_N[node] -= 1
        load_N[node] += loads_G[group]
    return nodes_G
