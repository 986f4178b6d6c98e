"""The random state of this process: seeding it, and holding it in tensors and plain numbers for a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch (CPU and GPUs), Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more


def get_rng_state() -> dict[str, Any]:
    """The states of torch (CPU and current GPU), Python and NumPy."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `get_rng_state` returned; a GPU's state is left out where there is no GPU."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def check_rng_state(state: dict[str, Any]) -> None:
    """Look whether `set_rng_state` can restore a state, without doing so.

    Raises:
        ValueError: it cannot.
    """
    try:
        torch.Generator().set_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.Generator("cuda").set_state(state["cuda"])
        version, internal, gauss = state["python"]
        random.Random().setstate((version, tuple(internal), None if gauss is None else float(gauss)))
        name, keys, *rest = state["numpy"]
        np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
    except Exception as error:  # four libraries have as many ways of refusing
        raise ValueError(f"its random state cannot be restored: {str(error) or type(error).__name__}") from error
