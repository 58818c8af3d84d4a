"""SGLang: an EPLB algorithm of the name `rq_ep`, through SGLang's own hooks for plug-ins.

    python -m sglang.launch_server --model-path MODEL --ep-size 32 --enable-eplb --eplb-algorithm rq_ep ...

SGLang hands its algorithm the loads of the recorded steps. What serves now is taken from its expert locations, so that
few experts move.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.interchange.eplb import slot_tables
from rq_ep.interchange.slot_map import SlotMap
from rq_ep.plugins.engine_calls import NAME, CallChecker, Fallback, check_compiler, logger, seconds_allowed
from rq_ep.plugins.slot_rebalance import Balancing, rebalanced

TESTED = ("0.5.23",)
ALGORITHMS, LOCATIONS = "sglang.srt.eplb.eplb_algorithms", "sglang.srt.eplb.expert_location"
HOOKS = "sglang.srt.plugins.hook_registry"
PARAMETERS = (
    "tokens_per_expert", "num_physical_experts", "num_local_physical_experts", "num_groups", "num_nodes", "algorithm",
)  # fmt: skip
OWN_NAME = "auto"

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def register() -> None:
    """The entry point: SGLang calls it in each of its processes, then applies the hooks.

    Nothing changes but for those who say `--eplb-algorithm rq_ep`.
    """
    checker = CallChecker("sglang", TESTED)
    try:
        hooks, algorithms = import_module(HOOKS), import_module(ALGORITHMS)
        register_hook, around = hooks.HookRegistry.register, hooks.HookType.AROUND
        checker.check(algorithms.compute_algorithm, "raw_algorithm", "num_groups", "num_nodes")
    except (UserError, ImportError, AttributeError) as error:
        logger.warning("rq_ep: SGLang will not know --eplb-algorithm %s: %s", NAME, error)
        return
    try:
        check_compiler()
        checker.check(algorithms.rebalance_experts, *PARAMETERS)
        improve = ImproveAlgorithm(Fallback("SGLang"), seconds_allowed())
    except (UserError, AttributeError) as error:
        logger.warning("rq_ep: --eplb-algorithm %s places as %s: %s", NAME, OWN_NAME, error)
        register_hook(f"{ALGORITHMS}.compute_algorithm", choose_own, around)
        return
    register_hook(f"{ALGORITHMS}.compute_algorithm", choose_algorithm, around)
    register_hook(f"{ALGORITHMS}.rebalance_experts", improve.around, around)
    logger.info("rq_ep: is SGLang's EPLB algorithm %s%s", NAME, checker.untested())


@dataclass(frozen=True)
class Improved:
    """Stands for an algorithm of SGLang that ours goes on from."""

    own: Any


def choose_algorithm(original: Callable[..., Any], raw_algorithm: str, num_groups: int | None, num_nodes: int) -> Any:
    """Around `compute_algorithm`: what `--eplb-algorithm` names."""
    if raw_algorithm != NAME:
        return original(raw_algorithm, num_groups, num_nodes)
    return Improved(original(OWN_NAME, num_groups, num_nodes))


def choose_own(original: Callable[..., Any], raw_algorithm: str, num_groups: int | None, num_nodes: int) -> Any:
    """Around `compute_algorithm`, where ours cannot place."""
    return original(OWN_NAME if raw_algorithm == NAME else raw_algorithm, num_groups, num_nodes)


@dataclass(frozen=True)
class ImproveAlgorithm:
    """How `rebalance_experts` answers for our algorithm."""

    fallback: Fallback
    seconds: float

    def around(
        self,
        original: Callable[..., Maps],
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Maps:
        """Around `rebalance_experts`.

        Args:
            original: SGLang's function.
            tokens_per_expert: [steps, layers, experts] pairs; layers without experts count nothing.
            num_physical_experts: slots of all ranks.
            num_local_physical_experts: slots of a rank.
            num_groups: groups of experts, if the model has any; they stay on a node where they divide by the nodes.
            num_nodes: nodes.
            algorithm: ours, or one of SGLang's, which is left to it.

        Returns:
            [layers, slots] the expert in each slot; [layers, experts, most replicas] the slots of each expert, padded
            with -1; [layers, experts] how many these are.
        """
        sizes = (num_physical_experts, num_local_physical_experts, num_groups, num_nodes)
        if not isinstance(algorithm, Improved):
            return original(tokens_per_expert, *sizes, algorithm)
        own = original(tokens_per_expert, *sizes, algorithm.own)
        groups = num_groups if num_groups and num_groups % num_nodes == 0 else None
        return self.fallback(
            lambda: _maps(
                rebalanced(
                    Balancing(
                        loads_SLE=tokens_per_expert.cpu().numpy(),
                        own_LP=own[0].cpu().numpy(),
                        num_ranks=num_physical_experts // num_local_physical_experts,
                        num_nodes=num_nodes if groups else 1,
                        num_groups=groups or 1,
                        old_LP=_serving(),
                    ),
                    self.seconds,
                ),
                num_physical_experts // num_local_physical_experts,
            ),
            own,
        )


def _serving() -> np.ndarray | None:
    """[layers, slots] what serves now; None at the start, and where SGLang keeps it elsewhere."""
    try:
        locations = import_module(LOCATIONS).get_global_expert_location_metadata()
        return None if locations is None else np.asarray(locations.physical_to_logical_map_cpu.numpy())
    except (ImportError, AttributeError):
        return None


def _maps(experts_LP: IntArray, num_ranks: int) -> Maps:
    layers, num_experts = tuple(range(len(experts_LP))), int(experts_LP.max()) + 1
    tables = slot_tables(SlotMap(experts_LP, layers, num_ranks, num_experts))
    phy2log, log2phy, logcnt = (torch.from_numpy(tables[name]) for name in ("phy2log", "log2phy", "logcnt"))
    return phy2log, log2phy, logcnt
