"""`python -m bench load`: its checkpoint is one, and its figures are those of what was measured."""

import mmap
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import rq_ep
from bench.serving.load import QUICK, Watched, goals
from bench.serving.random_checkpoint import random_checkpoint
from rq_ep.core.errors import UserError


def config() -> OlmoeConfig:
    return OlmoeConfig(**QUICK, num_hidden_layers=2, tie_word_embeddings=False, eos_token_id=None)


def test_transformers_and_ranks_load_the_random_checkpoint_alike(tmp_path: Path) -> None:
    assert random_checkpoint(tmp_path, config(), torch.float32, max_shard_bytes=1_000_000)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) < 1_100_000
    whole, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(12)[None]
    on_ranks = rq_ep.load(tmp_path, num_local_ranks=2)
    torch.testing.assert_close(on_ranks(ids).logits, whole(ids).logits)

    assert not random_checkpoint(tmp_path, config(), torch.float32), "it is there"
    other = config()
    other.num_experts_per_tok = 1
    with pytest.raises(UserError, match="holds another model"):
        random_checkpoint(tmp_path, other, torch.float32)


def test_the_peak_of_a_process_is_what_it_had_alone() -> None:
    watched = Watched(psutil.Process())
    watched.sample()
    before = watched.peak_bytes
    held = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE)  # an allocator might have such memory left
    np.frombuffer(held, np.uint8)[:] = 1
    watched.sample()
    assert watched.peak_bytes - before == pytest.approx(len(held), rel=0.2)
    assert watched.cpu_s > 0
    peak = watched.peak_bytes
    held.close()
    watched.sample()
    assert watched.peak_bytes == peak


def test_goals_are_ratios_of_what_is_read_and_held() -> None:
    rank = {"expert_bytes": 400, "kv_bytes": 40, "peak_bytes": 462, "disk_bytes": 510}
    parts = {
        "checkpoint": {"bytes": 1000, "dense_bytes": 100},
        "calibrate": {"tokens": 384, "command_s": 80.0, "peak_bytes": 1200},
        "place": {"command_s": 5.0, "predicted": 1.01},
        "serve": {
            "ranks": [rank, rank], "load_s": 9.0, "read_of_stored": 1.0, "first_token_s": 0.5,
            "next_first_token_s": 0.4,
        },
    }  # fmt: skip
    reached = {name: value for name, _, value in goals(parts)}
    assert reached["read from the disk by all ranks / checkpoint"] == "1.020"
    assert reached["peak memory of a rank / its experts and KV cache"] == "1.050"
