"""The first cycle of training, at which is looked more closely than at those after it.

What its forwards show is kept for the report of `rdp/check.py`: structure alone, no numbers, so nothing waits for a
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.autograd.graph import Node

from rdp import trees
from rdp.phases import Phase

if TYPE_CHECKING:
    from rdp.training.run import Run
    from rdp.training.step import Forward

Form = tuple[object, ...]
_ZEROS = "rdp.zeros"


class FirstCycle:
    """What the forwards of the first whole cycle have shown.

    Attributes:
        over: Has it ended?
        examine: Called when it has; was there something to tell?
        around: Names of parameters that an output depended on though they were frozen, with the number of the step.
    """

    def __init__(self) -> None:
        self.over = False
        self.examine: Callable[[], bool] = bool
        self.around: dict[str, int] = {}
        self._walked: dict[Phase, set[int]] = {}
        self._again = False
        self._steps = 0
        self._end: int | None = None
        self._calls: list[tuple[Form, Forward]] = []

    def called(self, inputs: object, forward: Forward) -> None:
        """A forward begins that is called with these inputs."""
        if not self.over:
            self._calls.append((_form(inputs), forward))

    def returned(self, run: Run, forward: Forward, outputs: Iterable[Tensor]) -> None:
        """A forward has made `outputs`: what is frozen in it should not be in their graph."""
        # With several processes all parameters are linked to it, and compiled code to all that it was given.
        if run.several or run.compiles or run.watch.traced or run.options.freeze == "params":
            return
        # Each branch once in each phase, which may be after the first cycle, and never in row mode with many rows.
        walked = self._walked.setdefault(forward.phase, set())
        if len(walked) == len(run.branches) or _dead(forward.live) <= walked:
            return
        # A branch inside another is in the graph also where no row learns through both: a gradient of zeros.
        freeze = forward.phase is Phase.FREEZE
        learning = forward.masks.all(1, keepdim=True) if freeze else forward.masks.any(1, keepdim=True)
        in_graph = run.frozen.live(learning, forward.phase, forward.plain)
        walked |= _dead(in_graph)
        if found := run.frozen.parameters(in_graph) & _leaves(outputs):
            names = [name for name, p in run.model.named_parameters() if id(p) in found]
            self.around |= dict.fromkeys(names, run.step.number)
            self._again = True

    def step_ends(self, run: Run) -> None:
        """A step has ended, with it perhaps the first whole cycle."""
        if self.over:
            if self._again:
                self._again = False
                self.examine()
            return
        self._steps += 1
        number, phases = run.step.number, len(run.schedule.phases)
        if self._end is None and self._steps >= phases and number % phases == 0:
            self._end = number
        if self._end is not None:
            # What its last step moved is seen as the next forward begins, so it is asked once more after that.
            self._again = False
            self.over = self.examine() or number > self._end

    def skipped(self) -> dict[tuple[int, int], set[int]]:
        """The branches that some forwards called, and others with inputs of the same form did not; by how many of those
        did not, of how many.

        A path that is chosen by the form of the inputs (an argument that is given or not, a flag) is no skipping.
        """
        found: dict[tuple[int, int], set[int]] = {}
        for form in dict.fromkeys(form for form, _ in self._calls):
            alike = [forward.reached for other, forward in self._calls if other == form and forward.used]
            for branch in set().union(*alike):
                without = sum(branch not in reached for reached in alike)
                if without:
                    found.setdefault((without, len(alike)), set()).add(branch)
        return found


def sends_zeros(x: Tensor) -> None:
    """To what `x` was made of the graph may send nothing but zeros, so that it leads there is no sign of a fault."""
    if x.grad_fn is not None:
        _notes(x.grad_fn)[_ZEROS] = True


def _notes(node: Node) -> dict[str, bool]:
    return cast(dict[str, bool], node.metadata)  # which torch's types take for a method


def _dead(live: Tensor) -> set[int]:
    return {branch for branch, alive in enumerate(live.tolist()) if not alive}


def _form(inputs: object) -> Form:
    """What a model could choose a path by without looking at numbers."""
    return tuple((path, _kind(leaf)) for path, leaf in trees.leaves(inputs).items())


def _kind(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        return leaf.dim(), leaf.dtype
    return leaf if isinstance(leaf, (bool, str)) else type(leaf)


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """The ids of the parameters in the graph of some tensors."""
    nodes, found = [x.grad_fn for x in outputs], set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None or _ZEROS in _notes(node):
            continue
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        new = {other for other, _ in node.next_functions} - seen
        seen |= new
        nodes.extend(new)
    return found
