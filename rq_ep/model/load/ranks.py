"""The ranks onto which a model is loaded, and those of them in this process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.topology import MAX_RANKS
from rq_ep.parallel import EPGroup
from rq_ep.parallel.default_group import default_group, own_device


@dataclass(frozen=True)
class LoadRanks:
    """All ranks of the model. `local` are those in this process: one of a group, or all of them without a group."""

    num_ranks: int
    local: tuple[int, ...]
    device: torch.device
    group: EPGroup | None

    @classmethod
    def of(cls, group: EPGroup | None, num_local_ranks: int | None, device: str) -> "LoadRanks":
        """The ranks of a group, by default the launcher's, or `num_local_ranks` ranks in this process.

        Raises:
            UserError: the arguments contradict each other, or the device is not there.
        """
        if num_local_ranks is not None:
            if group is not None:
                raise UserError(f"num_local_ranks {num_local_ranks}: give it or a group, not both")
            check_integer("num_local_ranks", num_local_ranks, 1, MAX_RANKS)
            return cls(num_local_ranks, tuple(range(num_local_ranks)), own_device(device), None)
        group = default_group(device) if group is None else group
        if device not in ("auto", group.device.type):
            raise UserError(f"device {device!r}: the group's tensors live on {group.device}")
        return cls(group.size, (group.rank,), group.device, group)

    @property
    def members(self) -> Sequence[int]:
        """The ranks that take part."""
        return range(self.num_ranks) if self.group is None else self.group.members

    @property
    def are_processes(self) -> bool:
        """Whether the other ranks are processes of their own."""
        return self.group is not None and self.group.backend != "local" and self.num_ranks > 1
