"""The bank keeps its experts as they are put, and converts those that it lends in another format."""

import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.formats import FORMATS
from rq_ep.moe import ExpertBank
from rq_ep.moe.integrity import DamagedExpert
from tests.moe import cases

FAMILY = cases.FAMILIES["transposed"]
LAYOUT = FAMILY.layout


def test_put_and_put_packed_store_the_same_bytes() -> None:
    weights = cases.expert_weights(FAMILY, 4)
    layer = cases.round_robin("int8", 2, 4)
    bank, copy = (ExpertBank(LAYOUT, layer.replicas, 1) for _ in range(2))
    assert bank.experts == (1, 3)
    for expert in bank.experts:
        bank.put(expert, weights[expert])
        copy.put_packed(expert, FORMATS["int8"].pack(weights[expert], LAYOUT))
        assert torch.equal(bank.packed(expert), copy.packed(expert))
    assert bank.nbytes == 2 * FORMATS["int8"].nbytes(LAYOUT)


def test_damaged_or_foreign_bytes_are_refused() -> None:
    bank = ExpertBank(LAYOUT, cases.round_robin("int8", 2, 4).replicas, 0)
    packed = FORMATS["int8"].pack(cases.expert_weights(FAMILY, 1)[0], LAYOUT)
    packed[3] ^= 1
    with pytest.raises(UserError, match="packed expert 2 does not match its checksum"):
        bank.put_packed(2, packed)
    with pytest.raises(UserError, match=r"packed expert 2 is torch.uint8 \[10\]"):
        bank.put_packed(2, packed[:10])


def test_an_expert_travels_in_fewer_bits_and_is_packed_once() -> None:
    weights = cases.expert_weights(FAMILY, 6)
    bank = ExpertBank(LAYOUT, cases.round_robin("bf16", 1, 6).replicas, 0)
    for expert in bank.experts:
        bank.put(expert, weights[expert])
    rounded = {name: weight.bfloat16() for name, weight in weights[3].items()}
    packed = bank.packed_as(3, "int8")
    assert torch.equal(packed, FORMATS["int8"].pack(rounded, LAYOUT))
    assert bank.packed_as(3, "int8") is packed
    assert bank.packed_as(3, "bf16").data_ptr() == bank.packed(3).data_ptr()
    for expert in range(3):
        bank.packed_as(expert, "int8")
    assert bank.packed_as(3, "int8") is packed, "four are kept"
    for expert in (0, 1, 2, 4):
        bank.packed_as(expert, "int8")
    assert bank.packed_as(3, "int8") is not packed, "the one used longest ago goes first"
    bank.put(3, weights[4])
    assert torch.equal(bank.packed_as(3, "int8"), bank.packed_as(4, "int8"))
    bank.packed(5)[0] ^= 1
    with pytest.raises(DamagedExpert, match="expert 5 of layer 0 on rank 0 is damaged"):
        bank.packed_as(5, "int8")
