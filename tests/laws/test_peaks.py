"""Running on rows makes room for larger batches: what autograd keeps for the backward, counted in bytes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import rdp

ROWS, SIZE = 20, 32
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(SIZE, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=4),
    "convnext": lambda: ConvNeXt(num_classes=4, depths=(1, 1, 2, 1), dims=(8, 16, 16, 16)),
    "swin": lambda: SwinTransformer(
        SIZE, 2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=4, drop_path_rate=0.0
    ),
}
# Of 20 rows 2 are dropped in each branch. Stems, downsampling and heads keep those of all rows.
MOST = {"vit": (0.92, 0.18), "convnext": (0.95, 0.42), "swin": (0.92, 0.20)}


class Kept:
    """Held by autograd in the place of a tensor: detached, or an output kept by its own node kept that alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def peak(model: nn.Module, x: Tensor) -> int:
    """The bytes of all storages that autograd keeps at most, parameters aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    holders: Counter[int] = Counter()
    now = most = 0

    def pack(tensor: Tensor) -> Kept:
        nonlocal now, most
        storage, kept = tensor.untyped_storage(), Kept(tensor)
        if (key := storage.data_ptr()) not in weights:
            now += 0 if holders[key] else storage.nbytes()
            most = max(most, now)
            holders[key] += 1
            weakref.finalize(kept, release, key, storage.nbytes())
        return kept

    def release(key: int, size: int) -> None:
        nonlocal now
        holders[key] -= 1
        now -= 0 if holders[key] else size

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        model(x).square().mean().backward()
    assert not now, "nothing is left after the backward"
    model.zero_grad()
    return most


@pytest.mark.parametrize("name", MODELS)
def test_both_phases_keep_less_than_plain_training(name: str) -> None:
    """DROP keeps what undropped rows need, FREEZE what dropped ones do; undropped rows never have a graph there."""
    torch.manual_seed(0)
    model, x = MODELS[name]().train(), torch.randn(ROWS, 3, SIZE, SIZE)
    plain = peak(model, x)
    handle = rdp.attach(model, 0.1, decay="constant", sampling="fixed", compute="rows", example_inputs=x[:2])
    assert {branch.compute for branch in handle.branches} == {"rows"}
    found = []
    for _ in rdp.Phase.DROP, rdp.Phase.FREEZE:
        found.append(peak(model, x) / plain)
        handle.advance()
    assert all(ratio <= most for ratio, most in zip(found, MOST[name], strict=True)), found
