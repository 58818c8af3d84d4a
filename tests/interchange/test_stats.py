"""Expert statistics files of each engine: read into statistics for `place`; foreign and hostile ones are refused."""

import io
import json
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.interchange import STATS_FORMATS, ModelMetadata, to_stats
from tests.interchange.cases import damage

METADATA = ModelMetadata({"bf16": 1000, "int8": 504}, top_k=2)


def counts(*shape: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(1, 50, size=shape)


def read(name: str, *paths: Path, metadata: ModelMetadata = METADATA) -> ExpertStats:
    return to_stats(STATS_FORMATS[name].read(paths), metadata, str(paths[0]))


def sglang_stat(path: Path, counts_SLE: IntArray) -> Path:
    """A dump of the recorder's `stat` mode."""
    document = {
        "rank": 0,
        "logical_count": torch.from_numpy(counts_SLE.astype(np.int32)),
        "average_utilization_rate_over_window": 0.5,
    }
    torch.save(document, path)
    return path


def sglang_pass(path: Path, rank: int, counts_SLP: IntArray, experts_LP: IntArray, first: int = 7) -> Path:
    """A rank's dump of the recorder's `per_pass` mode."""
    records = [
        {
            "forward_pass_id": first + number,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.from_numpy(counts_LP.astype(np.int32)),
        }
        for number, counts_LP in enumerate(counts_SLP)
    ]
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(experts_LP)}, path)
    return path


def trtllm_folder(folder: Path, counts_RSLE: IntArray, layers: list[int], top_k: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": counts_RSLE.shape[3], "num_experts_per_token": top_k})
    )
    for rank, counts_SLE in enumerate(counts_RSLE):
        arrays = {
            f"{100 + step}_{layer}": counts_SLE[step, at]
            for step in range(len(counts_SLE))
            for at, layer in enumerate(layers)
        }
        save_file(arrays, folder / f"rank{rank}.safetensors")
    save_file({"100_0": np.zeros((3, 2))}, folder / "rank0_raw.safetensors")
    return folder


def test_sglang_stat_leaves_out_dense_layers_and_unused_ring(tmp_path: Path) -> None:
    counts_SLE = np.concatenate([counts(5, 4, 6), np.zeros((3, 4, 6), np.int64)])
    counts_SLE[:, 0] = 0
    stats = read("sglang", sglang_stat(tmp_path / "expert_distribution_recorder_1.pt", counts_SLE))
    assert stats.layers == (1, 2, 3)
    np.testing.assert_array_equal(stats.counts, counts_SLE[:5, 1:])
    assert (stats.native_format, stats.formats, stats.top_k) == ("bf16", ("bf16", "int8"), 2)
    more = sglang_stat(tmp_path / "expert_distribution_recorder_2.pt", counts(2, 4, 6, seed=1))
    both = read("sglang", tmp_path / "expert_distribution_recorder_1.pt", more)
    assert (both.num_steps, both.layers) == (7, (0, 1, 2, 3))
    chosen = read("sglang", more, metadata=ModelMetadata({"bf16": 1000}, layers=(2,)))
    assert (chosen.layers, chosen.num_layers) == ((2,), 1)


