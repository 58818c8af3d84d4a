"""The sort for compiled code: NumPy's stable one, descending."""

import numpy as np
import pytest

from rq_ep.solver.split.heaviest_first import RUN, heaviest_first


@pytest.mark.parametrize("num", [0, 1, 2, RUN - 1, RUN, RUN + 1, 2 * RUN, 2 * RUN + 1, 3 * RUN, 5 * RUN + 3])
def test_the_largest_come_first_and_equal_ones_stay_in_their_order(num: int) -> None:
    generator = np.random.default_rng(num)
    for loads_X in (generator.random(num), generator.integers(0, num // 2 + 1, num), np.zeros(num)):
        np.testing.assert_array_equal(heaviest_first(loads_X), np.argsort(-loads_X, kind="stable"))
