"""The Hugging Face hub: the files of a model that are needed, from its cache or downloaded into it.

Cache, token, address and offline mode are huggingface_hub's: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import SINGLE, read_index
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
            shards = sorted(set((read_index(folder) or {}).values())) or [SINGLE]
            patterns = [*map(escape, shards), "additional_chat_templates/*.jinja"]
            folder = _fetch(name, folder.name, patterns, [], offline)
            _check_there(name, folder, shards, offline or constants.HF_HUB_OFFLINE)
    return folder


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
