"""What the tests of the engine share."""

from collections.abc import Iterator

import pytest

from rq_ep.parallel import TorchGroup


@pytest.fixture(scope="package")
def gloo_of_one() -> Iterator[TorchGroup]:
    """A group of this process alone."""
    group = TorchGroup.from_environment("cpu", timeout_s=60)
    yield group
    group.close()
