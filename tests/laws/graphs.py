"""What the laws share about compiled code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode


def counted(flops: list[int]) -> Callable[..., object]:
    """A backend that counts the work of the graphs that it runs."""

    def compiler(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        def run(*arguments: Tensor) -> object:
            with FlopCounterMode(display=False) as counter:
                output = torch.fx.Interpreter(graph).run(*arguments)  # torch 2.6 counts no module called here
            flops[0] += counter.get_total_flops()
            return output

        return make_boxed_func(run)

    # The default backend's way to part forward and backward: what is cheap is computed again.
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)


def of_all(graphs: int, blocks: int) -> int:
    """How many graphs there may be of blocks that are alike, if one block has so many of them.

    They share them with torch 2.11. Torch 2.6 to 2.9 compares hooks by identity, so that each block has its own.
    """
    return graphs if torch.__version__ >= (2, 11) else graphs * blocks


def none_was_left_to_python() -> bool:
    """Did torch make all the graphs that it was asked for? Past its limit it runs Python, in silence."""
    return not counters["graph_break"] and "unimplemented" not in counters
