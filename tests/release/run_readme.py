"""The README's loop, run as it stands with what is installed: `tools/test_release.sh` calls it in empty environments.

The README is that of the installed package's own metadata. What its loop leaves open gets a stand-in: the data, the
loss, and timm, which is not installed.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import rdp


class Block(nn.Module):
    """`x + mlp(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


def main() -> None:
    """Run it and look at what it has done."""
    assert Path(rdp.__file__).is_relative_to(sys.prefix), f"{rdp.__file__} is not what is installed"
    package = metadata.metadata("residual-droppath")
    assert package["Version"] == rdp.__version__
    assert (Path(rdp.__file__).parent / "py.typed").exists(), "the package's types are not found without py.typed"
    readme = str(package.get_payload())
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (loop,) = [code for code in blocks if "import rdp" in code and "for images, labels in" in code]
    names = {
        "timm": types.SimpleNamespace(create_model=lambda name: nn.Sequential(*[Block() for _ in range(4)])),
        "loader": [(torch.randn(8, 16), torch.randint(16, (8,))) for _ in range(6)],
        "loss_fn": nn.CrossEntropyLoss(),
        "torch": torch,
    }
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(loop, "README.md", "exec"), names)
    assert "sound" in printed.getvalue(), printed.getvalue()
    assert Path("checkpoint.pt").exists()
    print(f"{' '.join(sys.argv[1:])}: rdp {rdp.__version__} runs the README's loop, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
