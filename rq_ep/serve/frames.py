"""The frames of a control connection, each with a MAC: who does not know the secret of the run can send none.

A connection begins with a greeting: the role of who connects, the number of the rank, a nonce, and their MAC. Every
message after it, in either direction, is a frame: its size, its MAC, and its JSON. The MAC is made with a key of this
connection and direction, and covers the frame's number, so that a frame can be neither made, nor changed, nor sent
again elsewhere. Nothing is parsed before its MAC was verified. Nothing is encrypted.
"""

import hmac
import secrets
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from rq_ep.serve.messages import MAX_MESSAGE_BYTES, MessageError

DIGEST = "sha256"
GREETING = Struct("!BI16s32s")  # role, rank, nonce, MAC
HEADER = Struct("!I32s")  # size of the message, MAC


class Role(IntEnum):
    """Who is at the other end of a connection to the HTTP process."""

    RANK = 0
    SUPERVISOR = 1  # of a rank


class Greeting(NamedTuple):
    """The first bytes of a connection, once they are known to be of this run."""

    role: Role
    rank: int
    nonce: bytes


def make_greeting(secret: str, rank: int, role: Role = Role.RANK) -> tuple[bytes, bytes]:
    """A greeting, and the nonce in it."""
    nonce = secrets.token_bytes(16)
    return GREETING.pack(role, rank, nonce, _greeting_mac(secret, role, rank, nonce)), nonce


def read_greeting(secret: str, greeting: bytes) -> Greeting | None:
    """Who connects; None if whoever wrote the greeting does not know the secret."""
    role, rank, nonce, mac = GREETING.unpack(greeting)
    if not hmac.compare_digest(mac, _greeting_mac(secret, role, rank, nonce)) or role not in tuple(Role):
        return None
    return Greeting(Role(role), rank, nonce)


def _greeting_mac(secret: str, role: int, rank: int, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), b"greeting" + role.to_bytes(1) + rank.to_bytes(4) + nonce, DIGEST)


class Frames:
    """One direction of a connection: makes its frames at one end, verifies them at the other.

    Args:
        secret: of the run.
        nonce: of the connection.
        is_to_rank: the direction.
    """

    def __init__(self, secret: str, nonce: bytes, *, is_to_rank: bool) -> None:
        self._key = hmac.digest(secret.encode(), (b"to rank" if is_to_rank else b"from rank") + nonce, DIGEST)
        self._number = 0

    def pack(self, body: bytes) -> bytes:
        """The next frame."""
        return HEADER.pack(len(body), self._next_mac(body)) + body

    @staticmethod
    def read_header(header: bytes) -> tuple[int, bytes]:
        """Size of the message that follows, and its MAC.

        Raises:
            MessageError: no message is so long.
        """
        size, mac = HEADER.unpack(header)
        if size > MAX_MESSAGE_BYTES:
            raise MessageError(f"a message of {size} bytes, more than {MAX_MESSAGE_BYTES}")
        return size, mac

    def verify(self, body: bytes, mac: bytes) -> bytes:
        """Return the message of the next frame.

        Raises:
            MessageError: it is not what the other end sent next.
        """
        if not hmac.compare_digest(mac, self._next_mac(body)):
            raise MessageError(f"a message whose MAC is wrong: {body[:60]!r}")
        return body

    def _next_mac(self, body: bytes) -> bytes:
        number, self._number = self._number, self._number + 1
        return hmac.digest(self._key, number.to_bytes(8) + body, DIGEST)
