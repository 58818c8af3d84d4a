"""Models and requests of the engine tests."""

from typing import Any

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.strategies import NATIVE_STRATEGIES
from tests.model.families import FAMILIES
from tests.model.family_table import tiny_config

PADDED = ("qwen3_next", "jamba")  # linear attention, by chunks of a prompt and by whole prompts
CONFIGS = {**FAMILIES, **{family: tiny_config(family) for family in PADDED}}
NAMES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", *PADDED)
SCORED_FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", *PADDED)  # sdpa, eager with a window, latent attention
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=12, kv_cache_tokens=512)
EOS = 11  # a token that greedy answers of some of the models run into


def strategies_of(family: str) -> tuple[str, ...]:
    """Every strategy on one family; the others differ in what is not the strategy's."""
    return tuple(NATIVE_STRATEGIES) if family == "mixtral" else ("llep",)


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


SERVED = [(family, strategy) for family in NAMES for strategy in strategies_of(family)]


def check_only_broken_end(findings: dict[str, Any]) -> None:
    """Check what `worker.broken_among_others` found."""
    assert findings["served"] == findings["dense"]
    broken = ("nan", "inf", "scored", "scored, continued")
    assert findings["errors"] == dict.fromkeys(broken, "the model's logits are not finite")
