"""One rank of the engine tests: runs every check and writes what it saw. The last check ends the process.

The environment is torchrun's; the argument is a directory with a checkpoint of each family.
"""

import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.requests import Output, Request, Sampling, Score
from rq_ep.engine.scoring import score_tokens
from rq_ep.engine.servable import PAGED, choose_cache, set_attention
from rq_ep.engine.step_agreement import is_consequence
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.parallel import TorchGroup
from tests.engine.cases import CONFIG, NAMES, SCORED_FAMILIES, requests_of, strategies_of

TIMEOUT_S = 120


class Answers:
    """The outputs of an engine's requests."""

    def __init__(self, num_expected: int) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.scores: dict[str, list[Score]] = {}
        self.prompt_scores: dict[str, list[Score]] = {}
        self.errors: dict[str, str] = {}
        self.some = threading.Event()
        self.all = threading.Event()
        self._num_expected = num_expected

    def add(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.error is not None:
                self.errors[output.request_id] = output.error
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            self.scores.setdefault(output.request_id, []).extend(output.scores)
            self.prompt_scores.setdefault(output.request_id, []).extend(output.prompt_scores or [])
            if output.finish_reason is not None:
                assert output.request_id not in self.reasons, "a request ends once"
                self.reasons[output.request_id] = output.finish_reason
        self.some.set()
        if len(self.reasons) == self._num_expected:
            self.all.set()


def start(
    path: Path,
    strategy: str,
    group: TorchGroup,
    answers: Answers,
    on_failure: Any = None,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
    config: EngineConfig = CONFIG,
) -> Engine:
    model = load(path, strategy=strategy, group=group)
    set_attention(model, None)
    prepare(model)
    cache = choose_cache(model.config) if config.cache == PAGED else config.cache
    engine = Engine(
        model, report_of(model).layers, group, replace(config, cache=cache),
        on_outputs=answers.add, on_failure=on_failure or ending("unexpected"), heartbeat_s=0.05,
    )  # fmt: skip
    engine.start()
    return engine


def answer(path: Path, strategy: str, group: TorchGroup, requests: Sequence[Request]) -> dict[str, Any]:
    """Run this rank's requests to their end; other ranks may have none, or stop long before."""
    answers = Answers(len(requests))
    engine = start(path, strategy, group, answers)
    with patch.object(group, "gather_counts", wraps=group.gather_counts) as gather_counts:
        for request in requests:
            engine.submit(request)
        assert not requests or answers.all.wait(TIMEOUT_S), answers.tokens
        engine.stop()
    return {
        "tokens": answers.tokens,
        "reasons": answers.reasons,
        "errors": answers.errors,
        "gathers": gather_counts.call_count,
    }


def sampled_alike(path: Path, group: TorchGroup) -> list[list[int]]:
    """A sampled answer among greedy neighbours, and alone."""
    sampled = Request("sampled", [5, 6, 7], 8, Sampling(1.5, 0.9, seed=3))
    neighbours = [Request(f"{number}", [number + 1] * (3 + number), 8) for number in range(3)]
    together = answer(path, "standard", group, [*neighbours, sampled])["tokens"]["sampled"]
    return [together, answer(path, "standard", group, [sampled])["tokens"]["sampled"]]


def cancelled(path: Path, group: TorchGroup) -> dict[str, Any]:
    """A request that is cancelled after its first tokens; its neighbour is not disturbed."""
    answers = Answers(1)
    engine = start(path, "standard", group, answers)
    engine.submit(Request("long", [1, 2, 3], 110))
    assert answers.some.wait(TIMEOUT_S)
    engine.cancel("long")
    engine.submit(Request("short", [1, 2, 3], 4))
    assert answers.all.wait(TIMEOUT_S)
    num_tokens = len(answers.tokens["long"])
    engine.stop()
    return {"delivered": num_tokens, "delivered later": len(answers.tokens["long"]), "reasons": answers.reasons}


def scored(path: Path, group: TorchGroup) -> dict[str, Any]:
    """Scores of a prompt of several chunks and of its answer, as served and of the dense model; rank 1 generates."""
    prompt_ids = [(5 * at + 3) % 96 + 1 for at in range(30)]
    request = Request("scored", prompt_ids, 4, num_logprobs=3, scores_prompt=True, ignore_eos=True)
    alone = Request("prompt only", prompt_ids[:20], 0, num_logprobs=2, scores_prompt=True)
    plain = Request("plain", prompt_ids[:7], 6, ignore_eos=True)
    requests = [request, alone] if group.rank == 0 else [plain]
    answers = Answers(len(requests))
    engine = start(path, "standard", group, answers)
    for each in requests:
        engine.submit(each)
    assert answers.all.wait(TIMEOUT_S), answers.tokens
    engine.stop()
    token_ids = prompt_ids + answers.tokens.get("scored", [])
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits_TV = dense(input_ids=torch.tensor([token_ids])).logits[0]
    expected = score_tokens(logits_TV[:-1], torch.tensor(token_ids[1:]), 3)
    return {
        "served": answers.prompt_scores.get("scored", []) + answers.scores.get("scored", []),
        "alone": answers.prompt_scores.get("prompt only", []),
        "dense": expected,
        "reasons": answers.reasons,
    }


def broken_among_others(path: Path, group: TorchGroup) -> dict[str, Any]:
    """Requests under way beside ones with a token whose embedding is not finite: served, and of the dense model."""
    well = [
        Request(f"well {number}", [(7 * number + 3 * at) % 89 + 1 for at in range(3 + 4 * number)], 12, ignore_eos=True)
        for number in range(3)
    ]
    dense = dense_answers(path, {request.id: request for request in well})
    used = {token for request in well for token in request.prompt_ids + dense[request.id]}
    nan, inf, *_ = set(range(1, 97)) - used
    broken = [
        Request("nan", [5, 6, nan, 7, 8], 6, ignore_eos=True),
        Request("inf", [3] * 20 + [inf] + [4] * 9, 6, ignore_eos=True),
        Request("scored", [5, nan, 7], 0, num_logprobs=2, scores_prompt=True),
        Request("scored, continued", [5, inf, 7], 3, num_logprobs=2, scores_prompt=True),
    ]

    @torch.no_grad()
    def damage(model: PreTrainedModel) -> None:
        model.get_input_embeddings().weight[nan] = float("nan")
        model.get_input_embeddings().weight[inf] = float("inf")

    answers = Answers(len(well) + len(broken))
    engine = start(path, "standard", group, answers, prepare=damage)
    for request in well:
        engine.submit(request)
    assert answers.some.wait(TIMEOUT_S)
    for request in broken:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.reasons
    engine.stop()
    return {
        "served": {request.id: answers.tokens[request.id] for request in well},
        "dense": dense,
        "errors": answers.errors,
    }


def ending(what: str, findings: dict[str, Any] | None = None, path: Path | None = None) -> Any:
    """What to do when the engine fails: write it down and end."""

    def end(error: BaseException) -> None:
        if findings is None or path is None:
            print(what, repr(error), file=sys.stderr, flush=True)
            os._exit(9)
        findings["failure"] = {"text": str(error), "is_consequence": is_consequence(error)}
        path.write_text(json.dumps(findings))
        os._exit(7)

    return end


def fail_on_rank_1(path: Path, group: TorchGroup, on_failure: Any) -> None:
    """Rank 1's planner breaks in the second step; this call does not return."""
    answers = Answers(1)
    engine = start(path, "standard", group, answers, on_failure)
    if group.rank == 1:
        layer = report_of(engine._manager.model).layers[-1]
        plan, calls = layer.planner, iter(range(100))

        def broken(counts_RE: Any) -> Any:
            if next(calls) > 1:
                raise KeyError("a bug")
            return plan(counts_RE)

        layer.planner = broken
    engine.submit(Request("never", [1, 2, 3], 50))
    threading.Event().wait(TIMEOUT_S)


def dense_answers(path: Path, requests: Mapping[str, Request]) -> dict[str, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return {name: generated(model, request) for name, request in requests.items()}


def generated(model: PreTrainedModel, request: Request) -> list[int]:
    """The answer of a dense model."""
    prompt = torch.tensor([request.prompt_ids])
    assert model.generation_config is not None
    eos = -1 if request.ignore_eos else model.generation_config.eos_token_id
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    answer: list[int] = out[0, prompt.shape[1] :].tolist()
    return answer


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    gc.freeze()  # an engine that stops collects garbage, and would go through all that was imported
    group = TorchGroup.from_environment("cpu", timeout_s=TIMEOUT_S)
    findings: dict[str, Any] = {"dense": {}, "served": {}}
    for family in NAMES:
        requests = requests_of(group.rank)
        findings["dense"][family] = dense_answers(directory / family, {request.id: request for request in requests})
        for strategy in strategies_of(family):
            findings["served"][f"{family}/{strategy}"] = answer(directory / family, strategy, group, requests)
    findings["sampled"] = sampled_alike(directory / "mixtral", group)
    findings["cancelled"] = cancelled(directory / "mixtral", group)
    findings["broken"] = {family: broken_among_others(directory / family, group) for family in SCORED_FAMILIES}
    findings["scored"] = {family: scored(directory / family, group) for family in SCORED_FAMILIES}
    path = directory / f"findings-{group.rank}.json"
    fail_on_rank_1(directory / "mixtral", group, ending("expected", findings, path))


if __name__ == "__main__":
    main()
