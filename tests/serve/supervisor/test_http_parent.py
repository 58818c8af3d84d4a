"""Where rank 0 listens for the other ranks."""

import logging
import socket

import pytest

from rq_ep.config import Environment, ServeConfig, bind_for_ranks
from rq_ep.core.errors import UserError
from rq_ep.serve.supervisor import http_parent
from rq_ep.serve.supervisor.http_parent import HttpProcess

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "1"}


@pytest.mark.parametrize("master_addr", ["127.0.0.1", "localhost", socket.gethostname(), "nowhere.invalid"])
def test_on_one_node_the_ranks_meet_on_the_loopback_interface(master_addr: str) -> None:
    environment = Environment.from_os({**LAUNCHED, "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": master_addr})
    with bind_for_ranks(environment) as control:
        assert control.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("master_addr", "expected"),
    [("127.0.0.2", {"127.0.0.2", "127.0.0.1"}), ("localhost", {"127.0.0.1"}), ("[::1]", {"::1"})],
)
@pytest.mark.parametrize("local_world_size", [{}, {"LOCAL_WORLD_SIZE": "2"}])
def test_on_several_nodes_they_meet_on_the_interface_of_master_addr_alone(
    master_addr: str, expected: set[str], local_world_size: dict[str, str]
) -> None:
    environment = Environment.from_os({**LAUNCHED, **local_world_size, "MASTER_ADDR": master_addr})
    try:
        control = bind_for_ranks(environment)
    except UserError:
        assert "::1" in expected, "this machine has no IPv6"
        return
    with control:
        assert control.getsockname()[0] in expected
        socket.create_connection(control.getsockname()[:2], timeout=5).close()


def test_the_interface_of_several_nodes_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_parent, "subprocess", FakeSubprocess)
    for size, num_lines in (("4", 0), ("2", 1)):
        caplog.clear()
        environment = Environment.from_os({**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": size})
        with caplog.at_level(logging.INFO):
            http = HttpProcess(ServeConfig(model="m", port=0), environment)
        http.client.close()
        lines = [record.getMessage() for record in caplog.records if "ranks of all nodes" in record.getMessage()]
        expected = (
            f"the ranks of all nodes connect to 127.0.0.1, port {http.hub.address[1]}; nobody else needs to reach it"
        )
        assert lines == [expected] * num_lines


class FakeSubprocess:
    """Starts nothing."""

    PIPE = -1

    class Popen:
        def __init__(self, *_: object, **__: object) -> None:
            self.stdin = self

        def write(self, text: bytes) -> None: ...

        def close(self) -> None: ...


def test_a_master_addr_that_leads_nowhere_is_named() -> None:
    environment = Environment.from_os({**LAUNCHED, "MASTER_ADDR": "nowhere.invalid"})
    with pytest.raises(UserError, match=r"MASTER_ADDR=nowhere.invalid: no interface of this machine leads there"):
        bind_for_ranks(environment)
