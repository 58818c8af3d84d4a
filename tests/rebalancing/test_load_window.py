"""The window holds the last steps, as many of each kind as their pairs ask for, in bounded memory."""

import numpy as np

from rq_ep.rebalancing.load_window import MAX_KEPT, LoadWindow


def load(pairs: int) -> np.ndarray:
    return np.full((1, 2), pairs // 2, np.int64)


def test_all_steps_of_a_short_window_are_kept_in_their_order() -> None:
    window = LoadWindow(64)
    for step in range(100):
        window.observe(load(2 * step), phase=step % 2)
    loads = window.loads()
    assert loads.counts_SLE[:, 0, 0].tolist() == list(range(36, 100))
    assert loads.phase_S.tolist() == [0, 1] * 32


def test_parts_of_steps_make_a_window_longer() -> None:
    window = LoadWindow(4)
    for step in range(100):
        window.observe(load(2 * step), phase=0, part=0.25)
    assert window.loads().counts_SLE[:, 0, 0].tolist() == list(range(84, 100))


def test_an_empty_window_has_no_steps() -> None:
    assert len(LoadWindow(64).loads().phase_S) == 0


def test_a_long_window_is_sampled_evenly_and_stays_small() -> None:
    window = LoadWindow(4096)
    for step in range(20000):
        window.observe(np.array([[step, 20000 - step]]), phase=1)
    steps = window.loads().counts_SLE[:, 0, 0]
    assert MAX_KEPT // 2 - 1 <= len(steps) <= MAX_KEPT
    assert steps[0] > 20000 - 4096
    distances = np.diff(steps)
    assert distances.max() <= 4 * distances.min()


def test_long_steps_are_kept_among_many_short_ones() -> None:
    window = LoadWindow(2048)
    generator = np.random.default_rng(0)
    for _ in range(6000):
        is_prefill = generator.random() < 0.02
        window.observe(load(4096 if is_prefill else 16), phase=0 if is_prefill else 1)
    loads = window.loads()
    assert (loads.phase_S == 0).sum() >= 30
    assert MAX_KEPT // 2 - 1 <= (loads.phase_S == 1).sum() <= MAX_KEPT


def test_it_follows_traffic_that_becomes_thinner() -> None:
    window = LoadWindow(512)
    for _ in range(2000):
        window.observe(load(2000), phase=0)
    for _ in range(3000):
        window.observe(load(2), phase=0)
    assert len(window.loads().phase_S) >= MAX_KEPT // 4
