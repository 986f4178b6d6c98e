from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from engine import Config, RunError, parse
from engine.config import FREE_ON_RESUME


def test_the_command_line_sets_typed_fields() -> None:
    config = parse(Config, ["--model", "vit_tiny_patch16_224", "--rate", "0.2", "--small-stem", "--lr", "0.3"])
    assert (config.model, config.rate, config.small_stem, config.lr) == ("vit_tiny_patch16_224", 0.2, True, 0.3)


def test_what_the_command_line_says_wins_over_a_preset() -> None:
    preset = Config(epochs=16, channels_last=True, lr=1.7)
    config = parse(Config, ["--epochs", "7", "--no-channels-last"], default=preset)
    assert (config.epochs, config.channels_last, config.lr) == (7, False, 1.7)


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Config, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
    for source in ("paper", "timm"):
        assert source in shown


def test_an_unknown_algorithm_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Config, ["--algorithm", "dropout"])
    assert stopped.value.code != 0
    assert "standard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"batch_size": -4}, "--batch-size must be at least 1, not -4"),
        ({"rate": 1.0}, "--rate must be at least 0 and below 1, not 1.0"),
        ({"ema": 1.5}, "--ema must be above 0 and below 1, not 1.5"),
        ({"checkpoint_minutes": 0.0}, "--checkpoint-minutes must be above 0, not 0.0"),
        ({"lr": float("nan")}, "--lr must be a number up to 1e\\+30, not nan"),
        ({"epochs": 5}, "--warmup-epochs 5 do not end within --epochs 5, so .* such as --warmup-epochs 0"),
        ({"fsdp": True, "ema": 0.9}, "--fsdp does not go together with --ema, --compile, --panels or --lesions"),
        ({"devices": -1}, "--devices must be at least 0, not -1"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Config(**settings)


@pytest.mark.parametrize(("batch", "size", "accumulate", "micro"), [(128, 1, 1, 128), (1024, 4, 2, 128), (12, 3, 4, 1)])
def test_the_batch_is_shared_equally(batch: int, size: int, accumulate: int, micro: int) -> None:
    assert Config(batch_size=batch, accumulate=accumulate).micro_batch(size) == micro


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(RunError, match="a batch of 128 cannot be shared equally by 3 processes x 1 micro-batches"):
        Config().micro_batch(3)


def test_timms_learning_rate_follows_the_batch() -> None:
    assert Config(batch_size=128).peak_lr == 0.05
    assert Config(batch_size=1024).peak_lr == 0.4
    assert Config(batch_size=1024, lr=1.0).peak_lr == 1.0


def test_a_saved_configuration_is_the_same_after_json() -> None:
    config = Config(out=Path("somewhere"), lr=0.1, seeds=3)
    assert config.changes(json.loads(json.dumps(config.to_json()))) == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_a_change_matters_to_a_resume_unless_it_only_moves_the_run(field: str) -> None:
    saved = Config().to_json()
    saved[field] = "something else"
    assert bool(Config().changes(saved)) == (field not in FREE_ON_RESUME)


def test_labels_and_folders_tell_algorithms_apart() -> None:
    settings = [("standard", "row"), ("droppath", "row"), ("rdp", "row"), ("rdp", "batch")]
    configs = [Config(algorithm=a, mode=m, match=c) for a, m in settings for c in ("steps", "cost")]
    assert len({config.folder for config in configs}) == len(configs)
    assert Config(algorithm="rdp").folder == Path("results/mnist10k/resnet50/rdp-row-0.1")
