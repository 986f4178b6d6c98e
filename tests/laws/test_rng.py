"""Law 7: a hooked run leaves every global random generator exactly as a plain run does."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws.strategies import batch_sizes, cases, every_architecture
from laws.training import identical, loss


@every_architecture(steps=[[4], [5, 3]], at_attach=False)
@given(cases(), st.lists(batch_sizes(5, 2), min_size=1, max_size=3), st.booleans())
def test_the_global_generators_end_where_a_plain_run_leaves_them(case, steps, at_attach):
    model = case.model()
    ends = []
    for attached in (False, True):
        torch.manual_seed(case.seed)
        random.seed(case.seed)
        np.random.seed(case.seed)
        net = case.model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        if attached:
            handle = case.attach(net, example_inputs=net.rows(2, 0) if at_attach else None)
            optimizer = handle.wrap(optimizer)
        states = []
        for step, sizes in enumerate(steps):
            for k, size in enumerate(sizes):
                output = net(model.rows(size, 10 * step + k))
                states.append(torch.get_rng_state())
                loss(output).backward()
                states.append(torch.get_rng_state())
            optimizer.step()
            optimizer.zero_grad()
        numpy_state = np.random.get_state()
        ends.append((states, torch.get_rng_state(), random.getstate(), [str(part) for part in numpy_state]))
    assert identical(*ends)
