"""Placement rules: replicas that must or must not be on a rank, and their spread over nodes.

A rules file is YAML; every line may be left out:

    spread_nodes: true          # replicas of an expert are on as many nodes as possible
    whole_groups: true          # the experts of a group share a node (models that route by group)
    fixed:                      # these replicas must exist
      - {layer: 3, expert: 17, rank: 0}
    forbidden:                  # these replicas must not exist
      - {expert: 0-7, rank: [4, 5]}

An entry names layers (by their index in the model), experts and ranks: a number, a list, or a range. What it does not
name is not restricted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files.yaml_files import read_yaml
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology, nodes_of_groups


@dataclass(frozen=True)
class Selection:
    """Some layers, experts and ranks; None: all of them."""

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None

    def mask_LER(self, stats: ExpertStats, topology: Topology, what: str) -> BoolArray:
        """[L, E, R] true where selected; a `UserError` names a layer, expert or rank that does not exist."""
        axes = (
            _mask(f"{what}: layer", self.layers, stats.layers),
            _mask(f"{what}: expert", self.experts, range(stats.num_experts)),
            _mask(f"{what}: rank", self.ranks, range(topology.num_ranks)),
        )
        mask_LER: BoolArray = axes[0][:, None, None] & axes[1][:, None] & axes[2]
        return mask_LER


@dataclass(frozen=True)
class Rules:
    """Constraints on a placement beside its bytes. The default has none."""

    fixed: tuple[Selection, ...] = ()
    forbidden: tuple[Selection, ...] = ()
    spread_nodes: bool = False  # at most ceil(copies / nodes) replicas of an expert on a node
    whole_groups: bool = False  # every replica of a group's experts on one node, chosen layer by layer

    def fixed_LER(self, stats: ExpertStats, topology: Topology) -> BoolArray:
        """[L, E, R] the replicas that must exist."""
        return _union_LER(self.fixed, stats, topology, "--rules: fixed")

    def allowed_LER(self, stats: ExpertStats, topology: Topology) -> BoolArray:
        """[L, E, R] the replicas that may exist.

        Raises:
            UserError: the rules contradict each other, or leave an expert no rank.
        """
        allowed_LER = ~_union_LER(self.forbidden, stats, topology, "--rules: forbidden")
        if self.whole_groups:
            allowed_LER &= _one_node_LER(stats, topology)
        contradicted = np.argwhere(self.fixed_LER(stats, topology) & ~allowed_LER)
        if len(contradicted):
            raise UserError(f"--rules: {_replica(stats, contradicted[0])} is fixed, but it is not allowed there")
        homeless = np.argwhere(~allowed_LER.any(axis=2))
        if len(homeless):
            at, expert = homeless[0]
            raise UserError(f"--rules: expert {expert} of layer {stats.layers[at]} is allowed on no rank")
        return allowed_LER

    def check(self, held_LER: BoolArray, stats: ExpertStats, topology: Topology, what: str) -> None:
        """Raise a `UserError` that names the first replica of `what` that breaks a rule.

        Args:
            held_LER: [L, E, R] which rank holds which expert.
        """
        if self == Rules():
            return
        allowed_LER = self.allowed_LER(stats, topology)
        for breaking_LER, wrong in (
            (held_LER & ~allowed_LER, "is not allowed"),
            (self.fixed_LER(stats, topology) & ~held_LER, "is missing"),
        ):
            breaking = np.argwhere(breaking_LER)
            if len(breaking):
                raise UserError(f"{what} breaks --rules: {_replica(stats, breaking[0])} {wrong}; place with rq")
        if self.spread_nodes:
            on_node_LEN = np.add.reduceat(held_LER, _first_ranks(topology), axis=2, dtype=np.int64)
            most_LE = -(-on_node_LEN.sum(axis=2) // topology.num_nodes)
            crowded = np.argwhere(on_node_LEN > most_LE[:, :, None])
            if len(crowded):
                at, expert, node = crowded[0]
                raise UserError(
                    f"{what} breaks --rules: spread_nodes: {on_node_LEN[at, expert, node]} replicas of expert {expert} "
                    f"of layer {stats.layers[at]} on node {node}, at most {most_LE[at, expert]} may be; place with rq"
                )

    @classmethod
    def load(cls, path: str | Path) -> "Rules":
        """Read a YAML file of rules; a `UserError` names the entry that is wrong."""
        document = read_yaml(path, "rules", "--rules names a YAML file")
        try:
            return _read(document)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _read(document: Any) -> Rules:
    if not isinstance(document, Mapping):
        raise UserError(f"rules are a mapping such as `spread_nodes: true`, not {type(document).__name__}")
    for key in document:
        check_choice("rule", str(key), ("fixed", "forbidden", "spread_nodes", "whole_groups"))
    switches = {name: document[name] for name in ("spread_nodes", "whole_groups") if name in document}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} {value!r:.60}: must be true or false")
    return Rules(_entries("fixed", document), _entries("forbidden", document), **switches)


def _entries(name: str, document: Mapping[str, Any]) -> tuple[Selection, ...]:
    entries = document.get(name) or []
    if not isinstance(entries, list):
        raise UserError(f"{name}: must be a list of entries such as {{layer: 3, expert: 17, rank: 0}}")
    return tuple(_entry(f"{name}, entry {number}", entry) for number, entry in enumerate(entries))


def _entry(what: str, entry: Any) -> Selection:
    if not isinstance(entry, Mapping) or not entry:
        raise UserError(f"{what}: must name a layer, an expert or a rank, such as {{layer: 3, expert: 17, rank: 0}}")
    for key in entry:
        check_choice(f"key in {what}", str(key), ("layer", "expert", "rank"))
    numbers = {f"{key}s": _numbers(f"{what}: {key}", value) for key, value in entry.items()}
    return Selection(**numbers)


def _numbers(what: str, value: Any) -> tuple[int, ...]:
    """The numbers of `3`, `[3, 4]` or `3-7`."""
    if isinstance(value, list):
        return tuple(check_integer(what, number) for number in value)
    if isinstance(value, str):
        first, dash, last = value.partition("-")
        if not (dash and first.strip().isdecimal() and last.strip().isdecimal()):
            raise UserError(f"{what} {value!r:.60}: must be a number, a list, or a range such as 0-7")
        low, high = check_integer(what, int(first[:18]), 0, 2**16), check_integer(what, int(last[:18]), 0, 2**16)
        if low > high:
            raise UserError(f"{what} {value!r:.60}: the range is empty")
        return tuple(range(low, high + 1))
    return (check_integer(what, value),)


def _mask(what: str, chosen: tuple[int, ...] | None, existing: tuple[int, ...] | range) -> BoolArray:
    if chosen is None:
        return np.ones(len(existing), bool)
    known = set(existing)
    for number in chosen:
        if number not in known:
            raise UserError(f"{what} {number}: there are {len(existing)}, {existing[0]} to {existing[-1]}")
    return np.isin(np.array(existing), np.array(chosen, np.int64))


def _union_LER(entries: tuple[Selection, ...], stats: ExpertStats, topology: Topology, what: str) -> BoolArray:
    union_LER = np.zeros((stats.num_layers, stats.num_experts, topology.num_ranks), bool)
    for entry in entries:
        union_LER |= entry.mask_LER(stats, topology, what)
    return union_LER


def _one_node_LER(stats: ExpertStats, topology: Topology) -> BoolArray:
    """[L, E, R] the ranks of the node that each expert's group is assigned to, by load."""
    groups = stats.expert_groups
    if not groups or stats.num_experts % groups:
        raise UserError(
            f"--rules: whole_groups: {stats.source} names {groups or 'no'} expert groups for {stats.num_experts} "
            "experts; leave whole_groups out"
        )
    loads_LG = stats.counts.sum(axis=0).reshape(stats.num_layers, groups, -1).sum(axis=2).astype(np.float64)
    loads_LG[~loads_LG.any(axis=1)] = 1  # unused groups are spread evenly
    nodes_LG = np.stack([nodes_of_groups(loads_G, topology.num_nodes) for loads_G in loads_LG])
    nodes_LE = np.repeat(nodes_LG, stats.num_experts // groups, axis=1)
    same_LER: BoolArray = nodes_LE[:, :, None] == topology.nodes_R
    return same_LER


def _first_ranks(topology: Topology) -> IntArray:
    return np.searchsorted(topology.nodes_R, np.arange(topology.num_nodes))


def _replica(stats: ExpertStats, at: IntArray) -> str:
    return f"expert {at[1]} of layer {stats.layers[at[0]]} on rank {at[2]}"
