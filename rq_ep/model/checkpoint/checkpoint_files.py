"""The files of a Hugging Face checkpoint: its configuration, and its tensors, read whole or row by row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.config_limits import check_sizes
from rq_ep.model.checkpoint.json_files import MAX_INDEX_BYTES, read_json_object
from rq_ep.model.checkpoint.lfs_pointers import check_is_no_pointer
from rq_ep.model.checkpoint.quantization_schemes import CONFIG_KEYS, quantization_scheme
from rq_ep.model.checkpoint.tokenizer_files import transformers_errors
from rq_ep.model.model_names import check_folder
from rq_ep.model.seam.adapters import adapter_for

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADERS_ONLY = ".headers-only"  # in a folder whose weights have not been downloaded
REAL_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(path: str | Path) -> PretrainedConfig:
    """The configuration of the checkpoint in directory `path`, without its quantization.

    Raises:
        UserError: the directory is no checkpoint, or one that cannot be served: an unknown `model_type`, no language
            model, sizes that no model has, or weights quantized in a way we cannot read.
    """
    raw = read_config_json(path)
    try:
        adapter = adapter_for(raw.get("model_type"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    check_sizes(raw, f"{path}/config.json")
    is_quantized = quantization_scheme(raw, str(path)) is not None
    with transformers_errors(f"{path}/config.json"):
        config = adapter.config(AutoConfig.from_pretrained(path, trust_remote_code=False))
        config.get_text_config().vocab_size  # noqa: B018  # which some models that read no text lack
    if is_quantized:
        for key in CONFIG_KEYS:  # transformers builds a plain model; we read its weights
            config.__dict__.pop(key, None)
    return config


def read_config_json(path: str | Path) -> dict[str, Any]:
    """`config.json` of the checkpoint directory `path`, unchanged."""
    check_folder(path)
    return read_json_object(Path(path, "config.json"))


def read_index(path: str | Path) -> dict[str, str] | None:
    """Tensor -> the shard that holds it, by the index of the checkpoint directory `path`; None without an index.

    Raises:
        UserError: the index is damaged, or a name in it leads out of the directory.
    """
    index = Path(path, INDEX)
    if not (index.exists() or index.is_symlink()):
        return None
    weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: not a readable shard index (weight_map {weight_map!r:.40}: expected an object)")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise UserError(f"{index}: weight_map of {key!r:.80}: {name!r:.40} is no file name")
    names = {name: _checked_name(index, name) for name in set(weight_map.values())}
    return {key: names[name] for key, name in weight_map.items()}


def _checked_name(index: Path, name: str) -> str:
    """The name of a shard, if it leads to nothing outside the directory but the blobs of the hub's cache."""
    home = index.parent.resolve()
    try:
        target = (home / name).resolve()
        target.exists()
        is_inside = Path(name).name != "" and ".." not in Path(name).parts and not Path(name).is_absolute()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a circle
        raise UserError(f"{index}: weight_map: {name!r:.80} is no file name") from None
    is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not is_inside or not (target.is_relative_to(home) or is_blob):
        raise UserError(
            f"{index}: weight_map: {name!r:.80} leads out of the model's directory, to {str(target)!r:.120}: put the "
            "file there"
        )
    return str(Path(name))


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name: the shards of its index, or the single file."""
    directory = Path(path)
    index = read_index(path)
    files = [directory / name for name in ([SINGLE] if index is None else sorted(set(index.values())))]
    if missing := [file.name for file in files if not file.is_file()]:
        wanted = f"expected {INDEX} or" if index is None else "its index names"
        raise UserError(f"{path}: {wanted} {missing[0]}, which is not there ({len(missing)} of {len(files)} missing)")
    for file in files:
        check_is_no_pointer(file)
    return files


class Checkpoint:
    """The tensors of a checkpoint. Files are memory-mapped, so that reading a slice touches no other bytes.

    Where there is an index, it says which shard a tensor is read from. `bytes_read` is the size of all tensors and
    slices that were read; `notes` says what lies in the directory and is not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self.notes: list[str] = []
        self._files: dict[str, Any] = {}
        index = read_index(path) or {}
        holders: dict[str, dict[str, Any]] = {}  # tensor -> name of a file that has it -> the open file
        for file in weight_files(path):
            with self._readable(file):
                handle: Any = safe_open(file, framework="pt")
            for key in handle.keys():  # noqa: SIM118
                holders.setdefault(key, {})[str(file.relative_to(self.path))] = handle
        for key, name in index.items():
            if name not in holders.get(key, {}):
                raise UserError(f"{self.path}: {INDEX} names {name!r:.80} for {key!r:.80}, which is not in it")
        for key, by_name in holders.items():
            if len(by_name) > 1 and key not in index:
                raise UserError(f"{self.path}: {key!r:.80} is in {' and in '.join(by_name)}: name one in {INDEX}")
            self._files[key] = by_name[index.get(key, next(iter(by_name)))]
        self._note_unread(index, [key for key, by_name in holders.items() if len(by_name) > 1])

    def _note_unread(self, index: Mapping[str, str], repeated: Sequence[str]) -> None:
        if index and (self.path / SINGLE).exists() and SINGLE not in index.values():
            self.notes.append(f"{SINGLE} is not read: {INDEX} names other files")
        if repeated:
            others = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
            self.notes.append(f"{repeated[0]!r:.80}{others} in several files: read from the one that {INDEX} names")

    @property
    def keys(self) -> list[str]:
        """The names of all tensors, as the checkpoint spells them."""
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._files[key].get_slice(key).get_shape())

    @property
    def first_dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor of real numbers, by which transformers too tells how a model was saved."""
        dtypes = (Checkpoint.dtype(self, key) for key in self._files)
        return next((REAL_DTYPES[dtype] for dtype in dtypes if dtype in REAL_DTYPES), None)

    def dtype(self, key: str) -> str:
        """The dtype of a tensor as safetensors names it, such as BF16, without reading it."""
        return str(self._files[key].get_slice(key).get_dtype())

    def format_of(self, key: str) -> str | None:
        """The low-bit weight format that holds a matrix bit by bit; None: it is native, or scaled as none of ours."""
        return None

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
