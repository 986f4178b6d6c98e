from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.schedule import learning_rate
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler


@given(
    steps=st.integers(2, 400), share=st.floats(0, 0.9), peak=st.floats(1e-4, 10, allow_subnormal=False), data=st.data()
)
def test_the_cosine_is_timms(steps: int, share: float, peak: float, data: st.DataObject) -> None:
    warmup = int(share * steps)
    step = data.draw(st.integers(0, steps - 1))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    timms = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=warmup, warmup_lr_init=1e-5, t_in_epochs=False, lr_min=0.0
    )
    timms.step_update(step)
    ours = learning_rate(step, steps, peak=peak, warmup=warmup)
    assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)


@given(steps=st.integers(2, 400), share=st.floats(0, 0.9), peak=st.floats(1e-3, 10), data=st.data())
def test_the_line_interpolates_as_ffcv_imagenet_does(
    steps: int, share: float, peak: float, data: st.DataObject
) -> None:
    warmup = int(share * steps)
    step = data.draw(st.integers(0, steps))
    expected = (
        np.interp(step, [0, warmup, steps], [1e-5, peak, 0]) if warmup else np.interp(step, [0, steps], [peak, 0])
    )
    assert learning_rate(step, steps, peak=peak, warmup=warmup, shape="linear") == pytest.approx(expected, abs=1e-12)
