"""Several processes that train one model: which one this is, and what all of them must agree on.

In row mode every rank masks its own rows, so a branch may have a learning row on one rank and none on another. Its
parameters must move on both or on neither. Nor may one rank be in DROP while another is in FREEZE. Once a step the
ranks therefore combine a few bytes on the CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rdp.errors import ArgumentError, RankError

_WORD = 4
"""Bytes of a fact."""

_ROOM = 1024
"""Liveness flags are padded to multiples of this, so that a rank that knows no branches sends as many as the others."""


class Ranks:
    """The processes whose gradients are averaged.

    Args:
        process_group: These processes; None stands for all, or for this one alone outside of `torch.distributed`.

    Raises:
        ArgumentError: If it is no process group, or this process is not in it.
    """

    def __init__(self, process_group: Any = None) -> None:
        if process_group is not None:
            if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:  # as new_group returns it
                raise ArgumentError("process_group must contain this process; it is of others")
            if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
                kind = type(process_group).__name__
                raise ArgumentError(f"process_group must be a torch.distributed.ProcessGroup or None; got {kind}")
            if dist.get_rank(process_group) < 0:
                raise ArgumentError("process_group must contain this process; it is of others")
        self.process_group = process_group
        self._cpu_group: Any = None

    @property
    def rank(self) -> int:
        """The number of this process."""
        return dist.get_rank(self.process_group) if self._initialized else 0

    @property
    def size(self) -> int:
        """The number of processes."""
        return dist.get_world_size(self.process_group) if self._initialized else 1

    @property
    def _initialized(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    def ask(self, live: Tensor | None, facts: Mapping[str, object]) -> Question:
        """Begin to combine `live` with that of the other ranks, each of which must call this as well.

        Args:
            live: Bool `Tensor[branches]`: the branches that have a learning row on this rank. None, from a rank that
                has run out of data, adds nothing.
            facts: What must be the same on all ranks, by name.
        """
        branches = 0 if live is None else live.numel()
        words = [b"\0" * 2 * _WORD if live is None else _with_complement(fact) for fact in facts.values()]
        head = torch.tensor(list(b"".join(words)), dtype=torch.uint8, device="cpu")
        flags = torch.zeros(max(-(-branches // _ROOM), 1) * _ROOM, dtype=torch.uint8, device="cpu")
        if live is not None:
            flags[:branches] = live
        sent = torch.cat((head, flags))
        work = dist.all_reduce(sent, dist.ReduceOp.BOR, group=self._group(), async_op=True)
        return Question(tuple(facts), branches, sent, work)

    def connect(self) -> None:
        """Get ready to ask; where that could otherwise come too late, all ranks must call this together."""
        if self.size > 1:
            self._group()

    def highest(self, number: int) -> int:
        """The largest of the numbers that the ranks call this with."""
        numbers = torch.tensor([number], device="cpu")
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group())
        return int(numbers)

    def leave(self) -> None:
        """Give back what `ask` has made."""
        group, self._cpu_group = self._cpu_group, None
        if group is not None and self._initialized:
            dist.destroy_process_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return {"process_group": None, "_cpu_group": None}  # a copy is not part of this run

    def _group(self) -> Any:
        # A group of its own on the CPU: no device has to be waited for, and no collective of others mixed with it.
        if self._cpu_group is None:
            group = self.process_group or dist.group.WORLD
            ranks = dist.get_process_group_ranks(group)
            everyone = len(ranks) == dist.get_world_size()
            self._cpu_group = dist.new_group(
                ranks, _timeout(group), backend="gloo", use_local_synchronization=not everyone
            )
        return self._cpu_group


def _timeout(group: Any) -> timedelta | None:
    """How long the collectives of a group wait; None if it does not say."""
    try:
        timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None
    return timeout


def _with_complement(fact: object) -> bytes:
    word = zlib.crc32(repr(fact).encode())
    return word.to_bytes(_WORD, "little") + (word ^ 0xFFFFFFFF).to_bytes(_WORD, "little")


class Question:
    """What the ranks are about to agree on."""

    def __init__(self, names: tuple[str, ...], branches: int, sent: Tensor, work: Any) -> None:
        self._names = names
        self._branches = branches
        self._sent = sent
        self._work = work

    def answer(self) -> Tensor:
        """Wait for the other ranks; bool `Tensor[branches]`: the branches that have a learning row on any rank.

        Raises:
            RankError: If a fact is not the same on all ranks, or another rank does not answer.
        """
        try:
            self._work.wait()
        except RuntimeError as error:
            raise RankError(
                "the other ranks did not step with this one. Every rank must step its optimizer as often as the "
                "others. With uneven inputs train under Join([model, handle]). Ranks that train models of their own "
                "need rdp.attach(..., process_group=) with a group of each one alone"
            ) from error
        end = 2 * _WORD * len(self._names)
        head = self._sent[:end].view(-1, 2, _WORD)
        # Every rank has sent each bit or its complement, so where two of them differ both are set.
        unequal = [name for name, (bits, others) in zip(self._names, head, strict=True) if bool((bits & others).any())]
        if unequal:
            raise RankError(
                f"the ranks disagree on {', '.join(unequal)}. All must attach with the same arguments, load the same "
                "state and step together; ranks that train models of their own need rdp.attach(..., process_group=) "
                "with a group of each one alone"
            )
        return self._sent[end : end + self._branches].bool()


def check_sharding(model: nn.Module, ranks: Ranks) -> None:
    """Refuse to guess which ranks share their rows where parameters are split by other means than FSDP.

    Raises:
        RankError: If so, and `process_group` was not given.
    """
    if ranks.process_group is not None or ranks.size == 1:
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    by_fsdp = [f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, FSDPModule)]
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            shards = sum(not placement.is_replicate() for placement in parameter.placements)
            if shards > 1 or not any(name.startswith(prefix) for prefix in by_fsdp):
                raise RankError(
                    f"`{name}` is split between ranks by tensor parallelism, so some ranks work on the same rows and "
                    "must mask them alike. Pass process_group=, the data parallel group of this rank (with a device "
                    'mesh: mesh["dp"].get_group()), or a group of this rank alone if there is none'
                )
