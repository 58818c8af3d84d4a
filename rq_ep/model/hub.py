"""The Hugging Face hub: the files of a model that are needed, from its cache or downloaded into it.

Cache, token, address and offline mode are huggingface_hub's: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import SafetensorsFileMetadata  # type: ignore[attr-defined]

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import HEADERS_ONLY, SINGLE, read_index
from rq_ep.model.checkpoint.tokenizer_files import SMALL_FILES

log = logging.getLogger(__name__)


def fetch_snapshot(name: str, revision: str | None, *, weights: bool, offline: bool) -> Path:
    """The folder of a model in the cache, with the files that are needed: never pickles, never code.

    A download that was interrupted goes on where it stopped.

    Args:
        name: of the model, ORG/NAME.
        revision: branch, tag or commit; default: main.
        weights: the shards are needed too.
        offline: take what is in the cache.

    Raises:
        UserError: there is no such model, it may not be read, the hub is not to be reached, or a shard is missing.
    """
    if not offline:
        log.info("looking for %s in %s and on %s", name, constants.HF_HUB_CACHE, constants.ENDPOINT)
    with _hub_errors(name, revision):
        folder = _fetch(name, revision, SMALL_FILES, ["*/*"], offline)
        if weights:
            shards = _shards(folder)
            patterns = [*map(escape, shards), "additional_chat_templates/*.jinja"]
            folder = _fetch(name, folder.name, patterns, [], offline)
            _check_there(name, folder, shards, offline or constants.HF_HUB_OFFLINE)
    return folder


def fetch_headers(name: str, revision: str | None, into: Path) -> tuple[Path, int]:
    """A folder that is read like that of `fetch_snapshot`, and how many bytes of weights are not in it.

    Shards that the cache lacks are files with the header alone of the real one, and its size: the rest is a hole.

    Args:
        name: of the model, ORG/NAME.
        revision: branch, tag or commit; default: main.
        into: an empty directory.

    Raises:
        UserError: as `fetch_snapshot` does.
    """
    snapshot = fetch_snapshot(name, revision, weights=False, offline=False)
    shards = _shards(snapshot)
    if all((snapshot / shard).is_file() for shard in shards):
        return snapshot, 0
    if constants.HF_HUB_OFFLINE:
        _check_there(name, snapshot, shards, offline=True)
    folder = into / f"models--{name.replace('/', '--')}" / "snapshots" / snapshot.name  # tells the name of the model
    folder.mkdir(parents=True)
    for file in filter(Path.is_file, snapshot.rglob("*")):
        link = folder / file.relative_to(snapshot)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    missing = [folder / shard for shard in shards if not (folder / shard).exists()]
    with _hub_errors(name, revision), ThreadPoolExecutor(8) as pool:
        read = partial(HfApi().parse_safetensors_file_metadata, name, revision=snapshot.name)
        headers = pool.map(lambda path: read(str(path.relative_to(folder))), missing)
        num_bytes = sum(_write_header(path, header) for path, header in zip(missing, headers, strict=True))
    (folder / HEADERS_ONLY).touch()
    return folder, num_bytes


def _write_header(path: Path, header: SafetensorsFileMetadata) -> int:
    """Write a safetensors file without its numbers; the bytes that it would have."""
    tensors = {
        key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for key, info in header.tensors.items()
    }
    document = {"__metadata__": header.metadata or {}, **tensors}
    text = json.dumps(document, separators=(",", ":")).encode()
    size = 8 + len(text) + max((info.data_offsets[1] for info in header.tensors.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(size)
    return size


def _shards(folder: Path) -> list[str]:
    return sorted(set((read_index(folder) or {}).values())) or [SINGLE]


def _fetch(name: str, revision: str | None, patterns: list[str], but: list[str], offline: bool) -> Path:
    """The snapshot of a model, with its files of these patterns; where the hub is not reached, with those in the cache.

    What is missing then is refused by whoever needs it.
    """
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=but, local_files_only=offline
            )
        )
    except IncompleteSnapshotError as error:
        log.warning("%s", " ".join(str(error).split()))
        return Path(error.snapshot_path)


def _check_there(name: str, folder: Path, shards: list[str], offline: bool) -> None:
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        what = f"{missing[0]} ({len(missing)} of {len(shards)} missing)"
        hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
        if offline:
            raise UserError(f"{name}: the cache {cache} lacks {what}, and the hub is not asked (HF_HUB_OFFLINE)")
        raise UserError(
            f"{name}: neither the cache {cache} nor {hub} gives {what}: the model has no safetensors files, or the "
            "connection is down"
        )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """While open, errors of the hub become a `UserError` of one line that says what to change."""
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    neither = f"{name}: neither a directory here nor"
    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{name}: is gated: accept its terms at {hub}/{name}, and set HF_TOKEN") from None
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{neither} a model of {hub} that may be read ({error.response.status_code}): check the name or, if it is "
            "private, set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"--revision {revision}: {name} has no such branch, tag or commit on {hub}") from None
    except LocalEntryNotFoundError as error:
        asked = "" if revision is None else f" at --revision {revision}"
        if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
            reason = "the hub is not asked (HF_HUB_OFFLINE)"
        else:
            reason = f"{hub} cannot be reached ({_one_line(error.__cause__)}; HF_ENDPOINT)"
        raise UserError(f"{neither} a model in the cache {cache} (HF_HUB_CACHE){asked}, and {reason}") from None
    except HfHubHTTPError as error:
        hint = ": check HF_TOKEN" if error.response.status_code in (401, 403) else ""
        raise UserError(f"{name}: {hub} refuses it ({_one_line(error)}){hint}") from None
    except Exception as error:  # of the connection, the disk, or hf_xet
        raise UserError(
            f"{name}: cannot be downloaded from {hub} into {cache} ({_one_line(error)}): the same command goes on "
            "where it stopped"
        ) from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
