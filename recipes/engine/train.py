"""The training loop of all recipes, from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch
from data.loader import Loader
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from engine import checkpoint
from engine.config import Config
from engine.cost import cost_of, keep, matched_epochs
from engine.errors import RunError
from engine.evaluate import evaluate
from engine.examine import Network, examine, keep_similarity
from engine.folder import begin, is_finished, seed_folder, write_json
from engine.interrupt import Action, Interrupts
from engine.launch import World
from engine.lock import Claim, claim
from engine.messages import log
from engine.model import attach, check_model, distribute, make_optimizer
from engine.outside import slow_outside
from engine.records import Records
from engine.resume import describe_data, find_state
from engine.rng import seed_all
from engine.schedule import learning_rate, unsqueezed
from engine.state import TrainState

T = TypeVar("T")
PROBE = 16  # images that features are compared on


def train(
    model: nn.Module,
    train_data: Loader,
    test_data: Loader,
    *,
    config: Config,
    seed: int,
    world: World,
    vocabulary: str | None = None,
) -> dict[str, Any]:
    """Train and test a model, and leave everything in the results folder of its seed.

    Args:
        model: with fresh weights, on the CPU, nothing attached.
        train_data: batches of `config.micro_batch(world.size)` images.
        test_data: the test split.
        config: the settings.
        seed: of this run.
        world: the processes that train together.
        vocabulary: of data that is text, the characters by number, for the pictures.

    Returns:
        The content of `result.json`.

    Raises:
        RunError: the data has too few images or classes, the loss is not finite, or nothing can be written; another
            process trains in the folder; or the run that it holds is another one, or on other data.
        SystemExit: a signal came; the run is saved.
    """
    steps_per_epoch = len(train_data) // config.accumulate
    _check(train_data, test_data, steps_per_epoch, config)
    with claim(seed_folder(config, seed)) if world.is_first else nullcontext() as claimed:
        return _train(model, train_data, test_data, steps_per_epoch, config, seed, world, vocabulary, claimed)


def _train(
    model: nn.Module,
    train_data: Loader,
    test_data: Loader,
    steps_per_epoch: int,
    config: Config,
    seed: int,
    world: World,
    vocabulary: str | None,
    claimed: Claim | None,
) -> dict[str, Any]:
    # Between looking at the folder and holding it, another process may have worked in it.
    folder = seed_folder(config, seed)
    if world.is_first:
        is_finished(config, seed)
        log.info(
            "%d training and %d test samples of %d classes (%s loader)",
            *(train_data.samples, test_data.samples, train_data.classes, train_data.kind),
        )

    # The model, what is attached to it, and its optimizer.
    device = world.device
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device).to(memory_format=layout)
    images, labels = next(iter(train_data.epoch(0)))
    check_model(model, images[:2], config.model)
    autocast = _autocast(config, device)
    cost = cost_of(model, config, images, labels, autocast, world)
    epochs = matched_epochs(config, cost.relative_flops)
    ema = None if config.ema is None else ModelEmaV3(model, decay=config.ema)
    steps = epochs * steps_per_epoch
    handle = attach(model, config, seed=seed, example=images[:2], steps=steps)
    if config.compile:
        model.compile()
    parallel = distribute(model, config, world)
    inner = make_optimizer(model, config)
    if handle is not None and config.freeze_outside < 1:
        slow_outside(inner, handle, config.freeze_outside)
    optimizer = inner if handle is None else handle.wrap(inner)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    seed_all(seed * world.size + world.rank)  # dropout differs between processes

    # The schedule.
    whole = steps if config.length == 1 else config.epochs * steps_per_epoch

    def rate_at(step: int) -> float:
        return learning_rate(
            unsqueezed(step, steps, whole, config.squeeze_from),
            whole,
            peak=config.peak_lr,
            warmup=round(config.warmup_epochs * steps_per_epoch),
            shape=config.schedule,
        )

    # Where the run stands.
    state = TrainState(model, inner, scaler, ema, handle, world, sharded=config.fsdp)
    state.loss_sum = state.loss_sum.to(device)
    data = describe_data(train_data, test_data)
    saved = None
    if config.resume:
        saved = find_state(folder / "checkpoints", state, config, data, epochs=epochs, steps=steps_per_epoch)
    if saved is not None:
        state.load_state_dict(saved)
    if world.is_first:
        begin(config, seed)
        keep(cost, config, images)
    records = Records(
        folder if world.is_first else None,
        config,
        title=f"{config.model} {config.label} seed {seed}",
        images=steps * config.batch_size,
        images_done=(state.epoch * steps_per_epoch + state.step) * config.batch_size,
        step=state.epoch * steps_per_epoch + state.step,
        history=saved["history"] if saved else None,
    )

    if config.resume and saved is None:
        records.say(f"nothing to resume in {folder}: starting from the beginning")
    records.open_panels(handle, images[:PROBE], vocabulary)
    records.say(f"training: epoch {state.epoch + 1} of {epochs}, {steps_per_epoch} steps each")

    def save() -> None:
        # Lest a run that diverged replaces the checkpoints that are still good.
        _require_finite("training", float(world.sum(state.loss_sum)), state.epoch)
        content = state.state_dict() | {"history": records.history, "config": config.identity(), "data": data}
        if claimed is not None:
            with claimed.writing():
                checkpoint.save(folder / "checkpoints", content, state.epoch, state.step)

    with records, Interrupts(config.checkpoint_minutes, world) as interrupts:

        def pause() -> None:
            action = interrupts.poll()
            if action is not Action.GO_ON:
                save()
            if action is Action.STOP:
                records.say(f"stopped and saved in {folder}: go on with --resume")
                raise SystemExit(interrupts.exit_status)

        for epoch in range(state.epoch, epochs):
            parallel.train()
            started = time.perf_counter() - state.epoch_seconds
            first = state.step * config.accumulate
            batches = islice(train_data.epoch(epoch, start=first), steps_per_epoch * config.accumulate - first)
            for batch, (images, labels) in enumerate(batches, start=first):
                completes_step = (batch + 1) % config.accumulate == 0
                images = images.to(memory_format=layout)
                step = epoch * steps_per_epoch + state.step
                with _gradient_sync(parallel, completes_step):
                    with autocast():
                        loss = criterion(parallel(images), labels)
                    scaler.scale(loss / config.accumulate).backward()
                state.loss_sum += loss.detach() * len(labels)
                if not completes_step:
                    continue

                for group in optimizer.param_groups:
                    group["lr"] = rate_at(step)
                if config.clip_grad is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                records.gradients(step, loss.detach())
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if ema is not None:
                    ema.update(model, step=step)
                state.step += 1
                state.epoch_seconds = time.perf_counter() - started
                records.step(config.batch_size)
                pause()

            numbers = {"lr": optimizer.param_groups[0]["lr"], **_training_numbers(state, world, config)}
            networks = {"": model} if ema is None else {"": model, "ema_": ema.module}
            if epoch not in config.tested_epochs(epochs):
                networks = {}
            for prefix, network in networks.items():
                if world.size > 1:  # BatchNorm's statistics differ: those of the first process are saved, so tested
                    distribute_bn(network, world.size, reduce=False)
                tested = evaluate(
                    network.eval(),
                    _after_each(test_data.epoch(epoch), pause),
                    classes=test_data.classes,
                    device=device,
                    autocast=autocast,
                    flip=config.test_flip,
                )
                _require_finite("test", tested["test_loss"], epoch)
                numbers |= {prefix + name: value for name, value in tested.items()}
            state.next_epoch()
            records.add(epoch, state.epoch * steps_per_epoch, numbers)
            save()
            records.tell(epochs)

    result = {
        **{name: getattr(config, name) for name in ("dataset", "model", "algorithm", "mode", "rate", "match")},
        "loader": train_data.kind,
        "data": {split: {n: of[n] for n in ("samples", "classes", "listing")} for split, of in data.items()},
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        **{name: value for name, value in records.history[-1].items() if "top" in name or "test" in name},
        "train_seconds": state.seconds,
        "relative_flops": cost.relative_flops,
        "flops": cost.relative_flops * cost.image_flops * config.batch_size * steps,
    }
    if config.examine or config.lesions:
        network = Network(model, device, autocast, config.test_flip)
        where = folder if world.is_first else None
        result |= examine(network, handle, train_data, test_data, config=config, epochs=epochs, folder=where)
    if world.is_first:
        write_json(folder / "result.json", result)
    records.finish(result, steps)
    if not (config.fsdp or config.compile):  # of which features are costly
        images = next(iter(test_data.epoch(0)))[0][:PROBE]
        keep_similarity(model, handle, images, folder if world.is_first else None)
    return result


def _check(train_data: Loader, test_data: Loader, steps_per_epoch: int, config: Config) -> None:
    if steps_per_epoch == 0:
        raise RunError(
            f"{config.dataset} has {train_data.samples} training images, fewer than one batch of {config.batch_size}: "
            "choose a smaller --batch-size"
        )
    if train_data.classes != test_data.classes:
        raise RunError(
            f"{config.dataset} has {train_data.classes} classes for training and {test_data.classes} for testing: "
            "are both of the same data set?"
        )


def _autocast(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.amp]
    return lambda: nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _gradient_sync(parallel: nn.Module, wanted: bool) -> AbstractContextManager[object]:
    # Processes add up their gradients once a step, in the backward of the last micro-batch.
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(wanted)
    elif not wanted and isinstance(parallel, DistributedDataParallel):
        return parallel.no_sync()
    return nullcontext()


def _training_numbers(state: TrainState, world: World, config: Config) -> dict[str, float]:
    images = state.step * config.batch_size
    loss = float(world.sum(state.loss_sum)) / images
    _require_finite("training", loss, state.epoch)
    return {
        "train_loss": loss,
        "train_seconds": state.epoch_seconds,
        "images_per_second": images / max(state.epoch_seconds, 1e-9),
    }


def _require_finite(which: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise RunError(
            f"the {which} loss of epoch {epoch + 1} is {loss}: try a lower --lr, more --warmup-epochs, --clip-grad 1, "
            "or --amp bf16 instead of fp16"
        )


def _after_each(items: Iterable[T], action: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        action()
