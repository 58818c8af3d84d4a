"""Which backend is chosen, from what is there."""

import pytest

from rq_ep.core.errors import UserError
from rq_ep.parallel.group import choose_transport


@pytest.mark.parametrize(
    ("wanted", "gpus", "device_type", "backend"),
    [
        ("auto", ["a 0", "a 1"], "cuda", "nccl"),
        ("auto", ["a 0"], "cuda", "nccl"),
        ("auto", ["a 0", "a 0"], "cpu", "gloo"),
        ("auto", ["a 0", None], "cpu", "gloo"),
        ("auto", [None, None], "cpu", "gloo"),
        ("cuda", ["a 0", "b 0"], "cuda", "nccl"),
        ("cuda", ["a 0", "a 0"], "cuda", "gloo"),
        ("cpu", ["a 0", "a 1"], "cpu", "gloo"),
    ],
)
def test_choice_of_backend(wanted: str, gpus: list[str | None], device_type: str, backend: str) -> None:
    transport = choose_transport(wanted, gpus)
    assert (transport.device_type, transport.backend) == (device_type, backend)
    assert transport.reason


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="--device cuda: rank 1 has no CUDA device"):
        choose_transport("cuda", ["a 0", None])
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        choose_transport("cudo", [None])
