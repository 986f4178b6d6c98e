from __future__ import annotations

import json
import os
import shutil
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from engine import RunError, lock
from engine.lock import claim

from tests.recipes.engine.tiny import hold_folder


def test_a_second_claim_says_who_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    with claim(tmp_path) as held:
        held.check()
        with (
            pytest.raises(RunError, match=f"{tmp_path} is in use by process {os.getpid()} on .* since 20"),
            claim(tmp_path),
        ):
            pass
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    with claim(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_frees_itself(tmp_path: Path, processes: ForkServerContext) -> None:
    process = processes.Process(target=hold_folder, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "PATIENCE", 0.1)
        with pytest.raises(RunError, match=f"in use by process {process.pid} "), claim(tmp_path):
            pass
    process.kill()
    process.join()
    assert (tmp_path / lock.NAME).exists()
    with claim(tmp_path) as held:
        held.check()


def test_a_folder_in_which_nothing_was_written_is_removed_with_those_above_it(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with claim(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_or_replaced_is_not_ours_any_more(again: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claim(folder) as held:
        shutil.rmtree(folder)
        if again:
            folder.mkdir()
            (folder / lock.NAME).touch()
        with pytest.raises(RunError, match=f"{folder} was removed or replaced while the run went on"):
            held.check()


@pytest.mark.parametrize("error", [RunError("no such file"), FileNotFoundError()])
def test_a_folder_that_is_removed_in_the_midst_of_writing_is_told_as_such(error: Exception, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def write(removed: bool) -> None:
        with held.writing():
            if removed:
                shutil.rmtree(folder)
            raise error

    with claim(folder) as held:
        with pytest.raises(type(error)) as of_the_machine:
            write(removed=False)
        assert of_the_machine.value is error
        with pytest.raises(RunError, match=f"{folder} was removed or replaced while the run went on"):
            write(removed=True)


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with claim(tmp_path / "run") as held:
        held.check()
    assert not list(tmp_path.iterdir())
