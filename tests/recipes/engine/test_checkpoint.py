from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from engine import RunError, checkpoint
from engine.files import write_atomically
from hypothesis import given
from hypothesis import strategies as st


def state(value: float) -> dict[str, object]:
    return {"weight": torch.full((5, 3), value), "epoch": 2, "names": ["a", ("b", None)], "lr": 0.1}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "new", state(1.5), epoch=2, step=7)
    loaded = checkpoint.load_latest(tmp_path / "new")
    assert loaded is not None
    assert torch.equal(loaded.pop("weight"), torch.full((5, 3), 1.5))
    assert loaded == {"epoch": 2, "names": ["a", ("b", None)], "lr": 0.1}


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "absent") is None


def test_a_checkpoint_that_is_removed_while_a_reader_lists_the_folder_is_not_there(tmp_path: Path) -> None:
    kept = checkpoint.save(tmp_path, state(1.5), epoch=2, step=7)
    gone = tmp_path / kept.name.replace("step-00007", "step-00006")
    gone.symlink_to(tmp_path / "removed")  # listed, and no longer to be looked at
    assert checkpoint.find(tmp_path) == [kept]


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 200_000)), min_size=1, max_size=6))
def test_the_newest_position_wins_and_two_are_kept(
    tmp_path_factory: pytest.TempPathFactory, positions: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    ordered = sorted(set(positions))
    for number, (epoch, step) in enumerate(ordered):
        checkpoint.save(folder, state(float(number)), epoch, step)
    loaded = checkpoint.load_latest(folder)
    assert loaded is not None
    assert loaded["weight"][0, 0] == len(ordered) - 1
    assert len(list(folder.iterdir())) == min(2, len(ordered))


@given(data=st.data())
def test_any_cut_and_any_flipped_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(folder, state(1.0), 1, 0)
    newest = checkpoint.save(folder, state(2.0), 1, 1)
    content = bytearray(newest.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=f"skipping the damaged checkpoint .*{newest.name}"):
        loaded = checkpoint.load_latest(folder)
    assert loaded is not None
    assert loaded["weight"][0, 0] == 1.0


@pytest.mark.filterwarnings("ignore:skipping the damaged")
def test_when_none_is_whole_the_folder_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1.0), 1, 0).write_bytes(b"nothing")
    with pytest.raises(RunError, match=f"all 1 checkpoints in {tmp_path} are damaged"):
        checkpoint.load_latest(tmp_path)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trap"),)

    checkpoint.save(tmp_path, {"trap": Trap()}, 1, 0)
    with (
        pytest.warns(UserWarning, match="skipping the damaged checkpoint"),
        pytest.raises(RunError, match="are damaged"),
    ):
        checkpoint.load_latest(tmp_path)
    assert not (tmp_path / "trap").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1.0), 1, 0)
    before = sorted(tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=f"cannot write a checkpoint of 0 MB to {tmp_path}: No space left on device"):
            checkpoint.save(tmp_path, state(2.0), 1, 1)
    assert sorted(tmp_path.iterdir()) == before
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded["weight"][0, 0] == 1.0


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1.0), 1, 0)
    (tmp_path / ".epoch-009-step-00000-0123456789abcdef.pt.tmp").write_bytes(b"half")
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded["weight"][0, 0] == 1.0
    checkpoint.save(tmp_path, state(2.0), 1, 1)
    assert not list(tmp_path.glob(".*"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
