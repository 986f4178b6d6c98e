"""What hypothesis draws: an architecture, the arguments of `rdp.attach`, and the batches of a training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import example
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import rdp
from laws import architectures as arch
from laws.oracle import branch_rates, branches_of_parameters, live_parameters, oracle_forward
from laws.training import seed


@dataclass(frozen=True)
class Case:
    """One generated model and how RDP is attached to it."""

    architecture: type[arch.Architecture]
    arguments: tuple[Any, ...]
    rate: float = 0.5
    mode: str = "row"
    decay: str = "linear"
    sampling: str = "bernoulli"
    freeze: str = "output"
    scale_by_keep: bool = False
    compute: str = "auto"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def model(self) -> arch.Architecture:
        with torch.random.fork_rng(devices=[]):
            seed(self.seed)
            return self.architecture(*self.arguments).to(self.dtype).train()

    def attach(self, model: torch.nn.Module, **changes: Any) -> rdp.ResidualDropPath:
        """Without the proof, which is half of what it takes: `test_proof.py` has that it changes nothing here."""
        names = ("rate", "mode", "decay", "sampling", "freeze", "scale_by_keep", "compute", "seed")
        return rdp.attach(model, **({name: getattr(self, name) for name in names} | {"verify": False} | changes))

    @functools.cached_property
    def rates(self) -> list[float]:
        return branch_rates(self.model().blocks, self.rate, self.decay)

    def oracle(self, model: arch.Architecture, x: Tensor, masks: Tensor, phase: rdp.Phase) -> Tensor:
        return oracle_forward(model, x, masks, phase.name, self.rates, self.freeze, self.scale_by_keep)

    @functools.cached_property
    def used(self) -> dict[str, set[int]]:
        """The branches each parameter is used in, found on a model of its own."""
        model = self.model().eval()
        return branches_of_parameters(model, model.rows(2, 0))

    def live(self, masks: Tensor, phase: rdp.Phase) -> set[str]:
        return live_parameters(self.used, masks, phase.name, self.rates)


def architectures(dropout: bool = True, batch_norm: bool = True) -> SearchStrategy[tuple[type, tuple[Any, ...]]]:
    """An architecture and its arguments.

    Args:
        dropout: include those that consume random numbers in their branches.
        batch_norm: include those whose branches couple the rows of a batch.
    """
    depth = st.integers(1, 3)
    kinds = [kind for kind in arch.MLP_BLOCKS if dropout or kind != "dropout"]
    drop = st.sampled_from([0.0, 0.25]) if dropout else st.just(0.0)
    options = [
        st.tuples(st.just(arch.LoopMLP), st.tuples(depth)),
        st.tuples(
            st.just(arch.BlockMLP),
            st.tuples(st.lists(st.sampled_from(kinds), min_size=1, max_size=4).map(tuple)),
        ),
        st.tuples(st.just(arch.FoldedMLP), st.tuples(depth)),
        st.tuples(st.just(arch.SharedMLP), st.tuples(depth, st.integers(1, 2))),
        st.tuples(st.just(arch.Transformer), st.tuples(st.sampled_from(list(arch.TRANSFORMER_BLOCKS)), depth)),
        st.tuples(st.just(arch.TorchTransformer), st.tuples(st.integers(1, 2), st.booleans(), st.booleans(), drop)),
        st.tuples(st.just(arch.NestedMLP), st.tuples(st.lists(st.booleans(), min_size=1, max_size=3).map(tuple))),
    ]
    if batch_norm:
        strides = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3).filter(lambda s: sum(s) <= len(s) + 1)
        block = st.sampled_from(list(arch.CONV_BLOCKS))
        options.append(st.tuples(st.just(arch.ConvNet), st.tuples(block, strides.map(tuple))))
    return st.one_of(options)


@st.composite
def cases(
    draw: st.DrawFn,
    rates: SearchStrategy[float] | None = None,
    dropout: bool = True,
    batch_norm: bool = True,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    computes: tuple[str, ...] = ("auto", "dense"),
    freezes: tuple[str, ...] = ("output", "params"),
    scales: tuple[bool, ...] = (False, True),
) -> Case:
    """A case; every argument narrows what is drawn."""
    architecture, arguments = draw(architectures(dropout, batch_norm))
    mode = draw(st.sampled_from(["row", "batch"]))
    case = Case(
        architecture,
        arguments,
        rate=draw(rates if rates is not None else st.sampled_from([0.1, 0.3, 0.5, 0.8])),
        mode=mode,
        decay=draw(st.sampled_from(["linear", "constant"])),
        sampling=draw(st.sampled_from(["bernoulli", "fixed"])) if mode == "row" else "bernoulli",
        freeze=draw(st.sampled_from(freezes)) if mode == "batch" else "output",
        scale_by_keep=draw(st.sampled_from(scales)),
        compute=draw(st.sampled_from(computes)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )
    if architecture is arch.BlockMLP and {"activated", "layer_scale"} & set(arguments[0]):
        case = replace(case, scale_by_keep=False)  # gelu(f(x) / keep) is not gelu(f(x)) / keep: the library refuses
    return case


def batch_sizes(most_rows: int = 6, most_micro_batches: int = 3) -> SearchStrategy[list[int]]:
    """The rows of each micro-batch of one optimizer step."""
    return st.lists(st.integers(1, most_rows), min_size=1, max_size=most_micro_batches)


def every_architecture(dropout: bool = True, compute: str = "auto", **others: Any) -> Callable[[Any], Any]:
    """`@example` of each architecture in each mode, which random generation could miss.

    Args:
        dropout: include those that consume random numbers in their branches.
        compute: of the cases.
        others: the test's other arguments.
    """
    chosen = [
        (arch.LoopMLP, (3,)),
        *((arch.BlockMLP, ((kind, kind),)) for kind in arch.MLP_BLOCKS if dropout or kind != "dropout"),
        (arch.FoldedMLP, (2,)),
        (arch.SharedMLP, (2, 2)),
        *((arch.ConvNet, (kind, (1, 2))) for kind in arch.CONV_BLOCKS),
        *((arch.Transformer, (kind, 2)) for kind in arch.TRANSFORMER_BLOCKS),
        (arch.TorchTransformer, (1, True, True, 0.25 if dropout else 0.0)),
        (arch.TorchTransformer, (1, False, False, 0.0)),
        (arch.NestedMLP, ((True, False),)),
    ]

    def decorate(test: Any) -> Any:
        for architecture, arguments in chosen:
            for mode in ("row", "batch"):
                case = Case(architecture, arguments, mode=mode, decay="constant", compute=compute, seed=1)
                test = example(case=case, **others)(test)
        return test

    return decorate
