"""The messages of the HTTP process to a rank that has loaded its model: each goes to the part of it that it is for."""

import threading
from dataclasses import replace
from typing import assert_never

from rq_ep.engine.engine import Engine
from rq_ep.serve.messages import (
    AddRequest,
    BeginMigration,
    Cancel,
    CheckMembers,
    ImageData,
    ImportanceReport,
    Mark,
    MessageError,
    MigrationGivenUp,
    PromptPart,
    RebalanceCommand,
    Regroup,
    ToLoadedRank,
    Wake,
    images_of,
)
from rq_ep.serve.rank.rebalance.live_rebalancing import LiveRebalancing
from rq_ep.serve.rank.recovery.group_recovery import GroupRecovery


class RankInbox:
    """Takes messages on the thread of the connection.

    Args:
        engine: of the rank.
        rebalancing: None: no experts move.
        recovery: None: the members of the group never change.
    """

    def __init__(
        self, engine: Engine, rebalancing: LiveRebalancing | None = None, recovery: GroupRecovery | None = None
    ) -> None:
        self._engine = engine
        self._rebalancing = rebalancing
        self._recovery = recovery
        self._prompt_parts: dict[str, list[int]] = {}  # by request, until the rest of it comes
        self._image_parts: dict[str, list[ImageData]] = {}

    def take(self, message: ToLoadedRank) -> None:
        """Take a message.

        Raises:
            MessageError: this rank has no part that it could be for, or it makes no sense.
        """
        match message:
            case PromptPart():
                self._prompt_parts.setdefault(message.id, []).extend(message.token_ids)
            case ImageData():
                self._image_parts.setdefault(message.id, []).append(message)
            case AddRequest():
                begun = self._prompt_parts.pop(message.request.id, [])
                images = images_of(self._image_parts.pop(message.request.id, []))
                prompt_ids = begun + message.request.prompt_ids
                self._engine.submit(replace(message.request, prompt_ids=prompt_ids, images=images))
                self._engine.wake(message.num_announced)
            case Cancel():
                self._prompt_parts.pop(message.id, None)
                self._image_parts.pop(message.id, None)
                self._engine.cancel(message.id)
            case Wake():
                self._engine.wake(message.num_announced)
            case Mark():
                self._engine.mark(message.number)
            case BeginMigration() | RebalanceCommand() | MigrationGivenUp() | ImportanceReport():
                if self._rebalancing is None:
                    raise MessageError("a message on rebalancing, which is off")
                self._rebalancing.handle(message)
                if not isinstance(message, ImportanceReport):
                    self._engine.wake(0)
            case Regroup():
                if self._recovery is None:
                    raise MessageError("a message on the members of the group, which cannot change")
                self._recovery.announce(message)
                self._engine.regroup(message.generation)
            case CheckMembers():
                if self._recovery is None:
                    raise MessageError("a question on the members of the group, which cannot change")
                # On a thread: it takes as long as the plan of a recovery, and requests come meanwhile.
                threading.Thread(target=self._recovery.check, args=(message,), name="rq_ep check", daemon=True).start()
            case _:
                assert_never(message)
