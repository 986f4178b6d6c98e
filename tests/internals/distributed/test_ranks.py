"""What ranks send and are answered, and which of them share their rows."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import rdp
from internals.distributed.wire import Wire, lives
from rdp.distributed.ranks import Ranks, check_sharding

FACTS = {"the step": 3, "the seed": 0}


# -- which process this is --------------------------------------------------------------------------------------------


def test_a_process_alone():
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    ranks.connect()  # nobody is there
    ranks.leave()


@pytest.mark.usefixtures("world")
def test_a_process_among_others():
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (2, 4)
    ranks = Ranks(dist.new_group([1, 2, 3]))
    assert (ranks.rank, ranks.size) == (1, 3)


@pytest.mark.usefixtures("world")
def test_attach_passes_the_process_group_on():
    group = dist.new_group([1, 2])
    assert rdp.attach(nn.Linear(1, 1), process_group=group).join_process_group is group
    assert rdp.attach(nn.Linear(1, 1)).join_process_group is dist.group.WORLD


@pytest.mark.usefixtures("world")
def test_what_is_no_process_group_is_refused(monkeypatch):
    with pytest.raises(rdp.ArgumentError) as error:
        Ranks("everyone")
    assert str(error.value) == "process_group must be a torch.distributed.ProcessGroup or None; got str"
    with pytest.raises(rdp.ArgumentError) as error:
        Ranks(dist.new_group([0, 1]))  # which is a number where this process is not in it
    assert str(error.value) == "process_group must contain this process; it is of others"
    group = dist.new_group([2, 3])
    monkeypatch.setattr(dist, "get_rank", lambda asked: -1 if asked is group else 2)
    with pytest.raises(rdp.ArgumentError) as error:
        Ranks(group)
    assert str(error.value) == "process_group must contain this process; it is of others"


@pytest.mark.usefixtures("world")
def test_a_copy_belongs_to_no_run():
    ranks = Ranks(dist.new_group([2]))
    ranks._cpu_group = "gloo"
    assert vars(copy.deepcopy(ranks)) == {"process_group": None, "_cpu_group": None}


# -- the group on the CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "by_members"),
    [(None, False), ([0, 1, 2, 3], False), ([1, 2], True)],
)
def test_the_group_that_ranks_ask_in(members, by_members, wire):
    """All ranks make a group of all together; of others only its members know."""
    group = None if members is None else dist.distributed_c10d.new_group(members)
    ranks = Ranks(group)
    assert wire.groups == []
    ranks.connect()
    ranks.ask(lives(1), FACTS)
    ranks.highest(0)
    expected = {"ranks": members or [0, 1, 2, 3], "timeout": None, "backend": "gloo", "by members": by_members}
    assert wire.groups == [expected]
    ranks.leave()
    ranks.leave()
    assert wire.destroyed == ["group 1"]
    ranks.ask(lives(1), FACTS)
    assert len(wire.groups) == 2


def test_two_ranks_are_already_several(wire):
    ranks = Ranks(dist.distributed_c10d.new_group([2, 3]))
    ranks.connect()
    assert wire.groups[0]["ranks"] == [2, 3]


def test_they_ask_on_the_cpu_whatever_the_default_device(wire):
    wire.others = [7]
    with torch.device("meta"):
        question = Ranks().ask(torch.tensor([True], device="cpu"), FACTS)
        assert question.answer().tolist() == [True]
        assert Ranks().highest(5) == 7


def test_it_waits_as_long_as_the_group_it_is_made_from(monkeypatch):
    patience = datetime.timedelta(seconds=7)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
    wire = Wire()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dist, "new_group", wire.new_group)
            Ranks()._group()
    finally:
        dist.destroy_process_group()
    assert wire.groups[0]["timeout"] == patience


def test_leaving_after_the_end_of_everything(wire, monkeypatch):
    ranks = Ranks()
    ranks.connect()
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    ranks.leave()
    assert wire.destroyed == []


def test_a_real_group_of_one_process():
    """What the wire takes the place of takes the arguments that the wire takes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = Ranks()
        assert ranks.ask(lives(1, 0, 1), FACTS).answer().tolist() == [True, False, True]
        assert ranks.highest(5) == 5
        ranks.leave()
    finally:
        dist.destroy_process_group()


# -- questions and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [0, 1, 5, 1023, 1024, 1025, 2049])
def test_a_branch_is_live_if_it_is_so_on_any_rank(branches, wire):
    generator = torch.Generator().manual_seed(branches)
    said = torch.rand(3, branches, generator=generator) < 0.3
    ranks = Ranks()
    questions = [ranks.ask(live, FACTS) for live in said]
    for question in questions:
        answer = question.answer()
        assert answer.dtype == torch.bool
        assert torch.equal(answer, said.any(0))


