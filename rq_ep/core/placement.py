"""Placement: which rank holds a replica of which expert, in which format, for what share of its pairs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError, check_integer, check_number, check_text
from rq_ep.core.files.documents import read_document, write_json
from rq_ep.core.replicas import Replica, Replicas, replica_bytes
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.core.topology import Topology

FORMAT = "rq_ep.placement/1"
SHARES_TOLERANCE = 1e-5  # of an expert's shares, which sum to 1


@dataclass(frozen=True)
class LayerPlacement:
    """The replicas of one MoE layer, and the balance that the solver predicts.

    `predicted` and `bound` are max/mean load over ranks, averaged over calibration steps; `bound` holds for every
    placement of the same bytes. `binding` says what keeps the bound from being lower.
    """

    index: int  # of the layer in the model
    num_experts: int
    replicas: Replicas
    shares_P: FloatArray  # planned fraction of the expert's pairs; sums to 1 over an expert's replicas
    predicted: float | None = None
    bound: float | None = None
    binding: str | None = None

    def __post_init__(self) -> None:
        where = f"layer {check_integer('layer', self.index)}"
        for name in ("predicted", "bound"):
            if getattr(self, name) is not None:
                check_number(f"{where}: {name}", getattr(self, name), 1 - 1e-6)
        if self.binding is not None:
            check_text(f"{where}: binding", self.binding)
        experts_P = self.replicas.experts_P
        if experts_P.size and (experts_P.min() < 0 or experts_P.max() >= self.num_experts):
            raise UserError(f"{where}: expert numbers must lie in 0..{self.num_experts - 1}")
        copies_E = np.bincount(experts_P, minlength=self.num_experts)
        if not copies_E.all():
            raise UserError(f"{where}: expert {int(np.argmin(copies_E))} has no replica")
        sums_E = np.bincount(experts_P, weights=self.shares_P, minlength=self.num_experts)
        error_E = np.abs(sums_E - 1)
        if (self.shares_P < 0).any() or not (error_E <= SHARES_TOLERANCE).all():
            worst = int(np.argmax(error_E))
            raise UserError(f"{where}: shares of expert {worst} sum to {sums_E[worst]:g}, not to 1")
        mixed_formats = self.replicas.mixed_formats
        if len(set(mixed_formats)) < len(mixed_formats):
            raise UserError(f"{where}: mixed_formats {', '.join(mixed_formats)}: a format is named twice")
        if len(set(self.replicas.formats_P)) > 1:
            self._check_formats(where)

    def _check_formats(self, where: str) -> None:
        mixed_formats = self.replicas.mixed_formats
        stored = list(zip(self.replicas.experts_P.tolist(), self.replicas.formats_P, strict=True))
        formats: dict[int, str] = {}
        for expert, format_ in stored if len(set(stored)) > self.num_experts else ():
            first = formats.setdefault(expert, format_)
            if first != format_ and not {first, format_} <= set(mixed_formats):
                raise UserError(
                    f"{where}: replicas of expert {expert} mix formats {first} and {format_}, "
                    f"but its mixed_formats are {list(mixed_formats)}"
                )

    @property
    def gap(self) -> float | None:
        """The distance of `predicted` from the bound, as a fraction of the bound."""
        return None if self.predicted is None or self.bound is None else self.predicted / self.bound - 1

    def loads_R(self, pairs_E: IntArray, num_ranks: int) -> FloatArray:
        """[R] what each rank computes of an expert's pairs, if these are split by the planned shares."""
        pairs_P = pairs_E[self.replicas.experts_P] * self.shares_P
        loads_R = np.zeros(num_ranks)
        np.add.at(loads_R, self.replicas.ranks_P, pairs_P)
        return loads_R

    def low_pairs(self, pairs_E: IntArray, native_format: str) -> float:
        """Pairs computed in a format other than the native one, if they are split by the planned shares."""
        low_P = np.array([name != native_format for name in self.replicas.formats_P], bool)
        return float((pairs_E[self.replicas.experts_P] * self.shares_P)[low_P].sum())

    @classmethod
    def even(
        cls,
        index: int,
        num_experts: int,
        replicas: Iterable[Replica],
        mixed_formats: Sequence[str] = (),
        **notes: Any,
    ) -> "LayerPlacement":
        """A layer whose replicas share their expert's pairs evenly."""
        return cls.sharing_evenly(index, num_experts, Replicas.of(replicas, mixed_formats), **notes)

    @classmethod
    def sharing_evenly(cls, index: int, num_experts: int, replicas: Replicas, **notes: Any) -> "LayerPlacement":
        """The same of replicas in their order."""
        copies_E = np.bincount(replicas.experts_P, minlength=num_experts)
        return cls(index, num_experts, replicas, 1 / np.maximum(copies_E, 1)[replicas.experts_P], **notes)


