"""A real server of two ranks over HTTP. The tests share it; the last one ends it."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.serving import soak
from rq_ep.core.stats import PHASES, ExpertStats
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.sim.traces import RoutingTrace
from tests.serve.running import Server, running, until

NUM_RANKS = 2
RECORD_MAX_TOKENS = 160
MODEL = "tiny"
PROMPTS = ["def main(", "import os\n", "class Reader:\n    def", "The value of", "for i in", "return", "    if x", "#"]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    arguments = ["--model", str(tiny_checkpoint), "--served-model-name", MODEL, "--dtype", "float32"]
    arguments += ["--strategy", "{name: llep}", "--max-num-batched-tokens", "64"]
    arguments += ["--record-dir", str(log.parent), "--record-max-tokens", str(RECORD_MAX_TOKENS)]
    with running(log, NUM_RANKS, *arguments) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def dense(tiny_checkpoint: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_checkpoint)


def dense_text(dense: tuple[Any, Any], prompt_ids: list[int], max_tokens: int) -> str:
    model, tokenizer = dense
    prompt = torch.tensor([prompt_ids])
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def test_health_answered_while_the_model_was_loading(server: Server) -> None:
    assert "the model is loading" in server.seen


def test_concurrent_greedy_completions_equal_generate(client: openai.OpenAI, dense: tuple[Any, Any]) -> None:
    def complete(number: int) -> str:
        tokens = 10 + 5 * number
        answer = client.completions.create(model=MODEL, prompt=PROMPTS[number], max_tokens=tokens, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= tokens
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(complete, range(8)))
    encode = dense[1].encode
    assert answers == [dense_text(dense, encode(PROMPTS[number]), 10 + 5 * number) for number in range(8)]


def test_a_stream_equals_the_whole(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_chat_equals_generate_on_its_template(client: openai.OpenAI, dense: tuple[Any, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is a list?"}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**body)
    prompt = dense[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = dense_text(dense, dense[1].encode(prompt, add_special_tokens=False), 20)
    assert whole.choices[0].message.content == expected
    chunks = list(client.chat.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@pytest.mark.parametrize("way", ["object", "model_dump", "to_dict", "raw JSON", "streamed"])
def test_a_chat_loop_goes_on_with_its_own_answers(client: openai.OpenAI, dense: tuple[Any, Any], way: str) -> None:
    sent: list[Any] = []  # as the client sends the answers back,
    plain: list[Any] = []  # and as the template reads them
    for question in ("What is a list?", "And a set?", "And a map?"):
        sent.append({"role": "user", "content": question})
        plain.append(sent[-1])
        body: dict[str, Any] = {"model": MODEL, "messages": sent, "max_tokens": 8, "temperature": 0}
        if way == "streamed":
            with client.chat.completions.stream(**body) as stream:
                for _ in stream:
                    pass
                message: Any = stream.current_completion_snapshot.choices[0].message
        else:
            message = client.chat.completions.create(**body).choices[0].message
        prompt = dense[1].apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        assert message.content == dense_text(dense, dense[1].encode(prompt, add_special_tokens=False), 8)
        forms = {"model_dump": message.model_dump, "to_dict": message.to_dict}
        forms["raw JSON"] = lambda message=message: json.loads(message.model_dump_json())
        sent.append(forms[way]() if way in forms else message)
        plain.append({"role": "assistant", "content": message.content})


def test_token_ids_are_a_prompt_too(client: openai.OpenAI, dense: tuple[Any, Any]) -> None:
    prompt_ids = dense[1].encode(PROMPTS[3])
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    from_ids = client.completions.create(prompt=prompt_ids, **body)
    assert from_ids.choices[0].text == client.completions.create(prompt=PROMPTS[3], **body).choices[0].text


def test_a_stop_string_cuts_the_answer(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**body).choices[0].text
    stop = whole[5:8]
    cut = client.completions.create(**body, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        body: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS[1], "max_tokens": 20, "temperature": 1.2}
        return client.completions.create(**body, seed=seed).choices[0].text

    with ThreadPoolExecutor(6) as pool:  # among neighbours, on whichever rank
        answers = list(pool.map(sample, [1, 2, 3, 1, 2, 3]))
    assert answers[:3] == answers[3:]
    assert len(set(answers)) == 3


def test_a_prompt_is_scored_as_the_dense_model_scores_it(client: openai.OpenAI, dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    prompt_ids = tokenizer.encode("def main(argv):\n    return " * 4)  # several chunks
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt_ids, "max_tokens": 1, "temperature": 0, "echo": True}
    choice = client.completions.create(**body, logprobs=1).choices[0]
    assert choice.logprobs is not None
    with torch.no_grad():
        expected_TV = model(input_ids=torch.tensor([prompt_ids])).logits[0].log_softmax(-1)
    expected = expected_TV[:-1].gather(1, torch.tensor(prompt_ids[1:])[:, None]).flatten().tolist()
    scores = choice.logprobs.token_logprobs or []
    assert scores[0] is None
    assert scores[1:-1] == pytest.approx(expected, abs=1e-4)
    assert choice.text.startswith(tokenizer.decode(prompt_ids))
    best = [None if top is None else max(top.values()) for top in choice.logprobs.top_logprobs or []]
    assert best[-1] == scores[-1], "the answer is greedy"
    assert best[1:-1] == pytest.approx(expected_TV[:-1].amax(-1).tolist(), abs=1e-4)


def record(server: Server, action: str) -> Any:
    return server.client.post(f"/v1/ep/record/{action}").json()


def complete_three(client: openai.OpenAI, max_tokens: int) -> list[int]:
    """Answers to three prompts at once; tokens that went through the model for each: the last one is never fed back."""
    body: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda p: client.completions.create(prompt=p, max_tokens=max_tokens, **body), PROMPTS[:3])
    return sorted(answer.usage.total_tokens - 1 for answer in answers if answer.usage is not None)


def test_a_recording_is_a_trace_as_calibration_writes_it(
    client: openai.OpenAI, server: Server, tiny_checkpoint: Path
) -> None:
    assert record(server, "start") == {"recording": True, "max_tokens": RECORD_MAX_TOKENS}
    tokens = complete_three(client, 6)
    stopped = record(server, "stop")
    trace = RoutingTrace.load(stopped["path"])
    assert len(trace.ids_NLK) == stopped["num_tokens"] == sum(tokens)
    assert not stopped["is_full"]
    assert trace.sequence_N is not None
    assert trace.phase_S is not None
    _, of_sequence = np.unique(trace.sequence_N, return_counts=True)
    assert sorted(of_sequence.tolist()) == tokens
    prompts = [len(prompt) for prompt in PROMPTS[:3]]  # this tokenizer's tokens are characters
    assert trace.tokens_S[trace.phase_S == PHASES.index("prefill")].sum() >= sum(prompts)
    assert trace.tokens_S[trace.phase_S == PHASES.index("decode")].max() <= 3
    stats = ExpertStats.uniform((0, 1), 8, {"bf16": 1}, "bf16")
    assert trace.model is not None
    trace.check(replace(stats, model=model_identity(tiny_checkpoint)))
    assert record(server, "start")["recording"]
    assert "no step was made" in record(server, "stop")["error"]["message"]


def test_a_recording_ends_at_its_limit(client: openai.OpenAI, server: Server) -> None:
    record(server, "start")
    assert sum(complete_three(client, 100)) > RECORD_MAX_TOKENS
    stopped = record(server, "stop")
    assert stopped["is_full"]
    assert 0 < stopped["num_tokens"] <= RECORD_MAX_TOKENS
    assert len(RoutingTrace.load(stopped["path"]).tokens_S) == stopped["num_steps"]


def test_the_balance_is_told(server: Server) -> None:
    placement = server.client.get("/v1/ep/placement").json()
    assert (placement["num_ranks"], len(placement["layers"])) == (NUM_RANKS, 2)
    until(lambda: metric(server, "rq_ep_tokens_routed_total") > 0)  # figures are sent once a second
    load = server.client.get("/v1/ep/load").json()
    pairs_LR, counts_LE = load["total"]["pairs_LR"], load["total"]["counts_LE"]
    assert [sum(pairs) for pairs in pairs_LR] == [sum(counts) for counts in counts_LE]
    assert len(counts_LE[0]) == 8
    assert load["history"]
    assert "setInterval(refresh" in server.client.get("/dashboard").text


def test_clients_that_come_and_go_lose_nothing(
    server: Server, dense: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short soak: `python -m bench soak` has the long one."""
    model, tokenizer = dense
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    kinds = soak.kinds_of(tokenizer, 8, input_len=24, output_len=12, seed=1)
    expected = {job: soak.dense_answer(model, job) for job in kinds}
    jobs = soak.jobs_of(kinds, 48, seed=1)
    process = psutil.Process(server.process.pid)
    report = soak.soak(server.url, MODEL, process, jobs, expected, tokenizer, max_concurrency=12)
    assert (report["num_lost"], report["num_wrong"], report["num_unfinished"]) == (0, 0, 0), report
    assert report["num_left"] > 5
    assert report["num_processes"] == [2 * NUM_RANKS + 1] * 2


