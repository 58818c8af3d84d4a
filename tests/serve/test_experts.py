"""Experts quantized in advance, served: the server's answers are those of the bytes that were written."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.quantize import quantize
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.load_model import load
from rq_ep.placing.place import place
from rq_ep.serve.rank.check_inputs import read_in_advance
from rq_ep.serve.rank.dry_run import preview
from tests.model.families import FAMILIES, random_model, save
from tests.serve.running import running

NUM_RANKS = 2
SAMPLE: dict[str, Any] = {"sequence_length": 64, "max_tokens": 4096}
PROMPT = "def main(arguments):\n    "


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A placement that stores experts in int4, and these experts by GPTQ."""
    home, text = tmp_path_factory.mktemp("experts"), tiny_checkpoint / "text" / "train"
    stats = calibrate(tiny_checkpoint, text, formats=["int4_g32"], **SAMPLE)
    placement = place(stats, NUM_RANKS, max_low_precision_share=0.5)
    placement.save(home / "placement.json")
    quantize(tiny_checkpoint, home / "experts", placement=placement, texts=text, **SAMPLE)
    return {"model": tiny_checkpoint, "placement": home / "placement.json", "experts": home / "experts"}


def config(files: dict[str, Path], **settings: str) -> ServeConfig:
    return ServeConfig(**{**{name: str(path) for name, path in files.items()}, **settings})


@pytest.mark.dist
@pytest.mark.slow
def test_a_served_answer_is_that_of_the_same_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    more = ["--served-model-name", "tiny", "--dtype", "float32", "--device", "cpu"]
    with running(tmp_path / "log", NUM_RANKS, *flags, *more) as server:
        answer = server.client.post("/v1/completions", json=body).json()["choices"][0]
        info = server.client.get("/server_info").json()
    assert str(files["experts"]) in str(info)

    tokenizer = read_tokenizer(files["model"])
    prompt_BT = torch.tensor([tokenizer.encode(PROMPT)])
    by_experts = {}
    for experts in (files["experts"], None):
        model = load(
            files["model"], files["placement"], num_local_ranks=NUM_RANKS, dtype="float32", packed_experts=experts
        )
        written_BT = model.generate(prompt_BT, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        logprobs_TV = model(written_BT).logits[0].log_softmax(-1)
        start = prompt_BT.shape[1]
        chosen_T = logprobs_TV[start - 1 : -1].gather(1, written_BT[0, start:, None])[:, 0]
        by_experts[experts] = (tokenizer.decode(written_BT[0, start:]), chosen_T)
    text, logprobs_T = by_experts[files["experts"]]
    served_T = torch.tensor(answer["logprobs"]["token_logprobs"])
    assert answer["text"] == text
    assert torch.allclose(served_T, logprobs_T, atol=1e-4)
    off, off_nearest = ((served_T - logprobs_T).abs().max() for _, logprobs_T in by_experts.values())
    assert off_nearest > 10 * off, "experts rounded to the nearest answer otherwise"


def test_the_preview_counts_them(files: dict[str, Path]) -> None:
    low = sum(
        len({replica.expert for replica in layer.replicas if replica.format == "int4_g32"})
        for layer in Placement.load(files["placement"]).layers
    )
    assert low > 0
    lines = preview(config(files), NUM_RANKS, NUM_RANKS)
    assert f"read from {files['experts']}: {low} in int4_g32" in lines
    assert f"experts: {files['experts']}" in lines


def test_what_does_not_fit_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    model, other = files["model"], tmp_path / "other"
    save(random_model(FAMILIES["mixtral"]), other)
    quantize(model, tmp_path / "int8", formats=["int8"], rounding="nearest")
    quantize(other, tmp_path / "foreign", formats=["int4_g32"], rounding="nearest")
    for settings, message in (
        ({"experts": str(tmp_path / "int8")}, r"does not hold expert \d of layer 0 in int4_g32, nor \d+ others"),
        ({"experts": str(tmp_path / "foreign")}, "made for model 'other'"),
        ({"experts": str(tmp_path)}, "no quantized experts there"),
    ):
        with pytest.raises(UserError, match=message):
            read_in_advance(config(files, **settings))
    PackedExperts.open(files["experts"], Placement.load(files["placement"]).model).file(0).write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match="cut short, damaged or foreign"):
        read_in_advance(config(files))
