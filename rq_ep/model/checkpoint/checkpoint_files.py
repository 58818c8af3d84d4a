"""The files of a Hugging Face checkpoint: its configuration, and its tensors, read whole or row by row."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.quantization_schemes import quantization_scheme
from rq_ep.model.checkpoint.tokenizer_files import transformers_errors
from rq_ep.model.seam.adapters import ADAPTERS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_config(path: str | Path) -> PretrainedConfig:
    """The configuration of the checkpoint in directory `path`, without its quantization.

    Raises:
        UserError: the directory is no checkpoint, or one that cannot be served: an unknown `model_type`, no causal
            language model, or weights quantized in a way we cannot read.
    """
    raw = read_config_json(path)
    model_type = raw.get("model_type")
    if str(model_type) not in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ADAPTERS}:
        raise UserError(
            f"{path}: model_type {model_type!r} is not a causal language model that transformers knows: "
            "give a checkpoint such as qwen3_moe, mixtral, olmoe, deepseek_v3 or gpt_oss"
        )
    is_quantized = quantization_scheme(raw, str(path)) is not None
    with transformers_errors(f"{path}/config.json"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
    if is_quantized:
        del config.quantization_config  # transformers builds a plain model; we read its weights
    return config


def read_config_json(path: str | Path) -> dict[str, Any]:
    """`config.json` of the checkpoint directory `path`, unchanged."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{path}: no such directory; expected a checkpoint with config.json and safetensors files")
    try:
        raw = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no config.json; expected a Hugging Face checkpoint directory") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}/config.json: not readable ({error})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}/config.json: expected an object, found {type(raw).__name__}")
    return raw


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name: the shards of its index, or the single file."""
    directory = Path(path)
    index = directory / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise UserError(f"{index}: not a readable shard index ({type(error).__name__}: {error})") from None
        files = [directory / name for name in sorted(names)]
    else:
        files = [directory / SINGLE]
    if missing := [file.name for file in files if not file.exists()]:
        wanted = "its index names" if index.exists() else f"expected {INDEX} or"
        raise UserError(f"{path}: {wanted} {missing[0]}, which is not there ({len(missing)} of {len(files)} missing)")
    return files


class Checkpoint:
    """The tensors of a checkpoint. Files are memory-mapped, so that reading a slice touches no other bytes.

    `bytes_read` is the size of all tensors and slices that were read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        for file in weight_files(path):
            with self._readable(file):
                handle: Any = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(handle.keys(), handle))

    @property
    def keys(self) -> list[str]:
        """The names of all tensors, as the checkpoint spells them."""
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._files[key].get_slice(key).get_shape())

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor, in the dtype in which it is stored."""
        with self._readable(key):
            return self._counted(self._files[key].get_tensor(key))

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (excluded) of a tensor's leading axis."""
        with self._readable(key):
            return self._counted(self._files[key].get_slice(key)[first:last])

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    @contextmanager
    def _readable(self, what: str | Path) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: {Path(what).name} is cut short or damaged ({error})") from None
