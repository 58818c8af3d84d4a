"""Speed and latency over the last minutes, a sample a second."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rq_ep.serve.http.metrics import Metrics

EVERY_S = 1.0
MAX_SAMPLES = 600


@dataclass(frozen=True)
class Sample:
    """Rates and latencies since the sample before; latencies in ms, None where nothing was observed."""

    time: float  # seconds since the epoch
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    num_unfinished: int
    balancedness: float | None
    ttft_ms_p50: float | None
    itl_ms_p50: float | None
    itl_ms_p99: float | None


class History:
    """The last samples of a server's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._before = (time.monotonic(), metrics.num_prompt_tokens, metrics.num_generated_tokens)

    def sample(self, num_unfinished: int) -> None:
        """Take a sample."""
        metrics = self._metrics
        now = (time.monotonic(), metrics.num_prompt_tokens, metrics.num_generated_tokens)
        seconds, num_prompt, num_generated = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        observed = metrics.take_observed()
        self._samples.append(
            Sample(
                time=time.time(),
                prompt_tokens_per_s=num_prompt / seconds,
                generation_tokens_per_s=num_generated / seconds,
                num_unfinished=num_unfinished,
                balancedness=metrics.balancedness,
                ttft_ms_p50=_percentile_ms(observed["ttft"], 0.5),
                itl_ms_p50=_percentile_ms(observed["itl"], 0.5),
                itl_ms_p99=_percentile_ms(observed["itl"], 0.99),
            )
        )

    def view(self) -> list[dict[str, Any]]:
        """The samples, oldest first."""
        return [asdict(sample) for sample in self._samples]


def _percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of the values do not exceed."""
    if not seconds:
        return None
    return sorted(seconds)[max(math.ceil(share * len(seconds)) - 1, 0)] * 1e3
