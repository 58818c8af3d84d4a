"""Saving the progress of calibration to a file, so that a run can resume where it was stopped."""

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

from rq_ep.core.files.documents import replacing
from rq_ep.model.calibration.layer_records import LayerRecord, Step
from rq_ep.model.text.windows import Windows

FORMAT = "rq_ep.halfway/1"  # the name of the first version stays, so that old files can be resumed
SAVE_EVERY_S = 60.0

log = logging.getLogger(__name__)


class ResumeFile:
    """The steps and records of the batches done so far, written at intervals and read back by the same run."""

    def __init__(
        self, path: str | Path, windows: Windows, fingerprint: Sequence[object], every_s: float = SAVE_EVERY_S
    ) -> None:
        """
        Args:
            path: of the file.
            windows: the text of the run; with other text it is another run.
            fingerprint: what else must be equal for the same run.
            every_s: seconds between two writings.
        """
        self._path = Path(path)
        self._every_s = every_s
        self._last_s = time.monotonic()
        digest = sha256(repr(fingerprint).encode())
        for batch in windows.batches:
            digest.update(batch.tokens_BT.numpy().tobytes())
        self._key = digest.hexdigest()

    def load(self, steps: list[Step], records: Sequence[LayerRecord]) -> int:
        """Fill `steps` and `records`, which are empty, with what was saved; return the number of batches done.

        A file that is missing, damaged or of another run counts as none.
        """
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
        for (phase, domain, tokens), counts_LE in zip(
            tensors["steps"].tolist(), tensors["counts"].numpy(), strict=True
        ):
            steps.append(Step(phase, domain, tokens, counts_LE))
        for i, record in enumerate(records):
            record.importance_E[:] = tensors["importance"][i].numpy()
            record.gate_mass_E[:] = tensors["gate_mass"][i].numpy()
            record.visits_E[:] = tensors["visits"][i].numpy()
            rows_by_expert = tensors[f"rows.{i}"].split(tensors["num_rows"][i].tolist())
            record.rows = [[rows_ND] for rows_ND in rows_by_expert]
        done: int = json.loads(metadata["done"])
        log.info("%s: going on after %d batches", self._path, done)
        return done

    def save(self, done: int, steps: Sequence[Step], records: Sequence[LayerRecord]) -> None:
        """Write what the first `done` batches gave, unless the last writing was less than `every_s` ago."""
        if time.monotonic() - self._last_s < self._every_s:
            return
        rows_LE = [record.kept_rows() for record in records]
        tensors = {
            "steps": torch.tensor([[step.phase, step.domain, step.tokens] for step in steps]),
            "counts": torch.from_numpy(np.stack([step.counts_LE for step in steps])),
            "importance": torch.from_numpy(np.stack([record.importance_E for record in records])),
            "gate_mass": torch.from_numpy(np.stack([record.gate_mass_E for record in records])),
            "visits": torch.from_numpy(np.stack([record.visits_E for record in records])),
            "num_rows": torch.tensor([[len(rows_ND) for rows_ND in rows_E] for rows_E in rows_LE]),
        } | {f"rows.{i}": torch.cat(rows_E) for i, rows_E in enumerate(rows_LE)}
        with replacing(self._path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "key": self._key, "done": json.dumps(done)})
        self._last_s = time.monotonic()
