from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import checkpoint
from engine.rng import get_rng_state, seed_all, set_rng_state


def draw() -> tuple[float, ...]:
    return float(torch.rand(())), random.random(), float(np.random.rand()), random.gauss(0, 1), np.random.randn()


def test_every_stream_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    draw()
    checkpoint.save(tmp_path, {"rng": get_rng_state()}, 0, 0)
    expected = [draw() for _ in range(3)]
    seed_all(5)
    assert [draw() for _ in range(3)] != expected
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    set_rng_state(loaded["rng"])
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("seed", [3, 2**32 - 1, 2**40])  # seed x processes + rank can be large
def test_a_seed_decides_every_stream(seed: int) -> None:
    seed_all(seed)
    first = draw()
    seed_all(seed)
    assert draw() == first
    seed_all(seed + 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
