"""The server's metrics for Prometheus. Times are taken on one clock, that of the HTTP process, from arrival on."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rq_ep.core.cost import LAYER_PHASES
from rq_ep.serve.messages import LoadSums, RankStats, RebalanceStatus

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's counters; every series carries the model's name.

    Args:
        model_name: as clients know it.
        num_unfinished: requests in the server now.
    """

    def __init__(self, model_name: str, num_unfinished: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name

        def make(kind: type, name: str, text: str, labels: Sequence[str] = (), **more: object):  # type: ignore[no-untyped-def]
            return kind(f"rq_ep_{name}", text, ["model_name", *labels], registry=self.registry, **more)

        self._requests = make(Counter, "request_success", "Requests that ended well", ["finished_reason"])
        self._failed = make(Counter, "request_failure", "Requests refused or failed, by HTTP status", ["status"])
        self._prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts taken")
        self._generated = make(Counter, "generation_tokens", "Tokens generated")
        self._times = {
            name: make(Histogram, series, text, buckets=buckets).labels(model_name)
            for name, series, text, buckets in (
                ("ttft", "time_to_first_token_seconds", "Arrival to first token", _SLOW_S),
                ("itl", "inter_token_latency_seconds", "Between tokens of a request", _FAST_S),
                ("tpot", "request_time_per_output_token_seconds", "A request's mean after its first", _FAST_S),
                ("e2e", "e2e_request_latency_seconds", "Arrival to end", _SLOW_S),
                ("queue", "request_queue_time_seconds", "On a rank, before its first step", _SLOW_S),
                ("prefill", "request_prefill_time_seconds", "First step to first token", _SLOW_S),
                ("decode", "request_decode_time_seconds", "First token to end", _SLOW_S),
            )
        }
        self._running = make(Gauge, "num_requests_running", "Requests in a batch", ["ep_rank"])
        self._waiting = make(Gauge, "num_requests_waiting", "Requests not yet started", ["ep_rank"])
        self._kv_usage = make(Gauge, "kv_cache_usage_perc", "Share of a rank's KV cache in use, 0 to 1", ["ep_rank"])
        self._steps = make(Counter, "engine_steps", "Steps of a rank with tokens of its own", ["ep_rank"])
        self._step_s = make(Counter, "engine_step_seconds", "Time in these steps", ["ep_rank"])
        self._unfinished = make(Gauge, "num_requests_unfinished", "Requests in the server")
        self._unfinished.labels(model_name).set_function(num_unfinished)
        self._routed = make(Counter, "tokens_routed", "Routed pairs computed by a rank", ["layer", "ep_rank"])
        self._by_format = make(Counter, "replica_tokens", "Routed pairs by weight format", ["layer", "precision"])
        self._calls = make(Counter, "moe_layer_calls", "Layers entered, all together, in steps with tokens")
        self._phases = {
            phase: make(Counter, f"{phase}_seconds", f"Rank 0's time in {phase}, all MoE layers together")
            for phase in LAYER_PHASES
        }
        self._borrowed = make(Counter, "rearrangements", "Experts lent to another rank for a step")
        self._borrowed_bytes = make(Counter, "rearranged_bytes", "Bytes of weights that travelled for it")
        self._imbalance = make(Gauge, "layer_imbalance_ratio", "max/mean over ranks, mean of recent steps", ["layer"])
        self._balancedness = make(Gauge, "balancedness", "mean/max over ranks, mean of layers and recent steps")
        self._balancedness_min = make(Gauge, "balancedness_min", "balancedness of the worst layer")
        self._weights = make(Gauge, "expert_weight_bytes", "Expert weights of a rank", ["ep_rank", "precision"])
        self._ranks = make(Gauge, "ranks", "Ranks by state", ["state"])
        self._rank_failures = make(Counter, "rank_failures", "Members of the group that were lost")
        self._recovery = make(Histogram, "recovery_seconds", "After a loss, by part", ["part"], buckets=_SLOW_S)
        self._resumed = make(Counter, "requests_resumed", "Requests that went on on another rank")
        for counter in (self._rank_failures, self._resumed):
            counter.labels(model_name)  # shown before there is one
        self._make = make
        self._rebalance_status: RebalanceStatus | None = None
        self.balancedness: float | None = None
        self._weight_formats: set[str] = set()  # that any rank has held
        self.kv_usage_R: dict[int, float] = {}
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._observed: dict[str, list[float]] = {name: [] for name in self._times}

    def take_observed(self) -> dict[str, list[float]]:
        """Seconds by histogram, since the last call."""
        taken, self._observed = self._observed, {name: [] for name in self._times}
        return taken

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def refused(self, status: int) -> None:
        self._failed.labels(self._model, str(status)).inc()

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram: ttft, itl, tpot, e2e, queue, prefill or decode."""
        self._times[name].observe(seconds)
        self._observed[name].append(seconds)

    def count_prompt(self, num_tokens: int) -> None:
        self.num_prompt_tokens += num_tokens
        self._prompt_tokens.labels(self._model).inc(num_tokens)

    def count_generated(self, num_tokens: int) -> None:
        self.num_generated_tokens += num_tokens
        self._generated.labels(self._model).inc(num_tokens)

    def count_finished(self, reason: str) -> None:
        self._requests.labels(self._model, reason).inc()

    def weights(self, bytes_R: Sequence[Mapping[str, int]]) -> None:
        """Set the bytes of expert weights of each rank, by format."""
        names = {name for by_format in bytes_R for name in by_format} | self._weight_formats
        self._weight_formats = names
        for rank, by_format in enumerate(bytes_R):
            for name in names:
                self._weights.labels(self._model, str(rank), name).set(by_format.get(name, 0))

    def rank(self, rank: int, stats: RankStats) -> None:
        """Take the figures of a rank."""
        labels = self._model, str(rank)
        self._running.labels(*labels).set(stats.num_running)
        self._waiting.labels(*labels).set(stats.num_waiting)
        self._kv_usage.labels(*labels).set(stats.kv_cache_usage)
        self.kv_usage_R[rank] = stats.kv_cache_usage
        self._steps.labels(*labels).inc(stats.num_steps)
        self._step_s.labels(*labels).inc(stats.steps_s)

    def count_ranks(self, states: Iterable[str], count: Callable[[str], int]) -> None:
        """Show how many ranks are in each state."""
        for state in states:
            self._ranks.labels(self._model, state).set_function(partial(count, state))

    def rank_lost(self, rank: int, was_member: bool) -> None:
        """A rank has no figures any more."""
        if was_member:
            self._rank_failures.labels(self._model).inc()
        if self.kv_usage_R.pop(rank, None) is not None:
            for gauge in (self._running, self._waiting, self._kv_usage):
                gauge.remove(self._model, str(rank))

    def recovery(self, seconds: Mapping[str, float]) -> None:
        """Take the seconds of the parts of a recovery: detect, re-form, re-home, re-prefill (of a request), total."""
        for part, duration in seconds.items():
            self._recovery.labels(self._model, part).observe(duration)

    def request_resumed(self) -> None:
        self._resumed.labels(self._model).inc()

    def loads(self, loads: LoadSums) -> None:
        """Add the load of recent steps, and set each layer's mean imbalance."""
        for at, layer in enumerate(loads["layers"]):
            for rank, pairs in enumerate(loads["pairs_LR"][at]):
                self._routed.labels(self._model, str(layer), str(rank)).inc(pairs)
            for name, pairs in loads["formats_L"][at].items():
                self._by_format.labels(self._model, str(layer), name).inc(pairs)
            self._imbalance.labels(self._model, str(layer)).set(loads["imbalance_L"][at])
        self._calls.labels(self._model).inc(sum(loads["num_calls_L"]))
        for phase, seconds in loads["seconds"].items():
            self._phases[phase].labels(self._model).inc(seconds)
        self._borrowed.labels(self._model).inc(loads["borrowed_experts"])
        self._borrowed_bytes.labels(self._model).inc(loads["borrowed_bytes"])
        self.balancedness = sum(1 / value for value in loads["imbalance_L"]) / len(loads["imbalance_L"])
        self._balancedness.labels(self._model).set(self.balancedness)
        self._balancedness_min.labels(self._model).set(1 / max(loads["imbalance_L"]))

    def add_rebalancing(self, seconds_since_progress: Callable[[], float]) -> None:
        """Add the series of a server that rebalances."""
        make = self._make
        self._generation = make(Gauge, "placement_generation", "Number of the last re-placement that was begun")
        self._rebalances = make(Counter, "rebalance", "Decisions by what became of them", ["result"])
        self._moved_bytes = make(Counter, "rebalance_moved_bytes", "Bytes of experts that ranks have received")
        progress = make(Gauge, "rebalance_seconds_since_progress", "Of what is under way, or 0")
        progress.labels(self._model).set_function(seconds_since_progress)

    def rebalancing(self, status: RebalanceStatus) -> None:
        """Take the state of re-placements; a rank that leads from now on counts from zero on."""
        before, self._rebalance_status = self._rebalance_status, status
        results, moved_bytes = ({}, 0) if before is None else (before.results, before.moved_bytes)
        if status.moved_bytes < moved_bytes or sum(status.results.values()) < sum(results.values()):
            results, moved_bytes = {}, 0
        self._generation.labels(self._model).set(status.generation)
        for result, number in status.results.items():
            self._rebalances.labels(self._model, result).inc(number - results.get(result, 0))
        self._moved_bytes.labels(self._model).inc(status.moved_bytes - moved_bytes)

    def arrival(self) -> "RequestMetrics":
        """Start the clock of a request that has just arrived."""
        return RequestMetrics(self)


class RequestMetrics:
    """The times of one request."""

    def __init__(self, metrics: Metrics, start_s: float | None = None) -> None:
        self._metrics = metrics
        self._start_s = time.monotonic() if start_s is None else start_s
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_tokens = 0

    def of_another(self) -> "RequestMetrics":
        """The times of one of several answers to what has arrived."""
        return RequestMetrics(self._metrics, self._start_s)

    def prompt(self, num_tokens: int) -> None:
        """The request is taken, with a prompt of so many tokens."""
        self._metrics.count_prompt(num_tokens)

    def tokens(self, num_tokens: int, queued_s: float | None = None) -> None:
        """Tokens have come; the first ones with the time that the request had waited on its rank."""
        if num_tokens == 0:
            return
        now_s = time.monotonic()
        if self._num_tokens == 0:
            self._first_s = now_s
            self._metrics.observe("ttft", now_s - self._start_s)
            if queued_s is not None:
                self._metrics.observe("queue", queued_s)
                self._metrics.observe("prefill", now_s - self._start_s - queued_s)
        else:
            self._metrics.observe("itl", now_s - self._last_s)
        self._last_s = now_s
        self._num_tokens += num_tokens
        self._metrics.count_generated(num_tokens)

    def finished(self, reason: str) -> None:
        """The request ended well."""
        self._metrics.count_finished(reason)
        self._metrics.observe("e2e", time.monotonic() - self._start_s)
        if self._num_tokens > 0:
            self._metrics.observe("decode", self._last_s - self._first_s)
        if self._num_tokens > 1:
            self._metrics.observe("tpot", (self._last_s - self._first_s) / (self._num_tokens - 1))
