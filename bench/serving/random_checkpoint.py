"""A checkpoint of random weights, of any size: written tensor by tensor, in the shards and under the names of the hub.

Experts are stored one by one, as `gate_proj`, `up_proj` and `down_proj`, the way most families store them. Tokens are
bytes, so that text needs no vocabulary. Random routers are skewed as they come.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import write_json
from rq_ep.model.checkpoint.checkpoint_files import INDEX, REAL_DTYPES
from rq_ep.model.seam.expert_modules import find_expert_modules
from rq_ep.model.text.byte_tokenizer import byte_tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # transformers' own
STD = 0.02


class _Stored(NamedTuple):
    """A tensor as a checkpoint has it."""

    name: str
    shape: tuple[int, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        return torch.Size(self.shape).numel() * dtype.itemsize


def random_checkpoint(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    embedding_std: float = STD,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> bool:
    """Write a checkpoint, unless the directory holds it already. Takes the memory of one tensor.

    Weights are Gaussian, those of norms 1, and the same ones for the same arguments.

    Args:
        directory: where it goes.
        config: of the model.
        dtype: of the weights.
        embedding_std: of the embeddings. With small ones all tokens become alike in the layers, and routers choose the
            same experts for most of them.
        max_shard_bytes: of one file.
        tokenizer: of the model; None: one whose tokens are bytes.

    Returns:
        True if it was written.

    Raises:
        UserError: the directory holds another checkpoint.
    """
    config.dtype = dtype
    if (directory / INDEX).exists():  # written last
        if (directory / "config.json").read_text() == config.to_json_string():
            return False
        raise UserError(f"{directory}: holds another model: name another directory, or remove that one")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    (tokenizer or byte_tokenizer(config.max_position_embeddings)).save_pretrained(directory)
    shards = _shards(list(_stored(config)), dtype, max_shard_bytes)
    random = torch.Generator().manual_seed(0)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write(file, shard, dtype, random, embedding_std)
    total = sum(tensor.nbytes(dtype) for shard in shards for tensor in shard)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return True


def _stored(config: PretrainedConfig) -> Iterator[_Stored]:
    """The tensors of a model, its experts one by one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = {module.name: module.num_experts for module in find_expert_modules(model)}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        module, _, matrix = name.rpartition(".")
        if module not in experts:
            if name not in tied:
                yield _Stored(name, tuple(tensor.shape))
            continue
        _, num_out, num_in = tensor.shape
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrix]
        for expert in range(experts[module]):
            for part in parts:
                yield _Stored(f"{module}.{expert}.{part}.weight", (num_out // len(parts), num_in))


def _shards(tensors: Sequence[_Stored], dtype: torch.dtype, limit: int) -> list[list[_Stored]]:
    """The tensors in their order, in files of at most `limit` bytes."""
    shards: list[list[_Stored]] = [[]]
    size = 0
    for tensor in tensors:
        size += tensor.nbytes(dtype)
        if size > limit and shards[-1]:
            shards.append([])
            size = tensor.nbytes(dtype)
        shards[-1].append(tensor)
    return shards


def _write(
    file: BinaryIO, tensors: Sequence[_Stored], dtype: torch.dtype, random: torch.Generator, embedding_std: float
) -> None:
    """A safetensors file: eight bytes with the length of its header, the header, and the tensors."""
    stored_as = next(name for name, real in REAL_DTYPES.items() if real == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes(dtype)
        header[tensor.name] = {"dtype": stored_as, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        std = embedding_std if "embed_tokens" in tensor.name else STD
        file.write(_drawn(tensor, dtype, std, random).view(torch.uint8).numpy().data)


def _drawn(tensor: _Stored, dtype: torch.dtype, std: float, random: torch.Generator) -> Tensor:
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=dtype)
    return torch.empty(tensor.shape, dtype=dtype).normal_(std=std, generator=random).flatten()
