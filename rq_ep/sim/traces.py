"""Routing traces, and recorded loads divided among ranks.

Axes: N tokens of all steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.files.documents import check_regular, complete_file
from rq_ep.core.files.tensor_files import as_dtype, parse_metadata, read_tensors, write_tensors
from rq_ep.core.stats import PHASES, ExpertStats, ModelIdentity

FORMAT = "rq_ep.trace/1"
REQUIRED: dict[str, npt.DTypeLike] = {"ids_NLK": np.int32, "weights_NLK": np.float32, "tokens_S": np.int64}
OPTIONAL: dict[str, npt.DTypeLike] = {"sequence_N": np.int64, "phase_S": np.int64}


@dataclass(frozen=True)
class RoutingTrace:
    """The experts that each MoE layer's router chose for every token of S steps; N tokens in all, step after step.

    Where sequences were recorded, whole sequences are assigned to ranks: each stays on its rank from step to step, as
    on a server.
    """

    ids_NLK: npt.NDArray[np.int32]
    weights_NLK: npt.NDArray[np.float32]
    tokens_S: IntArray  # tokens of each step
    num_experts: int
    layers: tuple[int, ...]  # index of each MoE layer in the model
    sequence_N: IntArray | None = None  # number of the sequence that each token belongs to
    phase_S: IntArray | None = None  # index into `rq_ep.core.stats.PHASES`
    model: ModelIdentity | None = None
    source: str = field(default="trace", compare=False)  # where it was read from, for messages

    def __post_init__(self) -> None:
        shape = (int(self.tokens_S.sum()), len(self.layers), self.ids_NLK.shape[-1] if self.ids_NLK.ndim == 3 else -1)
        shapes = {"_NLK": shape, "_N": shape[:1], "_S": (len(self.tokens_S.ravel()),)}
        for name, dtype in (REQUIRED | OPTIONAL).items():
            array = getattr(self, name)
            if array is None and name in OPTIONAL:
                continue
            if array.dtype != dtype or array.shape != shapes[name[name.index("_") :]]:
                raise UserError(
                    f"{self.source}: {name} is {array.dtype} {list(array.shape)}, which {len(self.layers)} layers and "
                    f"{shape[0]} tokens of {len(self.tokens_S)} steps do not have: record it again"
                )
        wrong_S = (self.tokens_S < 0) | (self.tokens_S > len(self.ids_NLK))  # the sum may have overflowed
        if wrong_S.any():
            raise UserError(f"{self.source}: a step of {self.tokens_S[wrong_S][0]} tokens: record it again")
        if self.sequence_N is not None and self.sequence_N.size and self.sequence_N.min() < 0:
            raise UserError(f"{self.source}: sequence {self.sequence_N.min()}: record it again")
        if self.phase_S is not None and not np.isin(self.phase_S, range(len(PHASES))).all():
            raise UserError(f"{self.source}: phases {sorted(set(self.phase_S.tolist()))}: record it again")
        wrong = self.ids_NLK[(self.ids_NLK < 0) | (self.ids_NLK >= check_integer("num_experts", self.num_experts, 1))]
        if wrong.size:
            raise UserError(f"{self.source}: expert {wrong[0]} of {self.num_experts}: record it again")

    def check(self, stats: ExpertStats) -> None:
        """Raise a `UserError` unless it was recorded on the model of `stats`."""
        if (self.layers, self.num_experts) != (stats.layers, stats.num_experts):
            raise UserError(
                f"{self.source}: {self.num_experts} experts in layers {list(self.layers)}, but {stats.source} has "
                f"{stats.num_experts} in layers {list(stats.layers)}: record the model that was calibrated"
            )
        if self.model is not None and stats.model is not None:
            stats.model.check(self.model, f"trace {self.source}")

    def ranks_N(self, num_ranks: int) -> IntArray:
        """[N] the rank that would have served each token.

        Sequences are assigned round-robin; without them, each step's tokens are divided into equal runs.
        """
        if self.sequence_N is not None:
            of_sequence: IntArray = self.sequence_N % num_ranks
            return of_sequence
        # As np.array_split does: the first ranks take one more.
        runs_SR = self.tokens_S[:, None] // num_ranks + (np.arange(num_ranks) < self.tokens_S[:, None] % num_ranks)
        in_runs: IntArray = np.repeat(np.tile(np.arange(num_ranks), len(self.tokens_S)), runs_SR.ravel())
        return in_runs

    def counts(self, num_ranks: int) -> IntArray:
        """[S, L, R, E] pairs from each source rank; tokens are assigned as in `ranks_N`."""
        num_steps, num_layers = len(self.tokens_S), len(self.layers)
        rank_N, step_N = self.ranks_N(num_ranks), np.repeat(np.arange(num_steps), self.tokens_S)
        row_NL = (step_N[:, None] * num_layers + np.arange(num_layers)) * num_ranks + rank_N[:, None]
        shape = (num_steps, num_layers, num_ranks, self.num_experts)
        keys = (row_NL[:, :, None] * self.num_experts + self.ids_NLK).ravel()
        counts: IntArray = np.bincount(keys, minlength=int(np.prod(shape))).reshape(shape)
        return counts

    def steps(self, chosen_S: IntArray, num_ranks: int) -> Iterator[IntArray]:
        """[L, R, E] pairs of each chosen step, one at a time: all of `counts` may not fit the memory."""
        ends_S = np.cumsum(self.tokens_S)
        for step in chosen_S.tolist():
            tokens = slice(int(ends_S[step] - self.tokens_S[step]), int(ends_S[step]))
            yield self._part(slice(step, step + 1), tokens).counts(num_ranks)[0]

    def head(self, num_steps: int) -> "RoutingTrace":
        """Its first steps."""
        return self._part(slice(num_steps), slice(int(self.tokens_S[:num_steps].sum())))

    def _part(self, steps: slice, tokens: slice) -> "RoutingTrace":
        return replace(
            self,
            ids_NLK=self.ids_NLK[tokens],
            weights_NLK=self.weights_NLK[tokens],
            tokens_S=self.tokens_S[steps],
            sequence_N=None if self.sequence_N is None else self.sequence_N[tokens],
            phase_S=None if self.phase_S is None else self.phase_S[steps],
        )

    @classmethod
    def joined(cls, traces: "list[RoutingTrace]") -> "RoutingTrace":
        """One trace of what several ranks recorded in the same steps: in each step the tokens of one after another.

        A step is `prefill` where it was on any rank.
        """
        first, num_ranks = traces[0], len(traces)
        ends = [np.cumsum(trace.tokens_S)[:-1] for trace in traces]

        def together(name: str) -> Any:
            by_rank = [np.split(getattr(trace, name), end) for trace, end in zip(traces, ends, strict=True)]
            return np.concatenate([part for step in zip(*by_rank, strict=True) for part in step])

        tokens_S = np.sum([trace.tokens_S for trace in traces], axis=0)
        # Numbered so that as many ranks get again what each has recorded.
        numbered = [
            replace(trace, sequence_N=trace.sequence_N * num_ranks + rank)
            for rank, trace in enumerate(traces)
            if trace.sequence_N is not None
        ]
        has_sequences = len(numbered) == num_ranks
        phases = [trace.phase_S for trace in traces if trace.phase_S is not None]
        traces = numbered if has_sequences else traces
        return cls(
            together("ids_NLK"),
            together("weights_NLK"),
            tokens_S,
            first.num_experts,
            first.layers,
            sequence_N=together("sequence_N") if has_sequences else None,
            phase_S=np.min(phases, axis=0) if len(phases) == num_ranks else None,
            model=first.model,
        )

    def save(self, path: str | Path) -> None:
        """Write the trace; a reader never sees half of it."""
        arrays = {name: array for name in (*REQUIRED, *OPTIONAL) if (array := getattr(self, name)) is not None}
        model = None if self.model is None else {"id": self.model.id, "hash": self.model.hash}
        metadata = {"num_experts": self.num_experts, "layers": self.layers, "model": model}
        write_tensors(path, FORMAT, arrays, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read a trace; a `UserError` says what is wrong with a foreign or damaged file."""
        hint = f"record one with `rq-ep calibrate --trace {path}`"
        dtypes = REQUIRED | OPTIONAL
        arrays, metadata = read_tensors(path, "trace", FORMAT, hint, dtypes)
        with complete_file(path, "trace"):
            model = metadata.get("model")
            return cls(
                **{name: as_dtype(f"{path}: {name}", array, dtypes[name]) for name, array in arrays.items()},
                num_experts=metadata["num_experts"],
                layers=tuple(metadata["layers"]),
                model=None if model is None else ModelIdentity(**model),
                source=str(path),
            )


def is_trace(path: str | Path) -> bool:
    """Whether a file says that it is a routing trace. What is wrong with it otherwise is for `load` to say."""
    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            return bool(parse_metadata((file.metadata() or {}).get("format", "")) == FORMAT)
    except (SafetensorError, OSError):
        return False
