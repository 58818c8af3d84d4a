"""The steps that no request makes: those before the first one, and that of a rank which has nothing to do.

A model that fails does so in its first steps, before requests come. In the empty step a rank enters every MoE layer, in
order, with zero rows, while others have some.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from rq_ep.core.errors import UserError
from rq_ep.moe import EPExperts

# Of the prompt that every rank runs, with a token after it, before requests come
WARMUP_TOKENS = 16

# What a model raises whose code does not fit its settings or its cache, on every rank alike
_AT_FAULT = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, NameError, NotImplementedError)


@contextmanager
def first_steps(layers: Sequence[EPExperts]) -> Iterator[None]:
    """Inside, the layers record nothing of their calls.

    Args:
        layers: the model's expert-parallel layers.

    Raises:
        UserError: the model fails inside, by its own code; running out of memory is not meant.
    """
    try:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.recording_nothing())
            yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, _AT_FAULT) and type(error) is not RuntimeError:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the model fails in its first step ({type(error).__name__}: {reason}): see its config.json"
        ) from error


def empty_step(model: nn.Module, layers: Sequence[nn.Module]) -> Callable[[], None]:
    """Prepare the zero-row step of a model; every rank must call this together, as it runs the model once.

    One token is sent through the model to see what its routers hand to the layers: their number of experts per token
    and their dtypes differ between families, and every rank of an exchange must name the same ones.

    Args:
        model: a causal language model whose experts are expert-parallel.
        layers: its expert-parallel layers, in the order in which a forward pass enters them.

    Returns:
        A function that enters every layer with zero rows.
    """
    inputs: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def remember(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[layer] = tuple(arg[:0].clone() for arg in args)

    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(input_ids=token, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert list(inputs) == list(layers), "every expert-parallel layer must be entered once, in order"

    @torch.no_grad()
    def step() -> None:
        for layer, args in inputs.items():
            layer(*args)
        if token.is_cuda:  # batches run on a stream of their own, and share the layers' buffers with this one
            torch.cuda.current_stream().synchronize()

    return step
