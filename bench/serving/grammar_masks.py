"""What it adds to choosing tokens that answers follow a JSON schema, at a vocabulary as large as today's models have.

The vocabulary is byte-pair encoding, trained on the spot on text of the installed packages.
"""

import json
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llguidance import grammar_from
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rq_ep.engine.output_processor import RequestState, choose_tokens
from rq_ep.engine.requests import Request
from rq_ep.engine.tokens.grammars import Grammars
from rq_ep.parallel.host import keep_freed_memory

NUM_TOKENS = 150_000
TEXT_BYTES = 60 << 20  # of the training; enough for so many tokens
SUFFIXES = (".md", ".py", ".pyi", ".rst", ".txt")
END = "<|end|>"
AT_ONCE = (1, 8, 32)
CHOSEN = 1e4  # a logit beyond all others
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "count": {"type": "integer"},
        "kind": {"enum": ["alpha", "beta"]},
        "size": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
    "required": ["name", "tags", "count", "kind", "size"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "The name of something that was measured today",
    "tags": ["a short tag", "another, somewhat longer tag"],
    "count": 123456,
    "kind": "beta",
    "size": {"x": 0.125},
}


def mask_rows(num_rounds: int) -> list[dict[str, Any]]:
    """For each number of sequences at once: CPU time of choosing the tokens of a step, with grammars and without.

    Sequences are at different places of the same answer, whose tokens are chosen either way. Times are medians over the
    steps of all rounds; `again_s` is `free_s` measured a second time.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    tokenizer = trained_tokenizer()
    assert isinstance(tokenizer.eos_token_id, int)
    grammars = Grammars(lambda: tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    answer: list[int] = tokenizer.encode(json.dumps(ANSWER), add_special_tokens=False)
    grammar = grammar_from("json_schema", json.dumps(SCHEMA))
    rows = []
    for number in AT_ONCE:
        logits_NV = torch.randn(number, len(tokenizer), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {"grammar_s": [], "free_s": [], "again_s": []}
        for _ in range(num_rounds):
            states = {kind: [_state(at % len(answer), answer) for at in range(number)] for kind in times}
            for state in states["grammar_s"]:
                state.matcher = grammars.matcher(grammar, state.answer_ids)
            for step in range(len(answer) - min(number, len(answer)) + 1):
                tokens = [answer[(at % len(answer)) + step] for at in range(number)]
                for kind in times if step % 2 else reversed(times):
                    times[kind].append(_choose(logits_NV, states[kind], tokens))
        rows.append({"at_once": number, "vocab_size": len(tokenizer), **{kind: median(s) for kind, s in times.items()}})
    return rows


def _state(num_answered: int, answer: Sequence[int]) -> RequestState:
    return RequestState(Request("", [0], len(answer)), answer_ids=list(answer[:num_answered]))


@torch.inference_mode()
def _choose(logits_NV: torch.Tensor, states: Sequence[RequestState], tokens: Sequence[int]) -> float:
    """Have these tokens chosen; the CPU time that it took."""
    rows = range(len(tokens))
    before = logits_NV[rows, tokens]
    logits_NV[rows, tokens] = CHOSEN
    start_s = time.thread_time()
    chosen_N = choose_tokens(logits_NV, states, [1 + len(state.answer_ids) for state in states])
    seconds = time.thread_time() - start_s
    logits_NV[rows, tokens] = before
    assert chosen_N.tolist() == list(tokens), "the grammar allows the answer"
    return seconds


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `NUM_TOKENS`; takes half a minute of CPU time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _texts() -> Iterator[str]:
    num_bytes = 0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*")):
        if path.suffix in SUFFIXES and path.is_file() and num_bytes < TEXT_BYTES:
            text = path.read_text(errors="ignore")
            num_bytes += len(text)
            yield text
