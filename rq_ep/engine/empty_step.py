"""The step of a rank that has nothing to do while others have: every MoE layer, in order, with zero rows."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rq_ep.core.errors import UserError

# What a model raises that was built from settings of a wrong type or size, on every rank alike
DAMAGED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, NameError)


def empty_step(model: nn.Module, layers: Sequence[nn.Module]) -> Callable[[], None]:
    """Prepare the zero-row step of a model; every rank must call this together, as it runs the model once.

    One token is sent through the model to see what its routers hand to the layers: their number of experts per token
    and their dtypes differ between families, and every rank of an exchange must name the same ones.

    Args:
        model: a causal language model whose experts are expert-parallel.
        layers: its expert-parallel layers, in the order in which a forward pass enters them.

    Returns:
        A function that enters every layer with zero rows.

    Raises:
        UserError: the model's settings are damaged.
    """
    inputs: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def remember(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[layer] = tuple(arg[:0].clone() for arg in args)

    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(input_ids=token, use_cache=False)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"the model fails in its first step ({type(error).__name__}: {error}): see its config.json"
        ) from error
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