def test_sglang_passes_add_ranks_and_fold_slots(tmp_path: Path) -> None:
    experts_LP = np.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    counts_RSLP = counts(2, 3, 2, 4)
    paths = [
        sglang_pass(tmp_path / f"expert_distribution_recorder_1_{rank}.pt", rank, counts_RSLP[rank], experts_LP)
        for rank in range(2)
    ]
    stats = read("sglang", *paths)
    expected = np.zeros((3, 2, 3), np.int64)
    for (step, layer, slot), pairs in np.ndenumerate(counts_RSLP.sum(axis=0)):
        expected[step, layer, experts_LP[layer, slot]] += pairs
    np.testing.assert_array_equal(stats.counts, expected)
    with pytest.raises(UserError, match="pass 7 of rank 0 is there twice"):
        read("sglang", paths[0], paths[0])
    other = sglang_pass(tmp_path / "other.pt", 1, counts_RSLP[1], experts_LP[::-1].copy())
    with pytest.raises(UserError, match=r"other\.pt: another last_physical_to_logical_map"):
        read("sglang", paths[0], other)
    with pytest.raises(UserError, match=r"stat\.pt: last_physical_to_logical_map is no plain tensor"):
        read("sglang", paths[0], sglang_stat(tmp_path / "stat.pt", counts(2, 2, 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32, np.float64])
def test_counts_may_be_of_any_type(tmp_path: Path, dtype: type) -> None:
    counts_SLE = counts(3, 2, 4)
    save_file({"counts": counts_SLE.astype(dtype)}, tmp_path / "counts.safetensors")
    stats = read("numpy", tmp_path / "counts.safetensors")
    np.testing.assert_array_equal(stats.counts, counts_SLE)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint16, torch.uint64, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
def test_tensors_may_be_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    counts_SLE = counts(3, 2, 4) % 4
    torch.save({"logical_count": torch.from_numpy(counts_SLE).to(dtype), "rank": 0}, tmp_path / "stat.pt")
    recorded = STATS_FORMATS["sglang"].read([tmp_path / "stat.pt"])
    np.testing.assert_array_equal(recorded.counts_SLE, counts_SLE)


def test_trtllm_adds_ranks_and_knows_layers_and_top_k(tmp_path: Path) -> None:
    counts_RSLE = counts(3, 4, 2, 6)
    folder = trtllm_folder(tmp_path / "statistics", counts_RSLE, [3, 11])
    stats = read("trtllm", folder, metadata=ModelMetadata({"bf16": 1000}))
    np.testing.assert_array_equal(stats.counts, counts_RSLE.sum(axis=0))
    assert (stats.layers, stats.top_k) == ((3, 11), 2)
    with pytest.raises(UserError, match=r"--top-k 8: .* recorded at 2"):
        read("trtllm", folder, metadata=ModelMetadata({"bf16": 1000}, top_k=8))
    save_file({"103_3": counts_RSLE[0, 0, 0], "104_3": counts_RSLE[0, 0, 0]}, folder / "rank3.safetensors")
    with pytest.raises(UserError, match="iteration 104 lacks layer 11"):
        read("trtllm", folder)
    save_file({"103_3": np.zeros(5, np.int64)}, folder / "rank3.safetensors")
    with pytest.raises(UserError, match=r"rank3.safetensors: '103_3' has shape \[5\]"):
        read("trtllm", folder)


def test_vllm_folds_slots_and_adds_ranks(tmp_path: Path) -> None:
    experts_LP = np.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    window_SLP = counts(3, 2, 4)
    state = {"expert_load_window": window_SLP, "physical_to_logical_map": experts_LP}
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "rank0.pt")
    np.savez(tmp_path / "rank1.npz", allow_pickle=False, **state)
    stats = read(
        "vllm", tmp_path / "rank0.pt", tmp_path / "rank1.npz", metadata=ModelMetadata({"bf16": 1}, layers=(3, 4))
    )
    assert stats.layers == (3, 4)
    np.testing.assert_array_equal(stats.counts[:, 0, 0], 2 * (window_SLP[:, 0, 0] + window_SLP[:, 0, 3]))
    np.testing.assert_array_equal(stats.counts[:, 1, 2], 2 * (window_SLP[:, 1, 0] + window_SLP[:, 1, 1]))
    np.savez(tmp_path / "bare.npz", allow_pickle=False, expert_load_pass=window_SLP[0])
    with pytest.raises(UserError, match="save physical_to_logical_map beside it"):
        read("vllm", tmp_path / "bare.npz")
    np.savez(
        tmp_path / "grown.npz", allow_pickle=False, **state | {"physical_to_logical_map": experts_LP - [0, 0, 0, 1]}
    )
    grown = read("vllm", tmp_path / "grown.npz")
    np.testing.assert_array_equal(grown.counts[:, 0, 0], window_SLP[:, 0, 0])
    save_file({"logical_count": window_SLP}, tmp_path / "logical.safetensors")
    np.testing.assert_array_equal(read("vllm", tmp_path / "logical.safetensors").counts, window_SLP)


