"""Settings of calibration, quantization and evaluation: plain values, which the command line can offer without torch.

The defaults and help texts are written down here alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rq_ep.config import DEVICES, DTYPES, CheckpointOptions
from rq_ep.core.options import check_options, option

DType = str | Any  # a name of DTYPES, or the torch.dtype itself, which is not imported here
ROUNDING_NAMES = ("calibrated", "nearest")

# Definitions of how much an expert matters. `drop` runs the model again for every expert; the others come out of the
# one pass over the text.
IMPORTANCES: Mapping[str, str] = {
    "output": "sum over routed calibration pairs of (gate weight * L2 norm of the expert's output)",
    "gate-mass": "sum of the gate weights of routed calibration pairs",
    "load": "routed calibration pairs",
    "wanda": "sum over weights of |weight| * L2 norm of its input over calibration pairs (arXiv 2306.11695)",
    "drop": "KL divergence of the next token, in nats, when the expert's output is left out",
}


@dataclass(frozen=True)
class WindowSettings:
    """The sample of text that runs through a model; see `rq_ep.model.text.windows`."""

    max_tokens: int = option(32_768, help="tokens to run, over all domains", minimum=0)
    sequence_length: int = option(128, help="tokens in a sequence", minimum=1)
    batch_size: int = option(8, help="sequences in a step", minimum=1)
    seed: int = option(0, help="chooses the places text is taken from", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class CalibrationSettings(WindowSettings, CheckpointOptions):
    """What `rq_ep.calibrate` measures, and on how much text."""

    formats: tuple[str, ...] | None = option(
        None,
        help="weight formats to measure, by commas: int8, fp8, fp8_g64, fp8_g128, int4_g32, int4_g64, int4_g128, "
        "mxfp4; the native one is always among them. Default: native and, unless the checkpoint is quantized already, "
        "int8",
    )
    importance: str = option(
        "output",
        help="what makes an expert important: output (gate weight x norm of its output), gate-mass, load, wanda, or "
        "drop (what the answers lose without it: a pass over the text for every expert, for small models)",
        choices=tuple(IMPORTANCES),
    )
    measure_kl: bool = option(
        False,
        help="measure what each expert in each format does to the answers, a pass for each: for small models, in one "
        "process; `place` then goes by that",
    )
    sensitivity_tokens: int = option(2048, help="tokens of each such pass, at least one batch", minimum=1)
    dtype: DType | None = option(None, help="dtype to compute in; default: as stored", choices=DTYPES)
    device: str = option("auto", help="device to compute on", choices=DEVICES)


@dataclass(frozen=True)
class QuantizeSettings(WindowSettings, CheckpointOptions):
    """How `quantize` rounds, and on how much text it calibrates."""

    rounding: str = option(
        "calibrated",
        help="calibrated (int4 by GPTQ, with regard to the inputs that each expert meets; needs text) or nearest",
        choices=ROUNDING_NAMES,
    )
    dtype: DType | None = option(None, help="dtype to compute in; default: as stored", choices=DTYPES)
    device: str = option("auto", help="device to compute on", choices=DEVICES)


@dataclass(frozen=True)
class EvaluationSettings(WindowSettings, CheckpointOptions):
    """How much text strategies and placements are compared on, and by what."""

    max_tokens: int = option(16_384, help="tokens to run, over all domains", minimum=0)
    dtype: DType = option(
        "float32",
        help="dtype to compute in; in float32 what remains is the error of the formats, in bfloat16 rounding adds its "
        "own",
        choices=DTYPES,
    )
    device: str = option("auto", help="device to compute on", choices=DEVICES)
    noise_floor: bool = option(
        True,
        help="also compare the dense model in bf16 with itself in fp32, which takes the memory of one more copy of it",
    )
    greedy_tokens: int = option(
        32,
        help="length of the greedy continuations compared with the dense model's, of at most 16 windows; 0: none",
        minimum=0,
    )
