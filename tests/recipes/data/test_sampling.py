"""Every sample comes as often as it should, on whatever number of ranks."""

import numpy as np
import pytest
from data import DataError
from data.sampling import Sampler, subset
from hypothesis import assume, given
from hypothesis import strategies as st

sizes = {
    "samples": st.integers(4, 300),
    "batch_size": st.integers(2, 40),
    "world_size": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
    "epoch": st.integers(0, 1000),
}


def ranks(samples, world_size, **kwargs):
    return [Sampler(np.arange(samples), rank=rank, world_size=world_size, **kwargs) for rank in range(world_size)]


@given(**sizes)
def test_training_has_every_sample_once_but_for_fewer_than_ranks(samples, batch_size, world_size, seed, epoch):
    samplers = ranks(samples, world_size, batch_size=batch_size, train=True, seed=seed)
    epochs = [sampler.batches(epoch) for sampler in samplers]
    seen = np.concatenate([batch for batches in epochs for batch in batches])
    assert len(seen) == len(set(seen)) == samples - samples % world_size
    assert set(seen) <= set(range(samples))


@given(**sizes)
def test_training_ranks_have_equal_batches(samples, batch_size, world_size, seed, epoch):
    samplers = ranks(samples, world_size, batch_size=batch_size, train=True, seed=seed)
    lengths = [[len(batch) for batch in sampler.batches(epoch)] for sampler in samplers]
    assert all(length == lengths[0] for length in lengths)
    assert len(lengths[0]) == len(samplers[0])
    assert all(length == batch_size for length in lengths[0][:-1])
    assert 1 <= lengths[0][-1] <= batch_size


@given(**sizes)
def test_full_batches_of_all_ranks_are_those_of_one_rank(samples, batch_size, world_size, seed, epoch):
    assume(samples >= batch_size * world_size)
    one = Sampler(np.arange(samples), batch_size * world_size, train=True, drop_last=True, seed=seed).batches(epoch)
    many = [
        sampler.batches(epoch)
        for sampler in ranks(samples, world_size, batch_size=batch_size, train=True, drop_last=True, seed=seed)
    ]
    together = [np.concatenate(batches) for batches in zip(*many, strict=True)]
    assert [batch.tolist() for batch in together] == [batch.tolist() for batch in one]


@given(**sizes)
def test_drop_last_leaves_out_the_partial_batch_alone(samples, batch_size, world_size, seed, epoch):
    assume(samples >= batch_size * world_size)
    for sampler in ranks(samples, world_size, batch_size=batch_size, train=True, drop_last=True, seed=seed):
        batches = sampler.batches(epoch)
        assert len(batches) == len(sampler) == samples // world_size // batch_size
        assert all(len(batch) == batch_size for batch in batches)


@given(**sizes)
def test_evaluation_has_every_sample_exactly_once_in_order(samples, batch_size, world_size, seed, epoch):
    samplers = ranks(samples, world_size, batch_size=batch_size, train=False, seed=seed)
    epochs = [sampler.batches(epoch) for sampler in samplers]
    assert {len(batches) for batches in epochs} == {len(samplers[0])}
    in_turns = [batch for batches in zip(*epochs, strict=True) for batch in batches]
    assert np.concatenate(in_turns).tolist() == list(range(samples))
    lengths = [len(batch) for batch in in_turns]
    assert min(lengths) >= 1
    assert max(lengths) <= min(batch_size, min(lengths) + 1)


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch, batch_size=7):
        return np.concatenate(Sampler(np.arange(100), batch_size, train=True, seed=seed).batches(epoch)).tolist()

    assert order(0, 0) == order(0, 0) == order(0, 0, batch_size=13)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_subset_is_fixed_and_sorted():
    indices = subset(1000, 100)
    assert len(set(indices.tolist())) == 100
    assert (np.diff(indices) > 0).all()
    assert indices.tolist() == subset(1000, 100).tolist()
    assert subset(5, None).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("limit", [0, -1, 11])
def test_subset_refuses_a_limit_outside_of_the_split(limit):
    with pytest.raises(DataError, match=rf"from 1 to the 10 samples that there are, not {limit}"):
        subset(10, limit)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, not 0"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be from 0 to world_size - 1 = 1, not 2"),
        ({"batch_size": 1, "world_size": 2, "train": False}, ValueError, "needs a batch_size of at least 2"),
        ({"drop_last": True, "world_size": 3}, DataError, "10 samples do not fill a batch of 4 on each of 3 processes"),
        ({"world_size": 11}, DataError, "10 samples are too few for 11 processes"),
    ],
)
def test_sampler_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Sampler(np.arange(10), **({"batch_size": 4, "train": True} | arguments))
