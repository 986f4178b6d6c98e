"""Law 6: saving and resuming in any phase, and between micro-batches, continues bit-exactly."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.strategies import Case, cases
from laws.training import identical, loss, seed, snapshot


class Run:
    """A training loop that can stop after any micro-batch."""

    def __init__(self, case: Case, at_attach: bool) -> None:
        self.model = case.model()
        self.handle = case.attach(self.model, example_inputs=self.model.rows(2, 0) if at_attach else None)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.1, weight_decay=0.1)
        self.optimizer = self.handle.wrap(self.inner)
        self.trail: list[Any] = []

    def micro_batches(self, begin: int, end: int, size: int, accumulate: int) -> None:
        for i in range(begin, end):
            output = self.model(self.model.rows(size + i % 3, i))
            loss(output).backward()
            self.trail.append((i, self.handle.phase, output.detach().clone(), self.handle.masks.clone()))
            if (i + 1) % accumulate == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rdp": self.handle.state_dict(),
            "rng": torch.get_rng_state(),
            "gradients": [p.grad for p in self.model.parameters()],
        }
        torch.save(state, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["rdp"])
        torch.set_rng_state(state["rng"])
        for p, gradient in zip(self.model.parameters(), state["gradients"], strict=True):
            p.grad = gradient

    def end(self) -> tuple:
        return snapshot(self.model, self.inner), dict(self.model.named_buffers()), torch.get_rng_state()


@given(
    cases(),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
)
def test_resuming_after_any_micro_batch_is_bit_exact(case, size, accumulate, stop, at_attach, resumed_at_attach):
    total = 10
    seed(case.seed)
    whole = Run(case, at_attach)
    whole.micro_batches(0, total, size, accumulate)
    expected = whole.end()

    seed(case.seed)
    first = Run(case, at_attach)
    first.micro_batches(0, stop, size, accumulate)
    file = first.save()
    seed(999)
    second = Run(case, resumed_at_attach)
    second.load(file)
    assert (second.handle.phase, second.handle.step_count) == (first.handle.phase, first.handle.step_count)
    second.micro_batches(stop, total, size, accumulate)

    for (i, phase, output, masks), (j, *rest) in zip(whole.trail, first.trail + second.trail, strict=True):
        assert i == j
        assert phase is rest[0]
        assert torch.equal(masks, rest[2])
        assert identical(output, rest[1])
    assert identical(second.end(), expected)


@given(cases(), st.integers(0, 5), st.booleans())
def test_a_state_dict_round_trips(case, steps, midway):
    run = Run(case, True)
    run.micro_batches(0, 2 * steps + midway, 2, 2)
    state = run.handle.state_dict()
    other = Run(case, True)
    other.handle.load_state_dict(state)
    assert identical(other.handle.state_dict(), state)
