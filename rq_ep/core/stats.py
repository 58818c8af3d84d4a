"""Expert statistics: what calibration measures of a model's experts, and the file that `place` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import MAX_INTEGER, UserError, check_integer, check_text
from rq_ep.core.files.documents import complete_file
from rq_ep.core.files.tensor_files import as_dtype, read_tensors, write_tensors

FORMAT = "rq_ep.stats/1"
PHASES = ("prefill", "decode")
MAX_EXPERT_BYTES = 2**40


class ArrayField(NamedTuple):
    """An array of the statistics: its type, and a letter for each axis."""

    dtype: type
    axes: str


ARRAYS = {
    "counts": ArrayField(np.int64, "SLE"),
    "tokens": ArrayField(np.int64, "S"),
    "phase": ArrayField(np.int64, "S"),
    "domain": ArrayField(np.int64, "S"),
    "importance": ArrayField(np.float64, "LE"),
    "visits": ArrayField(np.int64, "LE"),
    "gate_mass": ArrayField(np.float64, "LE"),
    "error": ArrayField(np.float64, "LEQ"),
    "kl": ArrayField(np.float64, "LEQ"),
}


UNKNOWN_HASH = "unknown"  # of weights that were not read: it says nothing against any model


@dataclass(frozen=True)
class ModelIdentity:
    """The identity of a checkpoint: a readable id, and a hash of its configuration and weights."""

    id: str
    hash: str

    def __post_init__(self) -> None:
        check_text("model id", self.id)
        check_text("model hash", self.hash)

    def check(self, other: "ModelIdentity", what: str) -> None:
        """Raise if `what`, made for `other`, is used with this model."""
        if self.hash != other.hash and UNKNOWN_HASH not in (self.hash, other.hash):
            raise UserError(
                f"{what} was made for model {other.id!r} ({other.hash[:12]}), not for {self.id!r} ({self.hash[:12]}): "
                "calibrate and place this model"
            )


@dataclass(frozen=True)
class ExpertStats:
    """Loads, sizes and sensitivities of all routed experts of a model.

    Only the first four fields are required; what is missing limits the objectives and caps of a solver.
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
        self._check_array("counts", {})
        if self.counts.sum(dtype=np.float64) > MAX_INTEGER:
            raise UserError(f"counts add up to {self.counts.sum(dtype=np.float64):.3g}: these are not pairs of a model")
        num_steps, num_layers, num_experts = self.counts.shape
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(num_layers)))
        if len(self.layers) != num_layers:
            raise UserError(f"{len(self.layers)} layer indices for {num_layers} layers of counts")
        if [check_integer("layer", layer) for layer in self.layers] != sorted(set(self.layers)):
            raise UserError(f"layers {list(self.layers)} must come once each, in ascending order")
        sizes = {"S": num_steps, "L": num_layers, "E": num_experts, "Q": len(self.formats)}
        for name in ARRAYS:
            if getattr(self, name) is not None:
                self._check_array(name, sizes)
        for name, choices in (("phase", PHASES), ("domain", self.domains)):
            array = getattr(self, name)
            if array is not None and array.size and array.max() >= len(choices):
                raise UserError(f"{name} {array.max()} of a step: there are {len(choices)}")

    def _check_array(self, name: str, sizes: Mapping[str, int]) -> None:
        """Raise a `UserError` unless an array has its type and shape and holds only numbers from 0 upwards.

        Args:
            name: of the field.
            sizes: axis -> its length; an axis that is not named may have any.
        """
        array: Any = getattr(self, name)
        dtype, axes = ARRAYS[name]
        fits = array.ndim == len(axes) and all(sizes.get(axis, size) == size for axis, size in zip(axes, array.shape))
        if array.dtype != dtype or not fits:
            shape = ", ".join(str(sizes.get(axis, "any")) for axis in axes)
            raise UserError(f"{name} must be {np.dtype(dtype)} [{shape}], not {array.dtype} {list(array.shape)}")
        wrong = array[~(np.isfinite(array) & (array >= 0))]
        if wrong.size:
            raise UserError(f"{name} must be finite and not negative, but one is {wrong[0]}")

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
        """Statistics of a model that was not calibrated: every expert gets the same load."""
        counts = np.ones((1, len(layers), num_experts), dtype=np.int64)
        return cls(counts, tuple(expert_bytes), native_format, dict(expert_bytes), layers=layers)

    def save(self, path: str | Path) -> None:
        """Write the `stats.safetensors` file."""
        arrays = {name: array for name in ARRAYS if (array := getattr(self, name)) is not None}
        metadata = {
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
        write_tensors(path, FORMAT, arrays, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "ExpertStats":
        """Read a `stats.safetensors` file; a `UserError` says what is wrong with a foreign or damaged one.

        Arrays may be of any integer or float type that holds their values, metadata JSON or plain text.
        """
        hint = f"write it with `rq-ep calibrate --out {path}`"
        arrays, metadata = read_tensors(path, "statistics", FORMAT, hint, ARRAYS)
        with complete_file(path, "statistics"):
            model = metadata.get("model")
            return cls(
                **{name: as_dtype(f"{path}: {name}", array, ARRAYS[name].dtype) for name, array in arrays.items()},
                formats=_names(metadata["formats"]),
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
                domains=_names(metadata.get("domains") or ()),
                source=str(path),
            )


def _names(value: Any) -> tuple[str, ...]:
    """Names in a list or, as plain text, by commas."""
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)
