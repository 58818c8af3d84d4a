"""vLLM: its EPLB policy `default`, the one that asynchronous re-placement takes, goes on from its own answer.

    VLLM_PLUGINS=rq_ep vllm serve MODEL --enable-expert-parallel --enable-eplb ...

vLLM keeps the loads of the last steps [window, layers, slots] and sums them before it asks its policy. Here a sample of
these steps is added up over the ranks beside that sum; the policy recognizes the sum that it is given by its totals.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.plugins.engine_calls import NAME, CallChecker, Fallback, check_compiler, logger, seconds_allowed
from rq_ep.plugins.slot_rebalance import MAX_STEPS, SECONDS, Balancing, prepare, rebalanced

TESTED = ("0.33.0",)
POLICY, STATE = "vllm.distributed.eplb.policy", "vllm.distributed.eplb.eplb_state"
PARAMETERS = ("weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices")


def register() -> None:
    """The entry point: vLLM calls it in each of its processes, before it reads its policies.

    Nothing happens unless `VLLM_PLUGINS` names `rq_ep`: to install a package must not change what another one does.
    """
    if NAME not in (name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")):
        return
    checker = CallChecker("vllm", TESTED)
    try:
        policies = import_module(POLICY).EPLB_POLICIES
        own = policies["default"]
        if isinstance(own, StepPolicy):
            return
        check_compiler()
        checker.check(own.rebalance_experts, *PARAMETERS)
        policies["default"] = StepPolicy(own, Fallback("vLLM"), seconds_allowed())
    except (UserError, ImportError, AttributeError, KeyError) as error:
        logger.warning("rq_ep: vLLM places experts as without rq_ep: %s", error)
        return
    try:
        state = import_module(STATE)
        checker.check(state.EplbState.rearrange, "self", "is_profile", "rank_mapping", "use_last_expert_load")
        checker.check(state.EplbState._allreduce_list, "self", "tensor_list")
        state.EplbState.rearrange = _with_steps(state.EplbState.rearrange, state.gpu_sync_allowed)
    except (UserError, ImportError, AttributeError) as error:
        logger.warning("rq_ep: vLLM's loads are taken as sums, without their steps: %s", error)
    logger.info("rq_ep: places vLLM's experts%s", checker.untested())


class RecordedSteps(NamedTuple):
    """Loads of one model, over all ranks."""

    total_LE: IntArray  # of the whole window, by which vLLM's own sum is recognized
    steps_SLE: IntArray


@dataclass(frozen=True)
class StepPolicy:
    """Takes the place of vLLM's policy class, for the one method that vLLM calls."""

    own: Any  # vLLM's policy
    fallback: Fallback
    seconds: float = SECONDS
    recorded: Sequence[RecordedSteps] = ()

    def rebalance_experts(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[layers, num_replicas] the expert in each slot; vLLM's own answer where something is amiss.

        Args:
            weight: [layers, experts] pairs of each expert, summed over the window and the ranks.
            num_replicas: slots of all ranks.
            num_groups: groups of experts; they stay on a node where they divide by the nodes.
            num_nodes: nodes.
            num_ranks: ranks.
            old_global_expert_indices: [layers, slots] what serves now, -1 in slots that are new.
        """
        own: torch.Tensor = self.own.rebalance_experts(
            weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
        )
        return self.fallback(
            lambda: self._improved(own, weight, num_groups, num_nodes, num_ranks, old_global_expert_indices), own
        )

    def _improved(
        self,
        own: torch.Tensor,
        weight: torch.Tensor,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old: torch.Tensor | None,
    ) -> torch.Tensor:
        loads_LE = weight.cpu().numpy()
        if not loads_LE.any():  # vLLM tries a placement before it serves, to see that its memory suffices
            prepare()
            return own
        steps = (one.steps_SLE for one in self.recorded if np.array_equal(one.total_LE, loads_LE))
        hierarchical = num_groups % num_nodes == 0
        asked = Balancing(
            loads_SLE=next(steps, loads_LE[None]),
            own_LP=own.numpy(),
            num_ranks=num_ranks,
            num_nodes=num_nodes if hierarchical else 1,
            num_groups=num_groups if hierarchical else 1,
            old_LP=None if old is None else old.cpu().numpy(),
        )
        return torch.from_numpy(rebalanced(asked, self.seconds))


def _with_steps(rearrange: Callable[..., Any], sync_allowed: Callable[[], Any]) -> Callable[..., Any]:
    """vLLM's `EplbState.rearrange`, which all ranks call at the same step, with the steps of its window kept."""

    @functools.wraps(rearrange)
    def rearrange_with_steps(
        self: Any, is_profile: bool = False, rank_mapping: Any = None, use_last_expert_load: bool = False
    ) -> Any:
        if isinstance(self.policy, StepPolicy):
            recorded: list[RecordedSteps] = []
            if not is_profile and rank_mapping is None and not use_last_expert_load:
                with sync_allowed():
                    models = self.model_states.values()
                    recorded = self.policy.fallback(lambda: [_recorded(self, model) for model in models], recorded)
            self.policy = replace(self.policy, recorded=recorded)
        return rearrange(self, is_profile, rank_mapping, use_last_expert_load)

    return rearrange_with_steps


def _recorded(state: Any, model: Any) -> RecordedSteps:
    """The loads of one model by expert: of the window, and of a sample of its steps from the oldest to the newest.

    A rank's own position in the window says how old its steps are; ranks that idled have recorded fewer.
    """
    window_SLP = model.expert_load_window
    num_steps = len(window_SLP)
    ages = torch.linspace(0, num_steps - 1, min(MAX_STEPS, num_steps)).round().long()
    sample = ((ages + state.expert_load_window_step) % num_steps).to(window_SLP.device)
    experts_LP, num_experts = model.physical_to_logical_map, model.model.num_logical_experts
    sums = (window_SLP.sum(dim=0, keepdim=True), window_SLP[sample].long())
    total_1LE, steps_SLE = (
        state._allreduce_list([_by_expert(loads_SLP, experts_LP, num_experts)])[0].cpu().numpy() for loads_SLP in sums
    )
    return RecordedSteps(total_1LE[0], steps_SLE)


def _by_expert(loads_SLP: torch.Tensor, experts_LP: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[S, L, E] loads of experts from those of slots; empty slots count nothing."""
    loads_SLE = loads_SLP.new_zeros((*loads_SLP.shape[:2], num_experts + 1))
    index_LP = experts_LP.masked_fill(experts_LP < 0, num_experts).long()
    loads_SLE.scatter_add_(-1, index_LP.expand_as(loads_SLP), loads_SLP)
    return loads_SLE[..., :-1].contiguous()