def test_errors_are_those_of_openai(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"600 tokens and max_tokens is 1, .* at most 512"):
        client.completions.create(model=MODEL, prompt=[1] * 600, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="n: Input should be less than or equal to"):
        client.completions.create(model=MODEL, prompt="a", n=10**6)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        client.completions.create(model="gpt-5", prompt="a")
    answer = server.client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_http_process_does_without_torch(server: Server) -> None:
    has_torch = {}
    for process in server.tree():
        for module in {"rq_ep.serve.http.http_process", "rq_ep.serve.rank.rank_process"} & set(process.cmdline()):
            has_torch[module.split(".")[2]] = any("libtorch" in file.path for file in process.memory_maps())
    assert has_torch == {"http": False, "rank": True}


def test_a_client_that_leaves_makes_room(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 500, "temperature": 0, "stream": True, "ignore_eos": True}
    before = metric(server, "rq_ep_generation_tokens_total")
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until(lambda: metric(server, "rq_ep_num_requests_unfinished") == 0 == metric(server, "rq_ep_num_requests_running"))
    assert metric(server, "rq_ep_generation_tokens_total") < before + 500


def metric(server: Server, name: str) -> float:
    """Sum of a metric's series."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def test_metrics_tell_of_loads_and_bytes(server: Server) -> None:
    until(lambda: metric(server, "rq_ep_tokens_routed_total") > 0)
    assert 1 <= metric(server, "rq_ep_layer_imbalance_ratio") / 2 <= NUM_RANKS
    assert 0.5 <= metric(server, "rq_ep_balancedness") <= 1
    layout = ExpertLayout({"gate_up_proj": (2 * 32, 64), "down_proj": (64, 32)})
    assert metric(server, "rq_ep_expert_weight_bytes") == 2 * 8 * get_format("fp32").nbytes(layout)
    assert metric(server, "rq_ep_time_to_first_token_seconds_count") > 10
    assert server.client.get("/server_info").json()["num_ranks"] == NUM_RANKS


def test_sigterm_lets_streams_finish_and_leaves_nothing_behind(server: Server) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
    processes = server.tree()
    assert len(processes) == 1 + 2 * NUM_RANKS + 1, "a supervisor for each rank"
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.signal(0, signal.SIGTERM)
        draining = None
        for _ in range(50):
            draining = server.client.post("/v1/completions", json={"model": MODEL, "prompt": "b", "max_tokens": 1})
            if draining.status_code == 503:
                break
            time.sleep(0.05)
        assert draining is not None
        assert (draining.status_code, "draining" in draining.text) == (503, True)
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    assert server.wait(processes, 30) == 0