def test_ascend_takes_a_step_from_each_file(tmp_path: Path) -> None:
    heat_SLE = counts(2, 3, 4)
    torch.save(torch.from_numpy(heat_SLE[0]), tmp_path / "heat0.pt")
    np.save(tmp_path / "heat1.npy", heat_SLE[1].astype(np.float32))
    stats = read("ascend", tmp_path / "heat0.pt", tmp_path / "heat1.npy")
    np.testing.assert_array_equal(stats.counts, heat_SLE)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_numpy_of_any_kind(tmp_path: Path, suffix: str) -> None:
    path, counts_SLE = tmp_path / f"counts{suffix}", counts(3, 2, 4)
    named = {"counts": counts_SLE, "tokens": np.array([4, 5, 6]), "layers": np.array([1, 5])}
    if suffix == ".npy":
        np.save(path, counts_SLE)
    elif suffix == ".npz":
        np.savez_compressed(path, allow_pickle=False, **named, phase=np.array([0, 1, 1]))
    else:
        save_file(named, path)
    stats = read("numpy", path)
    np.testing.assert_array_equal(stats.counts, counts_SLE)
    assert stats.layers == ((0, 1) if suffix == ".npy" else (1, 5))
    if suffix == ".npz":
        assert stats.tokens is not None
        assert stats.phase is not None
        assert (stats.tokens.tolist(), stats.phase.tolist()) == ([4, 5, 6], [0, 1, 1])


def test_one_step_of_layers_and_experts_will_do(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", counts(2, 4))
    assert read("numpy", tmp_path / "counts.npy").counts.shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[[0.5]]]), "whole numbers from 0 up, but one is 0.5"),
        (np.array([[[-1]]]), "one is -1"),
        (np.array([[[np.nan]]]), "one is nan"),
        (np.array([[[2.0**60]]]), "must be whole numbers"),
        (np.array([[[True]]]), "is bool, not numbers"),
        (np.array([["many"]]), "not numbers"),
        (np.array([1, 2]), r"has shape \[2\], not \[steps, layers, experts\]"),
        (np.zeros((2, 0, 3)), r"has shape \[2, 0, 3\]"),
        (np.zeros((2, 1, 3)), "no step of it routes any pair"),
    ],
)
def test_what_is_no_count_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "counts.npy", array)
    with pytest.raises(UserError, match=rf"counts\.npy: .*{message}"):
        read("numpy", tmp_path / "counts.npy")


def test_missing_metadata_is_named_by_its_flag(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", counts(3, 2, 4))
    with pytest.raises(UserError, match="--expert-bytes: say what one expert takes"):
        read("numpy", tmp_path / "counts.npy", metadata=ModelMetadata())
    with pytest.raises(UserError, match=r"--layers names 3 layers, but .* has 2"):
        read("numpy", tmp_path / "counts.npy", metadata=ModelMetadata({"bf16": 1}, layers=(1, 2, 3)))
    with pytest.raises(UserError, match="native format 'fp8' is not among"):
        read("numpy", tmp_path / "counts.npy", metadata=ModelMetadata({"bf16": 1}, native_format="fp8"))
    with pytest.raises(UserError, match="has no layer 9; it has 0-3"):
        read(
            "sglang",
            sglang_stat(tmp_path / "s.pt", counts(1, 4, 2)),
            metadata=ModelMetadata({"bf16": 1}, layers=(1, 9)),
        )


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.mark)!r}, 'w')",))


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "record.pt"
    torch.save({"logical_count": Runs(mark)}, path)
    with pytest.raises(UserError, match=r"record\.pt: holds more than tensors and plain values"):
        read("sglang", path)
    path.write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(UserError, match=r"not a file that torch\.save wrote"):
        read("sglang", path)
    np.save(tmp_path / "counts.npy", np.array([Runs(mark)], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"counts\.npy: its content holds Python objects"):
        read("numpy", tmp_path / "counts.npy")
    np.savez(tmp_path / "counts.npz", counts=np.array([Runs(mark)], object))
    with pytest.raises(UserError, match=r"counts\.npz: counts holds Python objects"):
        read("numpy", tmp_path / "counts.npz")
    assert not mark.exists()


def test_absurd_sizes_are_refused_before_they_take_room(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.ones(1, dtype=torch.int32).expand(10**4, 10**4, 10**4)}, tmp_path / "wide.pt")
    with pytest.raises(UserError, match="claims 10000 x 10000 x 10000 numbers"):
        read("sglang", tmp_path / "wide.pt")
    torch.save({"logical_count": torch.ones(2, 2, 2).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(UserError, match="no plain tensor"):
        read("sglang", tmp_path / "sparse.pt")

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**6,) * 3})
    (tmp_path / "counts.npy").write_bytes(header.getvalue())
    with pytest.raises(UserError, match="claims 1000000 x 1000000 x 1000000 numbers"):
        read("numpy", tmp_path / "counts.npy")
    with zipfile.ZipFile(tmp_path / "counts.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("counts.npy", header.getvalue() + bytes(10**6))
    with pytest.raises(UserError, match=r"counts claims 1000000 x"):
        read("numpy", tmp_path / "counts.npz")

    packed, bomb = tmp_path / "packed.pt", tmp_path / "bomb.pt"
    sglang_stat(packed, counts(2, 3, 4))
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match=r"bomb\.pt: unpacks to"):
        read("sglang", bomb)


