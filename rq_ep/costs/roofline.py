"""A roofline cost model: modelled seconds of a plan on a machine of given peak rates."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from rq_ep.core.cost import LayerCost, LayerShape
from rq_ep.core.errors import UserError, check_choice, check_integer, check_number, check_text
from rq_ep.core.files.yaml_files import read_yaml

MATRICES = 3  # of a gated expert: gate, up, down


@dataclass(frozen=True)
class Roofline:
    """Peak rates of one rank. Sustained rates are lower, so it compares strategies and does not predict seconds."""

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # in each direction
    latency_s: float
    activation_bytes: int = 2  # of one number on the wire
    source: str = "rates as given"  # where the rates are from

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "memory_bytes_per_s", "link_bytes_per_s"):
            if check_number(name, getattr(self, name)) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be positive")
        check_number("latency_s", self.latency_s, 0.0)
        check_integer("activation_bytes", self.activation_bytes, 1, 8)
        check_text("source", self.source)

    @classmethod
    def load(cls, path: str | Path) -> "Roofline":
        """A machine from a YAML file that holds its fields.

        Raises:
            UserError: there is no such file, or it is not a machine.
        """
        return cls._of(_read_mapping(path), path)

    @classmethod
    def load_table(cls, path: str | Path) -> dict[str, "Roofline"]:
        """Machines by name from a YAML file."""
        return {name: cls._of(entry, f"{path}: {name}") for name, entry in _read_mapping(path).items()}

    @classmethod
    def _of(cls, entry: Mapping[str, Any], where: str | Path) -> "Roofline":
        known = {field.name: field.default for field in fields(cls)}
        try:
            given = {check_choice("field", str(name), known): _number(value) for name, value in entry.items()}
            if missing := [name for name, default in known.items() if default is MISSING and name not in given]:
                raise UserError(f"a machine also needs {', '.join(missing)}")
            return cls(**given)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @property
    def description(self) -> str:
        return f"a roofline ({self.source})"

    def layer(self, shape: LayerShape) -> LayerCost:
        """Modelled seconds of the parts of a layer of this shape."""
        flops = 2.0 * MATRICES * shape.hidden_size * shape.intermediate_size
        return LayerCost(
            pair_s=dict.fromkeys(shape.expert_bytes, flops / self.flops_per_s),
            stream_s={name: size / self.memory_bytes_per_s for name, size in shape.expert_bytes.items()},
            transfer_s={name: size / self.link_bytes_per_s for name, size in shape.expert_bytes.items()},
            row_s=shape.hidden_size * self.activation_bytes / self.link_bytes_per_s,
            latency_s=self.latency_s,
        )


def _number(value: Any) -> Any:
    """YAML 1.1 takes 989e12, without a point and a sign, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _read_mapping(path: str | Path) -> dict[str, Any]:
    document = read_yaml(path, "machine", "name a machine or write its rates into one")
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected `field: value` lines of a machine, not {type(document).__name__}")
    return document


MACHINES: Mapping[str, Roofline] = Roofline.load_table(Path(__file__).with_name("machines.yaml"))
