"""A tiny Mixture-of-Experts language model, trained in a minute on a CPU, for tests and demonstrations.

Unlike random weights it has experts that specialise by domain, a perplexity that low bits could harm, and answers that
look like words. The training recipe was tuned on one core: many small steps, large initial weights, and a balance loss
for each layer.

Axes: B sequences, T tokens of a sequence, V vocabulary.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.model.seam.adapters import ADAPTERS, adapter_for
from rq_ep.model.text import corpus
from rq_ep.model.text.byte_tokenizer import BOS, EOS, PAD, byte_tokenizer
from rq_ep.model.text.teacher_forcing import teacher_forcing_inputs
from rq_ep.model.tiny_recipe import MAX_LENGTH, TrainingRecipe, transformers_config

RECIPE_FILE = "tiny_model.json"
TEXT_DIRECTORY = "text"

# Called after every step: steps done, steps in all, this step's loss in nats per byte, bytes of text so far.
TrainingCallback = Callable[[int, int, float, int], None]


def tiny_model(
    directory: str | Path, recipe: TrainingRecipe | None = None, progress: TrainingCallback | None = None
) -> bool:
    """Train the model of `recipe` and save it, with its tokenizer and its text, as an ordinary checkpoint.

    A directory that already holds this model is left unchanged. The checkpoint is written atomically: an interrupted
    run leaves the directory as it was.

    Args:
        directory: where the checkpoint goes; the text goes to `directory`/text/{train,held-out}/DOMAIN.
        progress: called after every step.

    Returns:
        True if a model was trained, False if the directory held it already.

    Raises:
        UserError: the directory holds something that this function did not write, or cannot be written.
    """
    recipe = recipe or TrainingRecipe()
    target = Path(directory)
    if _recipe_of(target) == asdict(recipe):
        return False
    if target.exists() and not (target.is_dir() and ((target / RECIPE_FILE).exists() or not any(target.iterdir()))):
        raise UserError(f"--out {target}: exists and holds something else; name another directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written ({error.strerror}); name another place") from None
    with temporary as scratch:
        finished = Path(scratch, "model")
        save(train(recipe, progress), recipe, finished)
        if _recipe_of(target) == asdict(recipe):  # another process was faster
            return False
        if target.exists():
            target.rename(Path(scratch, "old"))
        finished.rename(target)
    return True


def train(recipe: TrainingRecipe, progress: TrainingCallback | None = None) -> PreTrainedModel:
    """Train in fp32 on the CPU; the same recipe on the same machine and number of threads gives the same bits."""
    with _training_settings(recipe.seed):
        model = _new_model(recipe)
        model.train()
        optimizer = torch.optim.AdamW(_parameter_groups(model), lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe.steps))
        is_encoder_decoder = model.config.is_encoder_decoder  # reads one sequence, writes the next
        batches = _batches(recipe, recipe.sequence_length * 2 if is_encoder_decoder else recipe.sequence_length + 1)
        with _balance_losses(model) as balance_losses:
            for step in range(1, recipe.steps + 1):
                arguments, tokens_BT = teacher_forcing_inputs(model.config, next(batches), include_last=False)
                balance_losses.clear()
                logits_BTV = model(**arguments, use_cache=False).logits
                loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
                (loss + recipe.aux_coefficient * torch.stack(balance_losses).mean()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if progress:
                    progress(step, recipe.steps, loss.item(), step * recipe.batch_size * recipe.sequence_length)
    model.eval()
    return model


def save(model: PreTrainedModel, recipe: TrainingRecipe, directory: Path) -> None:
    """Write checkpoint (bf16), tokenizer, generation settings and text; then the recipe, as a mark of completion."""
    model.bfloat16()
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=start
    )
    model.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files private; a model is for sharing
    byte_tokenizer(MAX_LENGTH).save_pretrained(directory)
    corpus.write_corpus(directory / TEXT_DIRECTORY)
    (directory / RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=1) + "\n")


def _new_model(recipe: TrainingRecipe) -> PreTrainedModel:
    """A model of random weights, in fp32."""
    # sdpa supports neither attention sinks nor learned position biases.
    attention = "eager" if recipe.family in ("gpt_oss", "switch_transformers") else "sdpa"
    experts = {} if recipe.family in ADAPTERS else {"experts_implementation": "grouped_mm"}
    model: PreTrainedModel = adapter_for(recipe.family).auto_class.from_config(
        transformers_config(recipe), dtype=torch.float32, attn_implementation=attention, **experts
    )
    return model


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weight decay for matrices, none for norms and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]


def _lr_factor(step: int, num_steps: int, num_warmup: int = 20, floor: float = 0.02) -> float:
    """Learning-rate schedule: linear warm-up, then a cosine down to `floor`."""
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return floor + (1 - floor) * (1 + cos(pi * min(progress, 1.0))) / 2


def _batches(recipe: TrainingRecipe, length: int) -> Iterator[Tensor]:
    """Generate [B, length] batches without end; row i is a random excerpt from domain i mod 4."""
    train = corpus.texts("train")
    streams = [np.frombuffer("".join(train[domain]).encode(), np.uint8) for domain in corpus.DOMAINS]
    generator = np.random.default_rng(recipe.seed)
    while True:
        rows = []
        for row in range(recipe.batch_size):
            stream = streams[row % len(streams)]
            start = generator.integers(len(stream) - length)
            rows.append(stream[start : start + length])
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


@contextmanager
def _balance_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the load-balancing loss of each MoE layer in forward passes (arXiv 2101.03961, eq. 4).

    1.0 is perfect balance. transformers' own loss averages the routers of all layers, which leaves single layers skewed
    with dead experts. Every family's router class is called `...Router` and returns (logits, weights, ids); that of
    Switch Transformers returns the logits last, and their maximum is its choice.
    """
    losses: list[Tensor] = []

    def record(router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, topk_ids_TK = output
        if topk_ids_TK.is_floating_point():
            logits_TE = topk_ids_TK.flatten(0, 1)
            topk_ids_TK = logits_TE.argmax(dim=1)
        num_experts = logits_TE.shape[-1]
        load_E = torch.bincount(topk_ids_TK.flatten(), minlength=num_experts) / topk_ids_TK.numel()
        losses.append(num_experts * (load_E * logits_TE.float().softmax(-1).mean(0)).sum())

    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    assert routers, f"{type(model).__name__} has no router to balance"
    handles = [router.register_forward_hook(record) for router in routers]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _training_settings(seed: int) -> Iterator[None]:
    """While open, one thread (more gain nothing here), no denormals, and a random generator with this seed."""
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(num_threads)


def _recipe_of(directory: Path) -> dict[str, Any] | None:
    try:
        recipe: dict[str, Any] = json.loads((directory / RECIPE_FILE).read_text())
        return recipe
    except (OSError, json.JSONDecodeError):
        return None
