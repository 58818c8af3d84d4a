"""Where a model is read from: a folder, the root of a model in a cache of the hub, or a name of the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.model.hub import fetch_headers, fetch_snapshot
from rq_ep.model.model_names import is_hub_name
from rq_ep.parallel import EPGroup
from rq_ep.parallel.agreement import is_first_of_node, run_long_on_all_ranks


def find_model(
    model: str | Path, revision: str | None = None, group: EPGroup | None = None, *, config_only: bool = False
) -> Path:
    """The folder of a model, downloaded if it is not here; what is here is never looked for on the hub.

    One rank of each node downloads, however long it takes; the others wait. Every rank of the group calls this.

    Args:
        model: a folder; the root of a model in a cache of the hub (`models--ORG--NAME`); or, as text, ORG/NAME.
        revision: branch, tag or commit of the last two; default: main.
        group: the ranks; default: this process alone.
        config_only: the weights are not needed.

    Raises:
        UserError: it is no such thing, or cannot be had; on every rank.
    """
    is_on_hub = is_hub_name(model)

    def find(offline: bool) -> Path:
        if not is_on_hub:
            return _local_folder(Path(model), revision)
        return fetch_snapshot(str(model), revision, weights=not config_only, offline=offline)

    if group is None or group.size == 1:
        return find(offline=False)
    downloads = is_first_of_node(group)
    found = run_long_on_all_ranks(group, lambda: find(offline=False) if downloads else None)
    folder = run_long_on_all_ranks(group, lambda: find(offline=True) if found is None else found)
    commits = group.all_gather_object(folder.name if is_on_hub else "a folder")
    rank_of = {commits[rank]: rank for rank in reversed(group.members)}  # the first that has it
    if len(rank_of) > 1:
        held = ", ".join(f"rank {rank} {commit}" for commit, rank in sorted(rank_of.items(), key=lambda pair: pair[1]))
        raise UserError(f"{model}: the nodes have different versions ({held}): give a commit as --revision")
    return folder


@contextmanager
def model_headers(model: str | Path, revision: str | None = None) -> Iterator[tuple[Path, int]]:
    """While open: the folder of a model, and how many bytes of its weights are still to be downloaded.

    Of a model of the hub the settings, the tokenizer and the headers of the weights are downloaded. With bytes left the
    folder is temporary, and its weights must not be read.

    Args:
        model, revision: as in `find_model`.
    """
    if not is_hub_name(model):
        yield find_model(model, revision), 0
        return
    with TemporaryDirectory(prefix="rq_ep-") as scratch:
        yield fetch_headers(str(model), revision, Path(scratch))


def folder_of(model: PreTrainedModel) -> Path | None:
    """The folder that a model in memory was loaded from, or its snapshot in the cache; None if it is not here."""
    name = model.name_or_path or ""
    if not is_hub_name(name):
        return Path(name) if Path(name, "config.json").is_file() else None
    try:
        return fetch_snapshot(name, getattr(model.config, "_commit_hash", None), weights=True, offline=True)
    except UserError:
        return None


def _local_folder(path: Path, revision: str | None) -> Path:
    """The folder itself, or of the root of a model in a cache the snapshot."""
    if not (path / "snapshots").is_dir() or (path / "config.json").exists():
        if revision is not None:
            raise UserError(f"--revision {revision}: {path} is not a model of the hub: leave it out")
        return path
    name = revision or "main"
    reference, snapshots = path / "refs" / name, sorted((path / "snapshots").iterdir())
    commit = reference.read_text().strip() if reference.is_file() else name
    chosen = [snapshot for snapshot in snapshots if snapshot.name == commit]
    if revision is None and not reference.is_file():
        chosen = snapshots
    if len(chosen) != 1:
        held = ", ".join(snapshot.name for snapshot in snapshots) or "none"
        raise UserError(f"{path}: no snapshot of {name!r:.80} in this cache: choose by --revision from {held:.400}")
    return chosen[0]
