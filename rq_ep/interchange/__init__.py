"""Files of other engines: their expert statistics read, their placements written and read. One format per file.

Adding one is a file and a line in these tables.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.files.documents import replacing
from rq_ep.core.placement import Placement
from rq_ep.interchange import ascend, eplb, plain, sglang, trtllm, vllm
from rq_ep.interchange.recorded import ModelMetadata, RecordedLoads, to_stats
from rq_ep.interchange.slot_map import SlotMap


class StatsFormat(NamedTuple):
    """The statistics files of an engine."""

    read: Callable[[Sequence[Path]], RecordedLoads]
    summary: str


class PlacementFormat(NamedTuple):
    """The placement file of an engine with equal slots, one weight format and even splits."""

    read: Callable[[Path, int | None, Sequence[int] | None], SlotMap]  # path, ranks and layers if given
    write: Callable[[SlotMap, Path, str], None]  # slots, path, suffix
    suffixes: tuple[str, ...]
    summary: str
    allows_duplicates: bool = True  # whether a rank may hold an expert in two slots


STATS_FORMATS = {
    "sglang": StatsFormat(sglang.read_stats, "dumps of its expert distribution recorder (.pt)"),
    "trtllm": StatsFormat(trtllm.read_stats, "TensorRT-LLM's expert statistics folder"),
    "vllm": StatsFormat(vllm.read_stats, "saved fields of its EPLB state (.pt, .npz, .safetensors)"),
    "ascend": StatsFormat(ascend.read_stats, "vLLM-Ascend's expert heat (.pt, .npy)"),
    "numpy": StatsFormat(plain.read_stats, "counts [steps, layers, experts] (.npy, .npz, .safetensors)"),
}
ENGINES = {
    "sglang": PlacementFormat(sglang.read_map, sglang.write_map, (".json", ".pt"), "file for --init-expert-location"),
    "trtllm": PlacementFormat(trtllm.read_map, trtllm.write_map, (".yaml", ".yml"), "TensorRT-LLM's load balancer"),
    "ascend": PlacementFormat(
        ascend.read_map, ascend.write_map, (".json",), "vLLM-Ascend's expert map", allows_duplicates=False
    ),
    "eplb": PlacementFormat(
        eplb.read_map, eplb.write_map, (".npz", ".safetensors", ".pt"), "EPLB's phy2log, log2phy, logcnt"
    ),
}


def check_engine(flag: str, name: str, others: Sequence[str] = ()) -> str:
    """Return the name of an engine whose placements are read and written, or one of `others`; else a `UserError`."""
    if name == "vllm":
        raise UserError(
            f"{flag} vllm: vLLM reads no placement from a file; the plug-in places while it serves: VLLM_PLUGINS=rq_ep"
        )
    return check_choice(flag, name, [*others, *ENGINES])


def export(placement: Placement, engine: str, path: str | Path, num_model_layers: int = 0) -> None:
    """Write a placement for an engine, under a temporary name first.

    Args:
        engine: a name from `ENGINES`.
        path: its suffix chooses among the engine's formats.
        num_model_layers: layers of the model, dense ones included, where the file has a row for each (SGLang);
            0: up to the last MoE layer.

    Raises:
        UserError: the engine could not serve this placement as planned; what is wrong is named.
    """
    check_choice("engine", engine, ENGINES)
    try:
        slots = SlotMap.of(placement, num_model_layers)
    except UserError as error:
        raise UserError(f"{engine} cannot serve this placement: {error}") from None
    write_slots(slots, engine, path)


def write_slots(slots: SlotMap, engine: str, path: str | Path) -> None:
    """Write slots for an engine; see `export`."""
    kind, target = ENGINES[engine], Path(path)
    check_choice(f"file type for {engine}:", target.suffix, kind.suffixes)
    duplicate = slots.first_duplicate
    if duplicate is not None and not kind.allows_duplicates:
        raise UserError(
            f"{engine} cannot serve this placement: layer {duplicate.layer}: rank {duplicate.rank} holds expert "
            f"{duplicate.expert} twice"
        )
    with replacing(target) as temporary:
        kind.write(slots, temporary, target.suffix)


__all__ = [
    "ENGINES",
    "STATS_FORMATS",
    "ModelMetadata",
    "PlacementFormat",
    "RecordedLoads",
    "SlotMap",
    "StatsFormat",
    "export",
    "to_stats",
    "write_slots",
]