@dataclass(frozen=True)
class Placement:
    """A placement of all layers, with the bytes it takes on each rank (expert bytes, summed over layers)."""

    layers: tuple[LayerPlacement, ...]
    strategy: str
    topology: Topology
    bytes_R: tuple[int, ...]
    budget_bytes_R: tuple[int, ...] | None = None
    model: ModelIdentity | None = None
    tokens_per_step: int | None = None
    low_precision_cap: float | None = None
    low_precision_planned: float = 0.0  # share of calibration pairs computed in a format below the native one
    certificate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("strategy", self.strategy)
        numbers = [layer.index for layer in self.layers]
        if not numbers or numbers != sorted(set(numbers)):
            raise UserError(f"layers {numbers}: there must be at least one, each once, in ascending order")
        num_ranks = self.topology.num_ranks
        for name, sizes in (("bytes", self.bytes_R), ("budget_bytes", self.budget_bytes_R)):
            if sizes is not None and len(sizes) != num_ranks:
                raise UserError(f"{name} names {len(sizes)} ranks, but num_ranks is {num_ranks}")
            for size in sizes or ():
                check_integer(name, size)
        if self.tokens_per_step is not None:
            check_integer("tokens_per_step", self.tokens_per_step, 1)
        if self.low_precision_cap is not None:
            check_number("low_precision_share.cap", self.low_precision_cap, 0, 1)
        check_number("low_precision_share.planned", self.low_precision_planned, 0, 1)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of all replicas, sorted."""
        return tuple(sorted({name for layer in self.layers for name in layer.replicas.formats_P}))

    def check_bytes(self, expert_bytes: Mapping[str, int], what: str = "the placement") -> None:
        """Raise a `UserError` unless every rank's replicas take the bytes that this placement claims.

        Args:
            expert_bytes: format -> bytes of one expert.
        """
        if missing := set(self.formats) - set(expert_bytes):
            raise UserError(f"{what} uses format {min(missing)}, but only {', '.join(sorted(expert_bytes))} are known")
        actual_R = bytes_by_rank(self.layers, self.topology.num_ranks, expert_bytes)
        for rank, (actual, claimed) in enumerate(zip(actual_R.tolist(), self.bytes_R, strict=True)):
            if actual != claimed:
                raise UserError(
                    f"{what} claims {claimed} expert bytes on rank {rank}, but its replicas take {actual}: place again"
                )

    def check_stats(self, stats: ExpertStats, what: str) -> None:
        """Raise a `UserError` unless this placement has the layers, experts and sizes of `stats`."""
        shape = {layer.index: layer.num_experts for layer in self.layers}
        if shape != dict.fromkeys(stats.layers, stats.num_experts):
            raise UserError(
                f"{what}: experts per layer {shape!s:.100}, but {stats.source} has {stats.num_experts} in each of "
                f"{stats.num_layers} layers"
            )
        self.check_bytes(stats.expert_bytes, what)

    def check_serves(self, model: ModelIdentity | None, num_ranks: int, what: str = "the placement") -> None:
        """Raise a `UserError` with both values unless this placement is for `model` on `num_ranks` ranks."""
        if num_ranks != self.topology.num_ranks:
            raise UserError(
                f"{what} is for {self.topology.num_ranks} ranks, but {num_ranks} were started: "
                f"start {self.topology.num_ranks} or place again with --num-ranks {num_ranks}"
            )
        if model is not None and self.model is not None:
            model.check(self.model, what)

    def with_layers(self, layers: Sequence[LayerPlacement], expert_bytes: Mapping[str, int]) -> "Placement":
        """The placement with other layers, which its certificate does not hold for."""
        bytes_R = bytes_by_rank(layers, self.topology.num_ranks, expert_bytes)
        return replace(self, layers=tuple(layers), bytes_R=tuple(bytes_R.tolist()), certificate={})

    def to_dict(self) -> dict[str, Any]:
        """The placement as `placement.json` holds it."""
        return {
            "format": FORMAT,
            "model": None if self.model is None else {"id": self.model.id, "hash": self.model.hash},
            "strategy": self.strategy,
            "num_ranks": self.topology.num_ranks,
            "ranks_per_node": self.topology.ranks_per_node,
            "tokens_per_step": self.tokens_per_step,
            "low_precision_share": {"cap": self.low_precision_cap, "planned": self.low_precision_planned},
            "budget_bytes": self.budget_bytes_R,
            "bytes": self.bytes_R,
            "certificate": dict(self.certificate),
            "layers": [_layer_document(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Placement":
        """The placement that `to_dict` wrote down."""
        return _read(document)

    def save(self, path: str | Path) -> None:
        """Write `placement.json`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        """Read `placement.json`; `UserError` says what is wrong with one that is foreign, incomplete or cut short."""
        hint = f"write it with `rq-ep place --out {path}`"
        return read_document(path, "placement", FORMAT, hint, _read)


