"""The study's command: every arm is one that its recipe takes, commits are not mixed, and `kill -9` changes nothing."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import char_gpt
import cifar10
import pytest
import study
from engine import Config
from study import Args, check, estimate, plan
from study_arms import SETTINGS, Setting, arms, options
from study_run import StudyError, commit, read

CONFIGURE = {"cifar10.py": cifar10.configure, "char_gpt.py": char_gpt.configure}
SCRIPT = Path(study.__file__)


@functools.cache  # reading a command line takes a third of a second
def configs(setting: Setting) -> dict[str, Config]:
    return {arm.name: CONFIGURE[setting.recipe](options(setting, arm)) for arm in arms(setting)}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_every_arm_is_a_command_and_no_two_compute_the_same(setting: Setting) -> None:
    found = configs(setting)
    assert len({json.dumps(config.identity()) for config in found.values()}) == len(found) == len(arms(setting))
    assert len({config.folder for config in found.values()}) == len(found)
    shared = [config for name, config in found.items() if name.startswith(("rdp", "drop", "outside", "ghost"))]
    assert {(config.epochs, config.peak_lr, config.length) for config in shared} == {(setting.epochs, setting.lr, 1)}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_controls_have_whole_epochs_at_the_cost_in_their_name(setting: Setting) -> None:
    for name, config in configs(setting).items():
        if name.startswith(("standard", "squeezed")):
            share = float(name.partition("-")[2] or 1)
            assert config.epochs * config.length == pytest.approx(setting.epochs * share, abs=0.5)


def test_arms_that_matter_come_first_and_seed_by_seed() -> None:
    runs = plan(Args())
    assert len({str(run) for run in runs}) == len(runs)
    assert {run.setting.name for run in runs} == {"resnet", "vit", "gpt"}
    most = [run for run in runs if run.arm.seeds == 5]
    assert [run.seed for run in most] == sorted(run.seed for run in most)
    first = runs[: len(most) + 6]
    assert {run.arm.name for run in first if run.arm.seeds < 5} == {"lr-x0.5", "lr-x2"}
    assert {run.seed for run in first if run.arm.tunes} == {0}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Args(settings=("vgg",)), "there is no setting vgg"),
        (Args(settings=("vit",), arms=("ghost",)), "has no arm ghost"),
    ],
)
def test_what_there_is_not_is_named(wrong: Args, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        plan(wrong)


def record(out: Path, **content: object) -> Path:
    path = out / "gpt" / "standard" / "seed-0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"commit": "a" * 40, "seconds": 100.0, "result": {}} | content))
    return path


def test_commits_are_not_mixed_within_a_setting(tmp_path: Path) -> None:
    args = Args(settings=("gpt",), out=tmp_path)
    record(tmp_path)
    check(plan(args), args, "a" * 40)
    with pytest.raises(StudyError, match=r"seed-0.json is of commit aaaaaaaaaaaa and this checkout is bbbbbbbbbbbb"):
        check(plan(args), args, "b" * 40)
    check(plan(Args(settings=("vit",), out=tmp_path)), Args(settings=("vit",), out=tmp_path), "b" * 40)


def test_a_changed_checkout_is_refused_but_for_a_trial(tmp_path: Path) -> None:
    args = Args(settings=("gpt",), out=tmp_path)
    with pytest.raises(StudyError, match="differ from their commit"):
        check(plan(args), args, "a" * 40 + "-dirty")
    trial = Args(settings=("trial",), out=tmp_path)
    check(plan(trial), trial, "a" * 40 + "-dirty")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    path = record(tmp_path)
    path.write_text(content)
    with pytest.raises(StudyError, match=r"seed-0\.json is no record of a run"):
        read(path)


def test_the_estimate_is_that_of_the_runs_that_are_finished(tmp_path: Path) -> None:
    args = Args(settings=("gpt",), arms=("standard", "standard-0.5"), seeds=(0, 1), out=tmp_path)
    before = estimate(plan(args), args)
    assert before == pytest.approx(3 * SETTINGS["gpt"].seconds)
    record(tmp_path)
    assert estimate(plan(args), args) == pytest.approx(300)
    assert estimate(plan(args), Args(settings=("gpt",), out=tmp_path, jobs=2)) == pytest.approx(150)


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--settings", "trial", "--arms", "rdp-late-0.5", "squeezed-0.85"]
    command += ["--seeds", "0", "--out", str(folder / "records"), "--work", str(folder / "work")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))


def numbers(folder: Path) -> dict[str, object]:
    """What the records say, but for times."""
    found = {}
    for path in sorted((folder / "records").rglob("*.json")):
        content = json.loads(path.read_text())
        for line in (content, content["result"], *content["history"]):
            for name in [name for name in line if "second" in name]:
                del line[name]
        found[str(path.relative_to(folder))] = content
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    try:
        commit()
    except StudyError as error:
        pytest.skip(str(error))
    whole = start(tmp_path / "whole")
    assert whole.wait(900) == 0, whole.communicate()[0]
    for position in ("epoch-001-step-00002", "epoch-002-step-00004"):
        killed, until = start(tmp_path / "cut"), time.monotonic() + 600
        while killed.poll() is None and time.monotonic() < until:
            names = [path.name for path in (tmp_path / "cut").rglob("epoch-*.pt")]
            if any(name >= position for name in names):
                break
            time.sleep(0.001)
        killed.kill()
        assert killed.wait(60) == -9, killed.communicate()[0]
    last = start(tmp_path / "cut")
    assert last.wait(900) == 0, last.communicate()[0]
    assert len(numbers(tmp_path / "whole")) == 2
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")
    assert not list((tmp_path / "cut" / "work").rglob("*.pt"))  # no weights are left
