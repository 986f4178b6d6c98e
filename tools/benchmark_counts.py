"""What a training step takes beside time: FLOPs, also those of compiled graphs, and the peak of what autograd keeps."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode


class SavedBytes:
    """The peak of what autograd keeps for the backward, parameters aside; used as a pair of saved-tensor hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> tuple[Tensor, object]:
        """Count a tensor until autograd lets go of it; what several operations keep counts once."""
        storage, ticket = tensor.untyped_storage(), _Ticket()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.weights:
            self.now += size if not self.holders[key] else 0
            self.holders[key] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(ticket, self._release, key, size)
        return tensor.detach(), ticket  # an output that is kept by its own node would keep that node alive

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= size if not self.holders[key] else 0


class _Ticket:
    """Lives as long as a saved tensor."""


def count_flops(step: Callable[[], None]) -> int:
    """FLOPs of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    flops: int = counter.get_total_flops()
    return flops


def count_peak(model: nn.Module, step: Callable[[], None]) -> int:
    """The peak of what autograd saves for the backward of a step, in bytes; to count FLOPs too keeps more alive."""
    saved = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda pair: pair[0]):
        step()
    return saved.peak


class CountingBackend:
    """For `torch.compile`: it counts the FLOPs of graphs that are parted as those of the default backend are."""

    def __init__(self) -> None:
        self.flops = 0
        self._backend = aot_autograd(
            fw_compiler=self._compile, bw_compiler=self._compile, partition_fn=min_cut_rematerialization_partition
        )

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        """A graph that counts."""
        compiled: Callable[..., object] = self._backend(graph, inputs)
        return compiled

    def _compile(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        def run(*arguments: Tensor) -> object:
            with FlopCounterMode(display=False) as counter:
                output = graph(*arguments)
            self.flops += counter.get_total_flops()
            return output

        boxed: Callable[..., object] = make_boxed_func(run)
        return boxed
