"""The environment variables of launchers, and those of children."""

from dataclasses import replace
from pathlib import Path

import pytest

from rq_ep.config import Environment, child_environment
from rq_ep.core.errors import UserError


def test_a_process_started_by_hand_is_the_only_rank() -> None:
    assert Environment.from_os({}) == Environment()


def test_the_environment_is_read_as_torchrun_sets_it() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "2950"}
    expected = Environment(3, 4, 1, 4, "node0", 2950, has_launcher=True, is_one_node=False)
    assert Environment.from_os(given) == expected
    assert Environment.from_os({**given, "MASTER_ADDR": "[fe80::1]"}) == replace(expected, master_addr="fe80::1")
    assert Environment.from_os({**given, "LOCAL_WORLD_SIZE": "2"}) == replace(expected, local_world_size=2)
    assert Environment.from_os({**given, "LOCAL_WORLD_SIZE": "4"}) == replace(expected, is_one_node=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK=4 does not lie in 0..3"),
        ({"RANK": "first"}, "RANK='first' in the environment is not a number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='' in the environment is not a number"),
    ],
)
def test_a_broken_environment_is_named(change: dict[str, str], message: str) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "2950"}
    with pytest.raises(UserError, match=message):
        Environment.from_os({**given, **change})


def test_a_half_set_environment_is_named() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT"):
        Environment.from_os({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_child_finds_this_package() -> None:
    assert (Path(child_environment()["PYTHONPATH"].split(":")[0]) / "rq_ep" / "config" / "environment.py").exists()