@pytest.mark.parametrize("branches", [1, 1024])
def test_a_rank_without_data_adds_nothing(branches, wire):
    """It sends as many bytes, and whatever its facts are, nobody disagrees."""
    ranks, live = Ranks(), torch.arange(branches) % 3 == 0
    nothing, question = ranks.ask(None, {"the step": 8, "the seed": 9}), ranks.ask(live, FACTS)
    assert nothing.answer().tolist() == []
    assert torch.equal(question.answer(), live)


@given(
    mine=st.lists(st.integers(0, 2), min_size=3, max_size=3), others=st.lists(st.integers(0, 2), min_size=3, max_size=3)
)
def test_facts_that_differ_are_named(mine, others):
    names = ("the step", "the seed", "the rates")
    wire, ranks = Wire(), Ranks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", wire.all_reduce)
        patch.setattr(Ranks, "_group", lambda self: wire.new_group([], None, "", False))
        questions = [ranks.ask(lives(1, 0), dict(zip(names, facts, strict=True))) for facts in (mine, others)]
    unequal = [name for name, a, b in zip(names, mine, others, strict=True) if a != b]
    for question in questions:
        if not unequal:
            assert question.answer().tolist() == [True, False]
            continue
        with pytest.raises(rdp.RankError) as error:
            question.answer()
        assert str(error.value) == (
            f"the ranks disagree on {', '.join(unequal)}. All must attach with the same arguments, load the same state "
            "and step together; ranks that train models of their own need rdp.attach(..., process_group=) with a group "
            "of each one alone"
        )


def test_each_fact_is_sent_with_its_complement(wire):
    """So that where two differ, in whatever bit, some bit of both is set."""
    Ranks().ask(lives(), {"a": 1, "b": ("x", 2.5)})
    first, second = wire.sent[0][:16].view(2, 2, 4)
    for word, complement in (first, second):
        assert torch.equal(word ^ 0xFF, complement)
    assert not torch.equal(first, second)


def test_ranks_that_do_not_answer(wire, monkeypatch):
    question = Ranks().ask(lives(1), FACTS)
    timeout = RuntimeError("timed out")

    def fail() -> None:
        raise timeout

    monkeypatch.setattr(wire, "wait", fail)
    with pytest.raises(rdp.RankError) as error:
        question.answer()
    assert error.value.__cause__ is timeout
    assert str(error.value) == (
        "the other ranks did not step with this one. Every rank must step its optimizer as often as the others. With "
        "uneven inputs train under Join([model, handle]). Ranks that train models of their own need rdp.attach(..., "
        "process_group=) with a group of each one alone"
    )


@pytest.mark.parametrize(("others", "highest"), [([1, 9, 4], 9), ([1, 2], 5), ([], 5)])
def test_the_highest_number(others, highest, wire):
    wire.others = others
    found = Ranks().highest(5)
    assert type(found) is int
    assert found == highest


# -- parameters that are split ----------------------------------------------------------------------------------------


def split(placements: list[Any], shape: tuple[int, ...] = (4,)) -> nn.Module:
    """Two layers; the second one's weight is a DTensor."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", shape)
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, placements))
    return model


@pytest.mark.usefixtures("world")
def test_ranks_that_share_rows_must_be_told():
    with pytest.raises(rdp.RankError) as error:
        check_sharding(split([Shard(0)]), Ranks())
    assert str(error.value) == (
        "`1.weight` is split between ranks by tensor parallelism, so some ranks work on the same rows and must mask "
        "them alike. Pass process_group=, the data parallel group of this rank (with a device mesh: "
        'mesh["dp"].get_group()), or a group of this rank alone if there is none'
    )
    check_sharding(split([Shard(0)]), Ranks(dist.new_group([0, 2])))


@pytest.mark.usefixtures("world")
def test_fsdp_shares_no_rows():
    fsdp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fully_shard(fsdp[2])
    assert isinstance(fsdp[2].weight, DTensor)
    check_sharding(fsdp, Ranks())
    fully_shard(fsdp)
    assert isinstance(fsdp[0].weight, DTensor)
    check_sharding(fsdp, Ranks())


@pytest.mark.usefixtures("world")
def test_fsdp_over_tensor_parallelism():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parallelize_module(model, mesh["tp"], {"1": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(rdp.RankError, match=r"`1.weight`"):
        check_sharding(model, Ranks())


@pytest.mark.usefixtures("world")
def test_a_name_that_only_begins_like_that_of_an_fsdp_module():
    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})
    fully_shard(model["fc"])
    model["fc2"].weight = nn.Parameter(
        distribute_tensor(model["fc2"].weight.detach(), init_device_mesh("cpu", (4,)), [Shard(0)])
    )
    with pytest.raises(rdp.RankError, match=r"`fc2.weight`"):
        check_sharding(model, Ranks())


def test_alone_nothing_is_shared(monkeypatch):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        check_sharding(split([Shard(0)], (1,)), Ranks())
    finally:
        dist.destroy_process_group()
