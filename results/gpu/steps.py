"""Milliseconds of a training step of ViT-S on a GPU, after 40 steps of each contender.

python results/gpu/steps.py
"""

import time

import timm
import torch

import rdp

x = torch.randn(128, 3, 224, 224, device="cuda")


def contender(**options):
    """Model and optimizer."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", num_classes=100).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if options:
        handle = rdp.attach(model, 0.1, decay="constant", example_inputs=x, seed=1, **options)
        optimizer = handle.wrap(optimizer)
    return model, optimizer


def milliseconds(model, optimizer, steps):
    """Of a step, mean over both phases."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.cuda.synchronize()
    return round(1e3 * (time.perf_counter() - begin) / steps, 2)


contenders = {
    "plain": contender(),
    "fixed auto": contender(sampling="fixed"),
    "fixed rows": contender(sampling="fixed", compute="rows"),
    "bernoulli rows": contender(compute="rows"),
    "batch": contender(mode="batch"),
}
for pair in contenders.values():
    milliseconds(*pair, 40)
for _ in range(3):
    print({name: milliseconds(*pair, 10) for name, pair in contenders.items()}, flush=True)
