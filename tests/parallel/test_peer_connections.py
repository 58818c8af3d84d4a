"""Which connections are ended with a group, and which are not."""

import os
import socket
from contextlib import ExitStack

from rq_ep.parallel.processes.peer_connections import PeerConnections, open_sockets


def test_only_new_connections_between_members_are_ended() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connected() -> tuple[socket.socket, socket.socket]:
            here = stack.enter_context(socket.create_connection(listener.getsockname()))
            return here, stack.enter_context(listener.accept()[0])

        older = connected()
        before = open_sockets()
        ours, foreign, replaced = connected(), connected(), connected()
        another = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        num_descriptors = len(os.listdir("/proc/self/fd"))
        connections = PeerConnections(before)
        assert len(connections.ends) == 6, "both ends of three connections are in this process; nobody listens at them"
        connections.keep_between([[(there.getsockname(), there.getpeername()) for _, there in (ours, replaced)]])
        of_members = {(here.getsockname(), here.getpeername()) for here, _ in (ours, replaced)}
        assert set(connections.ends) == of_members
        assert len(os.listdir("/proc/self/fd")) == num_descriptors

        number = replaced[0].fileno()
        replaced[0].close()
        later = connected()
        assert later[0].fileno() == number
        connections.shut_down()
        assert ours[0].recv(1) == ours[1].recv(1) == b""
        for here, there in (older, foreign, later):
            here.sendall(b"1")
            assert there.recv(1) == b"1"
        socket.create_connection(another.getsockname()).close()
