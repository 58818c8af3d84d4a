"""Experts quantized in advance: a directory with a file for each MoE layer, written by `rq-ep quantize`.

A file holds packed experts, uint8, keyed "EXPERT.FORMAT", and says in its metadata how they were made (its provenance).
It is written atomically, so that an interrupted `quantize` can resume. Reading touches only the experts it returns.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import check_version, replacing
from rq_ep.core.files.tensor_files import parse_metadata
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ModelIdentity
from rq_ep.formats import get_format

FORMAT = "rq_ep.experts/1"


@dataclass(frozen=True)
class PackedExperts:
    """A directory of packed experts of one model."""

    path: Path
    model: ModelIdentity

    @classmethod
    def open(cls, path: str | Path, model: ModelIdentity) -> "PackedExperts":
        """Open a directory that `quantize` wrote.

        Args:
            path: the directory.
            model: whose experts are wanted.

        Raises:
            UserError: no such directory, or nothing in it.
        """
        packed = cls(Path(path), model)
        if not packed.files():
            raise UserError(
                f"--experts {path}: no quantized experts there; write them with `rq-ep quantize --out {path}`"
            )
        return packed

    def packed(self, layer: int, expert: int, format_name: str) -> Tensor | None:
        """A packed expert, uint8 [nbytes]; None if it was not quantized to this format.

        Raises:
            UserError: the layer's file is damaged, or of another model.
        """
        file = self.file(layer)
        key = f"{expert}.{format_name}"
        if not file.exists() or key not in self._read(file)[1]:
            return None
        try:
            with safe_open(file, framework="pt") as tensors:
                return _as_bytes(tensors.get_tensor(key), f"{file}: {key}")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cut short or damaged ({error}): quantize the model again") from None

    def check_holds(self, placement: Placement, stored_format: str) -> Counter[str]:
        """Count the experts of a placement that will be read from here: format -> number.

        Args:
            placement: to be served.
            stored_format: of the experts in the checkpoint itself, which need not be here.

        Raises:
            UserError: one that the placement stores in low bits is not here, or a file is damaged or of another model.
        """
        wanted = {}
        for layer in placement.layers:
            pairs = {(replica.expert, replica.format) for replica in layer.replicas}
            wanted[layer.index] = {pair for pair in pairs if pair[1] != stored_format}
        return self._check_held(wanted, "of the placement", "--placement FILE")

    def check_holds_all(self, layers: Sequence[int], num_experts: int, formats: Sequence[str]) -> Counter[str]:
        """Count the experts that may be read from here where any may be stored in any of these formats.

        Args:
            layers: their indices in the model.
            num_experts: of each.
            formats: native ones need not be here.

        Raises:
            UserError: as `check_holds`.
        """
        every = {(expert, name) for expert in range(num_experts) for name in formats}
        chosen = f"--formats {','.join(formats)}"
        return self._check_held(dict.fromkeys(layers, every), "that may be stored so while the load changes", chosen)

    def _check_held(self, wanted: Mapping[int, Collection[tuple[int, str]]], which: str, how: str) -> Counter[str]:
        """Count low-bit experts by format; `wanted`: for each layer (expert, format)."""
        counts: Counter[str] = Counter()
        missing = []
        for layer, pairs in wanted.items():
            low = sorted(pair for pair in pairs if not get_format(pair[1]).is_native)
            file = self.file(layer)
            keys = self._read(file)[1] if low and file.exists() else frozenset()
            for expert, name in low:
                if f"{expert}.{name}" in keys:
                    counts[name] += 1
                else:
                    missing.append(f"expert {expert} of layer {layer} in {name}")
        if missing:
            others = f", nor {len(missing) - 1} others {which}" if len(missing) > 1 else ""
            raise UserError(
                f"--experts {self.path}: does not hold {missing[0]}{others}; write them with "
                f"`rq-ep quantize {how} --out {self.path}`"
            )
        return counts

    def has(self, layer: int, provenance: Mapping[str, str]) -> bool:
        """Whether a layer was written for this model with this provenance."""
        file = self.file(layer)
        return file.exists() and self._read(file)[0] == provenance

    def write(self, layer: int, provenance: Mapping[str, str], experts: Mapping[tuple[int, str], Tensor]) -> None:
        """Write a layer's experts, (expert, format) -> uint8 [nbytes]."""
        self.path.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": FORMAT,
            "model": json.dumps([self.model.id, self.model.hash]),
            "how": json.dumps(provenance),
        }
        tensors = {f"{expert}.{name}": packed.cpu() for (expert, name), packed in experts.items()}
        with replacing(self.file(layer)) as temporary:
            save_file(tensors, temporary, metadata)

    def files(self) -> list[Path]:
        """The files that are there."""
        return sorted(self.path.glob("layer-*.safetensors"))

    def file(self, layer: int) -> Path:
        """The file of a layer, by its index in the model."""
        return self.path / f"layer-{layer:05d}.safetensors"

    def _read(self, file: Path) -> tuple[dict[str, str], frozenset[str]]:
        """The provenance of a file, and its keys."""
        try:
            with safe_open(file, framework="pt") as tensors:
                texts, keys = tensors.metadata() or {}, frozenset(tensors.keys())
            metadata = {key: parse_metadata(text) for key, text in texts.items()}
            check_version(file, metadata.get("format"), FORMAT)
            model, provenance = ModelIdentity(*metadata["model"]), metadata["how"]
        except UserError:
            raise
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{file}: cut short, damaged or foreign ({error}): quantize the model again") from None
        self.model.check(model, str(file))
        return provenance, keys


def _as_bytes(packed: Tensor, name: str) -> Tensor:
    """Packed bytes as uint8, from any type that holds them."""
    if packed.dtype == torch.uint8:
        return packed
    as_uint8 = packed.to(torch.uint8)
    if packed.dtype == torch.bool or not torch.equal(as_uint8.to(packed.dtype), packed):
        raise UserError(f"{name} is {packed.dtype} and not all of it are bytes: quantize the model again")
    return as_uint8