def test_a_header_that_is_no_python_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", counts(2, 2, 3))
    content = bytearray((tmp_path / "counts.npy").read_bytes())
    content[65] ^= 4
    (tmp_path / "counts.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"counts\.npy: not a readable \.npy file"):
        read("numpy", tmp_path / "counts.npy")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "counts.npy")
    with pytest.raises(UserError, match=r"counts\.npy: .*pipe"):
        read("numpy", tmp_path / "counts.npy")


def test_slots_without_layers_are_refused(tmp_path: Path) -> None:
    dump = sglang_pass(tmp_path / "dump.pt", 0, counts(3, 4), np.zeros(4, np.int64))
    with pytest.raises(UserError, match=r"dump\.pt: last_physical_to_logical_map has shape \[4\]"):
        read("sglang", dump)


def test_references_in_a_pickle_are_not_followed(tmp_path: Path) -> None:
    bomb: list[object] = [1]
    for _ in range(40):
        bomb = [bomb] * 10
    torch.save(
        {
            "records": [{"forward_pass_id": bomb, "rank": 0}],
            "last_physical_to_logical_map": torch.zeros(1, 1, dtype=torch.int64),
        },
        tmp_path / "bomb.pt",
    )
    with pytest.raises(UserError, match="forward_pass_id of a record"):
        read("sglang", tmp_path / "bomb.pt")


@pytest.mark.parametrize("name", STATS_FORMATS)
def test_missing_and_foreign_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read(name, tmp_path / "nowhere.pt")
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(2, 2)}, foreign)
    with pytest.raises(UserError, match=r"foreign\.pt"):
        read(name, foreign)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("sglang", ".pt"), ("vllm", ".npz"), ("ascend", ".npy"), ("numpy", ".safetensors"), ("trtllm", ".safetensors")],
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path: Path, name: str, suffix: str, data: st.DataObject) -> None:
    path = target = tmp_path / f"counts{suffix}"
    counts_SLE = counts(2, 2, 3)
    if name == "trtllm":
        target = trtllm_folder(tmp_path / "statistics", counts_SLE[None], [0, 1])
        path = target / "rank0.safetensors"
    elif suffix == ".pt":
        sglang_stat(path, counts_SLE)
    elif suffix == ".npz":
        np.savez(path, allow_pickle=False, logical_count=counts_SLE)
    elif suffix == ".npy":
        np.save(path, counts_SLE)
    else:
        save_file({"counts": counts_SLE}, path)
    damage(path, data)
    with suppress(UserError):  # anything else fails the test
        assert read(name, target).counts.min() >= 0
