"""Resuming a calibration that was stopped: the statistics are the same as without a stop."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.forward_stats import ForwardStats, collect_forward_stats, find_windows
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.settings import CalibrationSettings, WindowSettings
from rq_ep.model.text.windows import Windows
from rq_ep.parallel import EPGroup, run_local

SETTINGS = WindowSettings(sequence_length=32, max_tokens=2048)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedModel:
    return LoadedModel.open(tiny_checkpoint, torch.float32, "cpu")


def windows_of(tiny_checkpoint: Path, **changes: int) -> Windows:
    return find_windows(tiny_checkpoint, tiny_checkpoint / "text" / "train", replace(SETTINGS, **changes))


def until(stop: int):
    def progress(stage: str, done: int, total: int) -> None:
        assert total == 8
        if done == stop:
            raise Stopped

    return progress


def assert_same(a: ForwardStats, b: ForwardStats) -> None:
    assert [step[:3] for step in a.steps] == [step[:3] for step in b.steps]
    assert all(np.array_equal(x.counts_LE, y.counts_LE) for x, y in zip(a.steps, b.steps, strict=True))
    for one, other in zip(a.records, b.records, strict=True):
        for name in ("importance_E", "gate_mass_E", "visits_E"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert all(torch.equal(x, y) for x, y in zip(one.kept_rows(), other.kept_rows(), strict=True))


def test_a_stopped_run_resumes_where_it_was(loaded: LoadedModel, tiny_checkpoint: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    windows, path = windows_of(tiny_checkpoint), tmp_path / "out.resume"
    whole = collect_forward_stats(loaded, windows)
    for stop in (3, 6):
        with pytest.raises(Stopped):
            collect_forward_stats(loaded, windows, resume_path=path, save_every_s=0, progress=until(stop))
    assert "going on after 3 batches" in caplog.text
    seen = []
    again = collect_forward_stats(loaded, windows, resume_path=path, progress=lambda _, done, total: seen.append(done))
    assert seen == [7, 8]
    assert_same(whole, again)


def test_the_file_stays_until_all_is_measured(loaded: LoadedModel, tiny_checkpoint: Path, tmp_path: Path) -> None:
    windows, path = windows_of(tiny_checkpoint), tmp_path / "out.resume"
    collect_forward_stats(loaded, windows, resume_path=path, save_every_s=0)
    batches: list[int] = []

    def run(stop: str) -> ExpertStats:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == stop:
                raise Stopped
            if stage == "routing":
                batches.append(done)

        texts, settings = tiny_checkpoint / "text" / "train", CalibrationSettings(**vars(SETTINGS))
        return calibrate(tiny_checkpoint, texts, settings, dtype="float32", resume_path=path, progress=progress)

    with pytest.raises(Stopped):
        run(stop="formats")
    stats = run(stop="")
    assert batches == [8, 8], "the last batch alone is run again"
    assert stats.top_k == 2
    assert not path.exists()


def test_ranks_resume_together(tiny_checkpoint: Path, tmp_path: Path) -> None:
    windows, path = windows_of(tiny_checkpoint), tmp_path / "out.resume"
    seen: list[int] = []

    def collect(group: EPGroup, **options: Any) -> ForwardStats:
        sharded = LoadedModel.open(tiny_checkpoint, torch.float32, "cpu", group)
        return collect_forward_stats(sharded, windows, save_every_s=0, **options)

    with pytest.raises(Stopped):
        run_local(2, partial(collect, resume_path=path, progress=until(3)))
    with pytest.raises(UserError, match="rank 1 does not find it, but rank 0 does"):
        run_local(2, lambda group: collect(group, resume_path=path if group.rank == 0 else tmp_path / "elsewhere"))
    again = run_local(2, partial(collect, resume_path=path, progress=lambda _, done, total: seen.append(done)))
    assert min(seen) in (3, 4)  # rank 0 may have been stopped before it wrote the third batch
    assert sorted(seen) == sorted([*range(min(seen), 9)] * 2)
    for one, other in zip(again, run_local(2, collect), strict=True):
        assert_same(one, other)


def test_another_run_or_a_damaged_file_starts_anew(
    loaded: LoadedModel, tiny_checkpoint: Path, tmp_path: Path, caplog
) -> None:
    windows, path = windows_of(tiny_checkpoint), tmp_path / "out.resume"
    with pytest.raises(Stopped):
        collect_forward_stats(loaded, windows, resume_path=path, save_every_s=0, progress=until(3))
    other_windows = windows_of(tiny_checkpoint, seed=1)
    other = collect_forward_stats(loaded, other_windows, resume_path=path)
    assert "is of another run: starting anew" in caplog.text
    assert_same(other, collect_forward_stats(loaded, other_windows))
    path.write_bytes(b"nonsense")
    collect_forward_stats(loaded, windows, resume_path=path)
    assert "is damaged" in caplog.text
