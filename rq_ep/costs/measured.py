"""A cost model from timings of the machine at hand, as `rq-ep profile` writes them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rq_ep.core.cost import LayerCost, LayerShape
from rq_ep.core.errors import UserError, check_choice, check_integer, check_number, check_text
from rq_ep.core.files.documents import read_json, write_json
from rq_ep.costs.fit import ExpertFit, fit_experts, fit_line

FORMAT = "rq_ep.profile/2"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """Seconds at several sizes, in rows or bytes."""

    sizes: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.seconds) or len(self.sizes) < 2:
            raise UserError(f"{len(self.sizes)} sizes and {len(self.seconds)} seconds: at least two of each are needed")
        for size, seconds in zip(self.sizes, self.seconds):
            check_integer("size", size, 1)
            if check_number("seconds", seconds, 0.0) == 0:
                raise UserError("seconds 0: must be positive")
        if list(self.sizes) != sorted(set(self.sizes)):
            raise UserError(f"sizes {list(self.sizes)} must ascend")


@dataclass(frozen=True)
class Calls:
    """Seconds of calls that compute several experts, each with as many rows."""

    experts: tuple[int, ...]
    rows: tuple[int, ...]  # of each expert
    seconds: tuple[float, ...]  # of the call

    def __post_init__(self) -> None:
        if not len(self.experts) == len(self.rows) == len(self.seconds):
            lengths = f"{len(self.experts)} experts, {len(self.rows)} rows and {len(self.seconds)} seconds"
            raise UserError(f"{lengths}: there must be as many of each")
        for experts, rows, seconds in zip(self.experts, self.rows, self.seconds):
            check_integer("experts", experts, 1)
            check_integer("rows", rows, 1)
            if check_number("seconds", seconds, 0.0) == 0:
                raise UserError("seconds 0: must be positive")
        if len(set(self.rows)) < 2:
            raise UserError(f"rows {list(self.rows)}: at least two numbers of rows are needed")


@dataclass(frozen=True)
class LinkTimings:
    """Times of the link between ranks, measured or taken from a named machine."""

    source: str
    latency_s: float  # of an exchange
    row_byte_s: float  # per byte of rows that a rank sends or receives
    transfer_byte_s: float  # per byte of experts, which are sent point to point

    def __post_init__(self) -> None:
        check_text("source", self.source)
        for name in ("latency_s", "row_byte_s", "transfer_byte_s"):
            check_number(name, getattr(self, name), 0.0)


@dataclass(frozen=True)
class Check:
    """Prediction and measurement of a step that was not fitted: all experts in one format, with uneven loads."""

    format: str
    num_tokens: int
    predicted_s: float
    measured_s: float

    def __post_init__(self) -> None:
        check_integer("num_tokens", self.num_tokens, 1)
        for name in ("predicted_s", "measured_s"):
            if check_number(name, getattr(self, name), 0.0) == 0:
                raise UserError(f"{name} 0: must be positive")

    @property
    def error(self) -> float:
        """Relative error; positive where the prediction is too large."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class Profile:
    """A cost model fitted to timings of one layer's parts on one machine. The fits are made on first use."""

    device: str  # in words
    dtype: str  # computed in
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_ranks: int  # ranks that measured at the same time
    experts: Mapping[str, Calls]  # format -> calls for one expert and for several
    gather: Curve  # rows picked from a batch of rows
    link: LinkTimings
    plan_s: Mapping[str, float]  # strategy -> host time of one plan
    plan_ranks: int  # ranks of those plans
    checks: tuple[Check, ...] = ()
    source: str = "profile"  # the file, for messages

    def __post_init__(self) -> None:
        for name in ("device", "dtype"):
            check_text(name, getattr(self, name))
        check_choice("dtype", self.dtype, ITEM_BYTES)
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k", "num_ranks", "plan_ranks"):
            check_integer(name, getattr(self, name), 1)
        if not self.experts:
            raise UserError("experts: at least one format must have been timed")
        for strategy, seconds in self.plan_s.items():
            check_number(f"plan_s of {strategy}", seconds, 0.0)

    @property
    def description(self) -> str:
        return f"measured on {self.device} by {self.num_ranks} rank(s); link: {self.link.source}"

    @cached_property
    def fits(self) -> dict[str, ExpertFit]:
        """Format -> the fit of its timings."""
        return {name: fit_experts(calls.experts, calls.rows, calls.seconds) for name, calls in self.experts.items()}

    def layer(self, shape: LayerShape) -> LayerCost:
        """Seconds of the parts of the layer that was profiled.

        Raises:
            UserError: it was a layer of another shape, or a format was not timed.
        """
        wanted, timed = (shape.hidden_size, shape.intermediate_size), (self.hidden_size, self.intermediate_size)
        if wanted != timed:
            raise UserError(
                f"{self.source}: times experts of hidden size {timed[0]} and intermediate size {timed[1]}, "
                f"not {wanted[0]} and {wanted[1]}: run `rq-ep profile` for this model"
            )
        if missing := sorted(set(shape.expert_bytes) - set(self.experts)):
            raise UserError(
                f"{self.source}: no timings of {', '.join(missing)}, only of {', '.join(sorted(self.experts))}: run "
                f"`rq-ep profile --formats {','.join(shape.expert_bytes)}`"
            )
        fits = {name: self.fits[name] for name in shape.expert_bytes}
        row_bytes = shape.hidden_size * ITEM_BYTES[self.dtype]
        return LayerCost(
            pair_s={name: fit.pair_s for name, fit in fits.items()},
            stream_s={name: fit.stream_s for name, fit in fits.items()},
            overhead_s={name: fit.overhead_s for name, fit in fits.items()},
            transfer_s={name: size * self.link.transfer_byte_s for name, size in shape.expert_bytes.items()},
            row_s=row_bytes * self.link.row_byte_s + fit_line(self.gather.sizes, self.gather.seconds).each_s,
            latency_s=self.link.latency_s,
            call_s={name: fit.call_s for name, fit in fits.items()},
        )

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        document = {"format": FORMAT, **asdict(self)}
        del document["source"]
        write_json(path, document)

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, it is not a profile, or one of another version.
        """
        document = read_json(path, "profile", "write one with `rq-ep profile`")
        try:
            return cls._of(_mapping("profile", document), str(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, document: Mapping[str, Any], source: str) -> "Profile":
        if document.get("format") != FORMAT:
            raise UserError(f"format {document.get('format')!r:.60} is not {FORMAT!r}: profile again")
        known = {field.name for field in fields(cls)} - {"source"}
        if missing := sorted(known - set(document)):
            raise UserError(f"this profile lacks {', '.join(missing)}")
        values = {name: document[name] for name in known}
        experts, checks = _mapping("experts", document["experts"]), document["checks"]
        values["experts"] = {name: _built(f"experts of {name}", calls, _calls) for name, calls in experts.items()}
        values["gather"] = _curve("gather", document["gather"])
        values["link"] = _built("link", document["link"], LinkTimings)
        values["plan_s"] = _mapping("plan_s", document["plan_s"])
        if not isinstance(checks, list):
            raise UserError(f"checks {checks!r:.60}: must be a list")
        values["checks"] = tuple(_built("checks", check, Check) for check in checks)
        return cls(**values, source=source)


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} {value!r:.60}: must be a mapping")
    return value


def _calls(experts: Any, rows: Any, seconds: Any) -> Calls:
    return Calls(tuple(experts), tuple(rows), tuple(seconds))


def _curve(what: str, value: Any) -> Curve:
    return _built(what, value, lambda sizes, seconds: Curve(tuple(sizes), tuple(seconds)))


def _built(what: str, value: Any, make: Callable[..., T]) -> T:
    try:
        return make(**_mapping(what, value))
    except TypeError:
        raise UserError(f"{what} {value!r:.60}: not what `rq-ep profile` writes") from None
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
