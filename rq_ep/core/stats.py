"""Expert statistics: what calibration learns about a model's experts, and the file that carries it to `place`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import MAX_INTEGER, UserError, check_integer, check_text
from rq_ep.core.files import replacing

FORMAT = "rq_ep.stats/1"
PHASES = ("prefill", "decode")
MAX_EXPERT_BYTES = 2**40


@dataclass(frozen=True)
class ModelIdentity:
    """Which checkpoint a file speaks of: a readable id and a hash of its configuration and weights."""

    id: str
    hash: str

    def __post_init__(self) -> None:
        check_text("model id", self.id)
        check_text("model hash", self.hash)

    def check(self, other: "ModelIdentity", what: str) -> None:
        """Raise if `what`, made for `other`, is used with this model."""
        if self.hash != other.hash:
            raise UserError(
                f"{what} was made for model {other.id!r} ({other.hash[:12]}), not for {self.id!r} ({self.hash[:12]}): "
                "calibrate and place this model"
            )


@dataclass(frozen=True)
class ExpertStats:
    """Loads, sizes and sensitivities of all routed experts of a model.

    Only the first four fields are required; what is missing limits what may be asked of a solver.
    Arrays are read-only by convention. Integer arrays are int64, floating ones float64.
    """

    counts: IntArray  # [S, L, E] routed (token, expert) pairs per step, MoE layer and expert
    formats: tuple[str, ...]  # Q names; `native_format` is one of them
    native_format: str
    expert_bytes: Mapping[str, int]  # format -> bytes of one expert, scales and padding included
    tokens: IntArray | None = None  # [S]
    phase: IntArray | None = None  # [S] index into PHASES
    domain: IntArray | None = None  # [S] index into `domains`
    importance: FloatArray | None = None  # [L, E]
    visits: IntArray | None = None  # [L, E] calibration pairs that `importance` and `error` rest on
    gate_mass: FloatArray | None = None  # [L, E] sum of routing weights
    error: FloatArray | None = None  # [L, E, Q] relative output error of each expert in each format
    kl: FloatArray | None = None  # [L, E, Q] nats per token between the model and itself with one expert in a format
    model: ModelIdentity | None = None
    layers: tuple[int, ...] = ()  # index of each MoE layer in the model; default 0..L-1
    hidden_size: int | None = None
    intermediate_size: int | None = None
    top_k: int | None = None
    expert_groups: int | None = None
    importance_definition: str | None = None
    num_tokens: int | None = None
    domains: tuple[str, ...] = ()
    source: str = field(default="statistics", compare=False)  # where it was read from, for messages

    def __post_init__(self) -> None:
        try:
            self._check()
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None

    def _check(self) -> None:
        for name in (self.native_format, *self.formats, *self.domains):
            check_text("name", name)
        if len(set(self.formats)) < len(self.formats):
            raise UserError(f"formats {', '.join(self.formats)}: a format is named twice")
        if self.native_format not in self.formats:
            raise UserError(f"native format {self.native_format!r} is not among formats {self.formats}")
        if missing := set(self.formats) - set(self.expert_bytes):
            raise UserError(f"expert_bytes lacks {', '.join(sorted(missing))}")
        for name, size in self.expert_bytes.items():
            check_integer(f"expert_bytes of {name}", size, 1, MAX_EXPERT_BYTES)
        for name in ("hidden_size", "intermediate_size", "top_k", "expert_groups", "num_tokens"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        _check_array("counts", self.counts, np.int64, (None, None, None))
        if self.counts.sum(dtype=np.float64) > MAX_INTEGER:
            raise UserError(f"counts add up to {self.counts.sum(dtype=np.float64):.3g}: these are not pairs of a model")
        num_steps, num_layers, num_experts = self.counts.shape
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(num_layers)))
        if len(self.layers) != num_layers:
            raise UserError(f"{len(self.layers)} layer indices for {num_layers} layers of counts")
        if [check_integer("layer", layer) for layer in self.layers] != sorted(set(self.layers)):
            raise UserError(f"layers {list(self.layers)} must come once each, in ascending order")
        per_step, per_expert = (num_steps,), (num_layers, num_experts)
        arrays: dict[str, tuple[type, tuple[int, ...]]] = {
            "tokens": (np.int64, per_step), "phase": (np.int64, per_step), "domain": (np.int64, per_step),
            "importance": (np.float64, per_expert), "visits": (np.int64, per_expert),
            "gate_mass": (np.float64, per_expert), "error": (np.float64, (*per_expert, len(self.formats))),
            "kl": (np.float64, (*per_expert, len(self.formats))),
        }  # fmt: skip
        for name, (dtype, shape) in arrays.items():
            if getattr(self, name) is not None:
                _check_array(name, getattr(self, name), dtype, shape)
        for name, choices in (("phase", PHASES), ("domain", self.domains)):
            array = getattr(self, name)
            if array is not None and array.size and array.max() >= len(choices):
                raise UserError(f"{name} {array.max()} of a step: there are {len(choices)}")

    @property
    def num_steps(self) -> int:
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.counts.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[2])

    @classmethod
    def uniform(
        cls, layers: tuple[int, ...], num_experts: int, expert_bytes: Mapping[str, int], native_format: str
    ) -> "ExpertStats":
        """Statistics of a model nobody has calibrated: every expert is taken to be equally busy."""
        counts = np.ones((1, len(layers), num_experts), dtype=np.int64)
        return cls(counts, tuple(expert_bytes), native_format, dict(expert_bytes), layers=layers)

    def save(self, path: str | Path) -> None:
        """Write the `stats.safetensors` file."""
        arrays = {name: np.ascontiguousarray(array) for name in _ARRAYS if (array := getattr(self, name)) is not None}
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "formats": self.formats,
            "native_format": self.native_format,
            "expert_bytes": dict(self.expert_bytes),
            "model": None if self.model is None else {"id": self.model.id, "hash": self.model.hash},
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "top_k": self.top_k,
            "expert_groups": self.expert_groups,
            "importance": self.importance_definition,
            "num_tokens": self.num_tokens,
            "domains": self.domains,
        }
        with replacing(path) as temporary:
            save_file(arrays, temporary, {key: json.dumps(value) for key, value in metadata.items()})

    @classmethod
    def load(cls, path: str | Path) -> "ExpertStats":
        """Read a `stats.safetensors` file; a `UserError` says what is wrong with a foreign or damaged one."""
        try:
            Path(path).open("rb").close()  # says why a file cannot be read; safetensors calls all of them missing
            with safe_open(path, framework="numpy") as file:
                texts = file.metadata() or {}
                if texts.get("format") != json.dumps(FORMAT):
                    raise UserError(f"{path}: format is {texts.get('format')}, expected {FORMAT!r}")
                arrays = {name: file.get_tensor(name) for name in file.keys() if name in _ARRAYS}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; write it with `rq-ep calibrate --out {path}`") from None
        except (SafetensorError, TypeError, OSError) as error:  # TypeError: a dtype that NumPy lacks
            raise UserError(f"{path}: not a readable statistics file ({error})") from None
        try:
            metadata = {key: json.loads(value) for key, value in texts.items()}
            model = metadata.get("model")
            return cls(
                **arrays,
                formats=tuple(metadata["formats"]),
                native_format=metadata["native_format"],
                expert_bytes=metadata["expert_bytes"],
                model=None if model is None else ModelIdentity(**model),
                layers=tuple(metadata.get("layers") or ()),
                hidden_size=metadata.get("hidden_size"),
                intermediate_size=metadata.get("intermediate_size"),
                top_k=metadata.get("top_k"),
                expert_groups=metadata.get("expert_groups"),
                importance_definition=metadata.get("importance"),
                num_tokens=metadata.get("num_tokens"),
                domains=tuple(metadata.get("domains") or ()),
                source=str(path),
            )
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: incomplete statistics file ({type(error).__name__}: {error})") from None


def _check_array(name: str, array: Any, dtype: type, shape: tuple[int | None, ...]) -> None:
    """Raise a `UserError` unless `array` has the type and shape (None: any) and holds only numbers from 0 upwards."""
    fits = array.ndim == len(shape) and all(size in (None, found) for size, found in zip(shape, array.shape))
    if array.dtype != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{name} must be {np.dtype(dtype)} [{wanted}], not {array.dtype} {list(array.shape)}")
    wrong = array[~(np.isfinite(array) & (array >= 0))]
    if wrong.size:
        raise UserError(f"{name} must be finite and not negative, but one is {wrong[0]}")


_ARRAYS = tuple(f.name for f in fields(ExpertStats) if "ndarray" in str(f.type))
