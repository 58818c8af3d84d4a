"""Recorded routing and recorded loads, dealt to the ranks that would have served them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.files import replacing

FORMAT = "rq_ep.trace/1"


@dataclass(frozen=True)
class RoutingTrace:
    """What the router of every MoE layer chose for every token of S steps; N tokens in all, step after step."""

    ids_NLK: npt.NDArray[np.int32]
    weights_NLK: npt.NDArray[np.float32]
    tokens_S: IntArray  # tokens of each step
    num_experts: int
    layers: tuple[int, ...]  # index of each MoE layer in the model
    source: str = field(default="trace", compare=False)  # where it was read from, for messages

    def __post_init__(self) -> None:
        shape = (int(self.tokens_S.sum()), len(self.layers), self.ids_NLK.shape[-1] if self.ids_NLK.ndim == 3 else -1)
        wanted = {"ids_NLK": np.int32, "weights_NLK": np.float32, "tokens_S": np.int64}
        for name, dtype in wanted.items():
            array = getattr(self, name)
            fits = array.ndim == 1 if name == "tokens_S" else array.shape == shape
            if array.dtype != dtype or not fits:
                found = f"{array.dtype} {list(array.shape)}"
                raise UserError(
                    f"{self.source}: {name} is {found}, which {len(self.layers)} layers and {shape[0]} tokens of "
                    f"{len(self.tokens_S)} steps do not have: record it again"
                )
        if self.tokens_S.size and self.tokens_S.min() < 0:
            raise UserError(f"{self.source}: a step of {self.tokens_S.min()} tokens: record it again")
        wrong = self.ids_NLK[(self.ids_NLK < 0) | (self.ids_NLK >= check_integer("num_experts", self.num_experts, 1))]
        if wrong.size:
            raise UserError(f"{self.source}: expert {wrong[0]} of {self.num_experts}: record it again")

    def counts(self, num_ranks: int) -> IntArray:
        """[S, L, R, E] pairs from each source rank; each step's tokens are dealt to the ranks in equal runs."""
        num_steps, num_layers = len(self.tokens_S), len(self.layers)
        # As np.array_split deals: the first ranks take one more.
        runs_SR = self.tokens_S[:, None] // num_ranks + (np.arange(num_ranks) < self.tokens_S[:, None] % num_ranks)
        run_N = np.repeat(np.arange(num_steps * num_ranks), runs_SR.ravel())
        step_N, rank_N = np.divmod(run_N, num_ranks)
        row_NL = (step_N[:, None] * num_layers + np.arange(num_layers)) * num_ranks + rank_N[:, None]
        shape = (num_steps, num_layers, num_ranks, self.num_experts)
        keys = (row_NL[:, :, None] * self.num_experts + self.ids_NLK).ravel()
        counts: IntArray = np.bincount(keys, minlength=int(np.prod(shape))).reshape(shape)
        return counts

    @classmethod
    def joined(cls, traces: "list[RoutingTrace]") -> "RoutingTrace":
        """One trace of what several ranks recorded in the same steps: in each step the tokens of one after another."""
        first = traces[0]
        ends = [np.cumsum(trace.tokens_S)[:-1] for trace in traces]

        def together(name: str) -> Any:
            by_rank = [np.split(getattr(trace, name), end) for trace, end in zip(traces, ends, strict=True)]
            return np.concatenate([part for step in zip(*by_rank, strict=True) for part in step])

        tokens_S = np.sum([trace.tokens_S for trace in traces], axis=0)
        return cls(together("ids_NLK"), together("weights_NLK"), tokens_S, first.num_experts, first.layers)

    def save(self, path: str | Path) -> None:
        """Write the trace; a reader never sees half of it."""
        names = ("ids_NLK", "weights_NLK", "tokens_S")
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in names}
        metadata = {"format": FORMAT, "num_experts": self.num_experts, "layers": self.layers}
        with replacing(path) as temporary:
            save_file(arrays, temporary, {key: json.dumps(value) for key, value in metadata.items()})

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read a trace; a `UserError` says what is wrong with a foreign or damaged file."""
        try:
            with safe_open(path, framework="numpy") as file:
                texts = file.metadata() or {}
                if texts.get("format") != json.dumps(FORMAT):
                    raise UserError(f"{path}: format is {texts.get('format')}, expected {FORMAT!r}")
                arrays = {name: file.get_tensor(name) for name in ("ids_NLK", "weights_NLK", "tokens_S")}
            layers = tuple(json.loads(texts["layers"]))
            return cls(**arrays, num_experts=json.loads(texts["num_experts"]), layers=layers, source=str(path))
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; record a trace with rq_ep.moe.RoutingRecorder") from None
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a readable trace ({error}); record it again") from None


def deal_counts(counts_SLE: IntArray, num_ranks: int) -> IntArray:
    """[S, L, R, E] pairs from each source rank: as even as possible, remainders to ranks in turn.

    Args:
        counts_SLE: recorded pairs per step, layer and expert; which rank they came from was not recorded.
        num_ranks: R.
    """
    num_experts = counts_SLE.shape[2]
    base_SLE, rest_SLE = np.divmod(counts_SLE, num_ranks)
    # A rank's turn comes after the last remainder dealt, so that no rank collects the remainders of all experts.
    first_SLE = (np.cumsum(rest_SLE, axis=2) - rest_SLE) % num_ranks
    turn_SLRE = (np.arange(num_ranks).reshape(1, 1, num_ranks, 1) - first_SLE[:, :, None]) % num_ranks
    dealt: IntArray = base_SLE[:, :, None] + (turn_SLRE < rest_SLE[:, :, None])
    assert dealt.shape == (*counts_SLE.shape[:2], num_ranks, num_experts)
    return dealt
