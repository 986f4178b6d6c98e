"""Charts that stay empty, for runs whose pictures no test looks at: painting them is most of the time of small ones."""

from __future__ import annotations

import pytest

from rdp.tensorboard import plots


def leave_unpainted(patch: pytest.MonkeyPatch) -> None:
    """Let charts have their size and nothing else."""
    patch.setattr(plots.FigureCanvasAgg, "draw", lambda canvas: canvas.get_renderer())
