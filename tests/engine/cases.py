"""Models and requests of the engine tests."""

from rq_ep.engine.engine import Limits
from rq_ep.engine.request import Request

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=12, kv_cache_tokens=512)
EOS = 11  # a token that greedy answers of some of the models run into


def requests_of(rank: int) -> list[Request]:
    """Rank 0 has five requests of different lengths, more than a batch takes; rank 1 has none."""
    if rank == 1:
        return []
    return [
        Request(
            f"request {number}",
            [(7 * number + 3 * at) % 96 + 1 for at in range(2 + 5 * number)],
            max_tokens=9 - number,
            ignore_eos=number == 4,
        )
        for number in range(5)
    ]
