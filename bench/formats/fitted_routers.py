"""Would it help to fit routers anew to experts in low bits? An experiment: nothing in `rq_ep` touches a router.

Experts in low bits shift the inputs of later layers, and so what their routers choose. On calibration text, every
router's weights are fitted, layer by layer, so that on the shifted inputs it gives the dense model's logits: least
squares with a little damping. The bound of what any correction of routers can give are the dense model's own choices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.model.text.windows import WindowBatch

DAMPING = 1e-2  # of the inputs' mean square


def routers_of(network: PreTrainedModel, experts: Sequence[ExpertsModule]) -> list[nn.Module]:
    """The routers of the MoE layers, which multiply a token by their parameter `weight` [E, D].

    Raises:
        UserError: a layer has no such module beside its experts.
    """
    routers: list[nn.Module] = []
    for layer in experts:
        block = network.get_submodule(layer.name.rpartition(".")[0])
        router = getattr(block, "gate", getattr(block, "router", None))
        if not isinstance(router, nn.Module) or not isinstance(getattr(router, "weight", None), nn.Parameter):
            raise UserError(f"{layer.name}: no router with a matrix of weights beside it")
        routers.append(router)
    return routers


@contextmanager
@torch.no_grad()
def fitted_anew(
    network: PreTrainedModel,
    routers: Sequence[nn.Module],
    changed: Callable[[], AbstractContextManager[None]],
    batches: Sequence[WindowBatch],
) -> Iterator[None]:
    """While open, the routers give, as nearly as their form allows, the dense model's logits on another's inputs.

    Args:
        network: the dense model.
        routers: of its layers, from the first to the last.
        changed: while it is open, `network` is the model that the routers are fitted to.
        batches: calibration text.
    """
    before = [_weight(router).clone() for router in routers]
    wanted = [_logits(router, x_ND) for router, x_ND in zip(routers, _inputs(network, routers, batches), strict=True)]
    try:
        with changed():
            for router, wanted_NE in zip(routers, wanted, strict=True):
                (x_ND,) = _inputs(network, [router], batches)
                _weight(router).add_(_least_squares(x_ND, wanted_NE - _logits(router, x_ND)))
        yield
    finally:
        for router, weight in zip(routers, before, strict=True):
            _weight(router).copy_(weight)


def _weight(router: nn.Module) -> Tensor:
    return router.get_parameter("weight")


def _logits(router: nn.Module, x_ND: Tensor) -> Tensor:
    return x_ND @ _weight(router).double().T


def _least_squares(x_ND: Tensor, residual_NE: Tensor) -> Tensor:
    """[E, D] the weights that explain most of a residual, damped."""
    moments_DD = x_ND.T @ x_ND
    moments_DD.diagonal().add_(DAMPING * moments_DD.diagonal().mean())
    weights_DE: Tensor = torch.linalg.solve(moments_DD, x_ND.T @ residual_NE)
    return weights_DE.T


def _inputs(network: PreTrainedModel, routers: Sequence[nn.Module], batches: Sequence[WindowBatch]) -> list[Tensor]:
    """What each router gets on the text, [N, D] in doubles."""
    kept: list[list[Tensor]] = [[] for _ in routers]

    def keep(rows: list[Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows.append(arguments[0].reshape(-1, arguments[0].shape[-1]).double())

    with ExitStack() as stack:
        for router, rows in zip(routers, kept, strict=True):
            stack.enter_context(router.register_forward_pre_hook(partial(keep, rows)))
        for batch in batches:
            network.base_model(batch.tokens_BT, use_cache=False)
    return [torch.cat(rows) for rows in kept]