def bytes_by_rank(layers: Iterable[LayerPlacement], num_ranks: int, expert_bytes: Mapping[str, int]) -> IntArray:
    """[R] bytes of the replicas of all layers together; `expert_bytes` maps a format to bytes of one expert."""
    return replica_bytes((replica for layer in layers for replica in layer.replicas), num_ranks, expert_bytes)


def _layer_document(layer: LayerPlacement) -> dict[str, Any]:
    replicas = [
        {"expert": replica.expert, "rank": replica.rank, "format": replica.format, "share": share}
        for replica, share in zip(layer.replicas, layer.shares_P.tolist(), strict=True)
    ]
    return {
        "layer": layer.index, "num_experts": layer.num_experts, "replicas": replicas,
        "mixed_formats": layer.replicas.mixed_formats,
        "predicted": layer.predicted, "bound": layer.bound, "gap": layer.gap, "binding": layer.binding,
    }  # fmt: skip


def _read(document: Mapping[str, Any]) -> Placement:
    share, model, budget = document["low_precision_share"], document["model"], document["budget_bytes"]
    topology = Topology(document["num_ranks"], document["ranks_per_node"])
    return Placement(
        layers=tuple(_read_layer(layer, topology.num_ranks) for layer in document["layers"]),
        strategy=document["strategy"],
        topology=topology,
        bytes_R=tuple(document["bytes"]),
        budget_bytes_R=None if budget is None else tuple(budget),
        model=None if model is None else ModelIdentity(**model),
        tokens_per_step=document["tokens_per_step"],
        low_precision_cap=share["cap"],
        low_precision_planned=share["planned"],
        certificate=dict(document["certificate"]),
    )


def _read_layer(document: Mapping[str, Any], num_ranks: int) -> LayerPlacement:
    layer, rows = check_integer("layer", document["layer"]), document["replicas"]
    try:
        # More experts than replicas cannot be, and a claim of very many would fill the memory.
        num_experts = check_integer("num_experts", document["num_experts"], 1, len(rows))
        ranks_P = _integers("rank", [row["rank"] for row in rows], num_ranks - 1)
        experts_P = _integers("expert", [row["expert"] for row in rows], num_experts - 1)
        formats = [row["format"] for row in rows]
        for name in set(formats) if set(map(type, formats)) == {str} else formats:
            check_text("format", name)
        shares_P = _fractions("share", [row["share"] for row in rows])
        mixed_formats = document.get("mixed_formats", [])
        if not isinstance(mixed_formats, list):
            raise UserError(f"mixed_formats {mixed_formats!r:.60}: must be a list of formats")
        order_P = np.lexsort((experts_P, ranks_P))
        ranks_P, experts_P, shares_P = ranks_P[order_P], experts_P[order_P], shares_P[order_P]
        formats_P = tuple(formats[row] for row in order_P.tolist())
        for p in np.flatnonzero((np.diff(ranks_P) == 0) & (np.diff(experts_P) == 0)).tolist():
            is_same = formats_P[p] == formats_P[p + 1]
            raise UserError("a replica is named twice" if is_same else "a rank holds two replicas of one expert")
        replicas = Replicas(
            ranks_P, experts_P, formats_P, tuple(check_text("mixed format", name) for name in mixed_formats)
        )
    except UserError as error:
        raise UserError(f"layer {layer}: {error}") from None
    return LayerPlacement(
        index=layer,
        num_experts=num_experts,
        replicas=replicas,
        shares_P=shares_P,
        predicted=document["predicted"],
        bound=document["bound"],
        binding=document["binding"],
    )


# A server reads a placement beside its steps: tens of thousands of rows are looked at together, and one by one only to
# name what is wrong.


def _integers(what: str, values: Sequence[Any], high: int) -> IntArray:
    if set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= high:
        return np.array(values, np.int64)
    return np.array([check_integer(what, value, 0, high) for value in values], np.int64)


def _fractions(what: str, values: Sequence[Any]) -> FloatArray:
    if set(map(type, values)) <= {float, int} and all(0 <= value <= 1 for value in values):
        return np.array(values, np.float64)
    return np.array([check_number(what, value, 0, 1) for value in values], np.float64)
