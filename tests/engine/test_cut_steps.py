"""Steps that are cut off by the death of another rank and made again: answers and scores are those of whole steps."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.requests import Request, Sampling
from rq_ep.engine.servable import choose_cache, set_attention
from rq_ep.engine.step_agreement import StepFlags
from rq_ep.engine.step_loop import GroupNumbers
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.ep_group import PeerLost
from tests.engine.cases import CONFIGS
from tests.engine.test_step_loop import IDLE, Rank
from tests.engine.worker import Answers
from tests.model.families import random_model, save

FAMILIES = ("gpt_oss", "qwen3_next", "jamba")  # paged, with a window; padded, by chunks of a prompt and whole
GENERATED = [
    Request("short", [5, 6, 7], 8, Sampling(0.8, 0.9, seed=3), ignore_eos=True, num_logprobs=2),
    Request("long", [(7 * at) % 96 + 1 for at in range(31)], 7, ignore_eos=True, num_logprobs=0),  # of several chunks
]
SCORED = [
    Request("scored", [(5 * at) % 96 + 1 for at in range(30)], 3, ignore_eos=True, num_logprobs=1, scores_prompt=True),
    Request("only scored", [(3 * at) % 96 + 1 for at in range(20)], 0, num_logprobs=1, scores_prompt=True),
]


class Cuts:
    """Raises in some of the calls of a function, as if another rank had died in them."""

    def __init__(self, function: Any, numbers: set[int]) -> None:
        self.function = function
        self.numbers = numbers
        self.num_calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.num_calls += 1
        if self.num_calls in self.numbers:
            raise PeerLost("cut off")
        return self.function(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_steps_change_no_answer(
    family: str, gloo_of_one: TorchGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(random_model(CONFIGS[family]), tmp_path)
    model = load(tmp_path, strategy="standard", group=gloo_of_one)
    set_attention(model, None)
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=12, kv_cache_tokens=512, cache=choose_cache(model.config)
    )
    recovered: list[tuple[BaseException | None, GroupNumbers]] = []

    def recover(error: BaseException | None, numbers: GroupNumbers) -> GroupNumbers:
        recovered.append((error, numbers))
        return numbers._replace(generation=numbers.generation + 1)

    def run(requests: list[Request], layer_cuts: set[int], agreement_cuts: set[int]) -> Answers:
        answers = Answers(len(requests))
        failures: list[BaseException] = []
        engine = Engine(
            model, report_of(model).layers, gloo_of_one, config, on_outputs=answers.add, on_failure=failures.append,
            recover=recover, heartbeat_s=0.05,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            plan = Cuts(lambda planner, counts_RE: planner(counts_RE), layer_cuts)
            for layer in report_of(model).layers:
                patch.setattr(layer, "planner", partial(plan, layer.planner))
            patch.setattr(engine._step_loop, "_gather_flags", Cuts(engine._step_loop._gather_flags, agreement_cuts))
            for request in requests:
                engine.submit(request)
            engine.start()
            assert answers.all.wait(60), (answers.reasons, failures)
            engine.stop()
        assert not failures
        return answers

    rng = random.Random(1)
    for requests in (GENERATED, SCORED):
        whole = run(requests, set(), set())
        assert not recovered
        cut = run(requests, set(rng.sample(range(1, 30), 12)), set(rng.sample(range(2, 20), 4)))
        assert len(recovered) > 12
        recovered.clear()
        assert (cut.tokens, cut.reasons) == (whole.tokens, whole.reasons)
        for found, expected in ((cut.scores, whole.scores), (cut.prompt_scores, whole.prompt_scores)):
            for name, scores in expected.items():
                logprobs = [score.logprob for score in scores]
                assert [score.logprob for score in found[name]] == pytest.approx(logprobs, abs=1e-5)


def test_the_group_changes_between_two_steps_once_all_ranks_know() -> None:
    changes: list[GroupNumbers] = []

    def recover(error: BaseException | None, numbers: GroupNumbers) -> GroupNumbers:
        assert error is None
        changes.append(numbers)
        return GroupNumbers(2, mark=4, num_announced=5)

    rank = Rank(True, True, IDLE._replace(generation=1), recover=recover)
    rank.loop.regroup(2)
    assert rank.step()
    assert (rank.did, changes) == (["restart"], [GroupNumbers(0, 0, 3)]), "what was prepared is kept"
    rank.other = rank.other._replace(mark=4, num_announced=5, generation=1)
    assert rank.step()
    assert rank.did == ["restart", "step"], "the mark was passed by those who had been given it"
    assert rank.announced[-1] == StepFlags(True, True, False, True, 5, 0, num_rows=4, generation=2)
