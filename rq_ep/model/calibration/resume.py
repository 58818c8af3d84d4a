"""What has been heard so far, in a file, so that listening can go on where it was stopped."""

import json
import logging
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rq_ep.core.files import replacing
from rq_ep.model.calibration.layer_records import LayerRecord, Step
from rq_ep.model.text.windows import Windows

FORMAT = "rq_ep.halfway/1"
SAVE_EVERY_S = 60.0

log = logging.getLogger(__name__)


class Halfway:
    """A file that is written now and then, taken up again if it is of the same run, and removed in the end."""

    def __init__(
        self, path: str | Path, windows: Windows, settings: Sequence[object], every_s: float = SAVE_EVERY_S
    ) -> None:
        """
        Args:
            path: of the file.
            windows: the text that is run: other text makes it another run.
            settings: what else must be the same.
            every_s: seconds between writings.
        """
        self._path = Path(path)
        self._every_s = every_s
        self._last_s = time.monotonic()
        digest = sha256(repr(settings).encode())
        for batch in windows.batches:
            digest.update(batch.tokens_BT.numpy().tobytes())
        self._key = digest.hexdigest()

    def resume(self, steps: list[Step], records: Sequence[LayerRecord]) -> int:
        """Batches that are done; `steps` and `records`, empty so far, are filled with what came of them."""
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or metadata.get("key") != self._key:
                    log.warning("%s is of another run: starting anew", self._path)
                    return 0
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return 0
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s): starting anew", self._path, error)
            return 0
        counts_SLE = tensors["counts"].numpy()
        steps.extend(
            Step(*numbers, counts_LE) for numbers, counts_LE in zip(tensors["steps"].tolist(), counts_SLE, strict=True)
        )
        for at, record in enumerate(records):
            record.importance_E[:] = tensors["importance"][at].numpy()
            record.gate_mass_E[:] = tensors["gate_mass"][at].numpy()
            record.visits_E[:] = tensors["visits"][at].numpy()
            by_expert = tensors[f"rows.{at}"].split(tensors["num_rows"][at].tolist())
            record.rows = [[rows_ND] for rows_ND in by_expert]
        done: int = json.loads(metadata["done"])
        log.info("%s: going on after %d batches", self._path, done)
        return done

    def save(self, done: int, steps: Sequence[Step], records: Sequence[LayerRecord]) -> None:
        """Write what has come of the first `done` batches, unless that was done a moment ago."""
        if time.monotonic() - self._last_s < self._every_s:
            return
        kept = [record.kept_rows() for record in records]
        tensors = {
            "steps": torch.tensor([[step.phase, step.domain, step.tokens] for step in steps]),
            "counts": torch.from_numpy(np.stack([step.counts_LE for step in steps])),
            "importance": torch.from_numpy(np.stack([record.importance_E for record in records])),
            "gate_mass": torch.from_numpy(np.stack([record.gate_mass_E for record in records])),
            "visits": torch.from_numpy(np.stack([record.visits_E for record in records])),
            "num_rows": torch.tensor([[len(rows_ND) for rows_ND in rows] for rows in kept]),
        } | {f"rows.{at}": torch.cat(rows) for at, rows in enumerate(kept)}
        with replacing(self._path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "key": self._key, "done": json.dumps(done)})
        self._last_s = time.monotonic()

    def remove(self) -> None:
        """All is heard: the file has done its service."""
        self._path.unlink(missing_ok=True)
