"""Writing is parallel, exact, and all or nothing."""

import fcntl
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from data import DataError, beton, beton_writer
from data.beton_writer import ArraySource, FolderSource, Stored, write_beton
from data.datasets import Arrays
from data.folder import Folder, read_folder
from PIL import Image

RECIPES = Path(beton.__file__).parents[1]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return Arrays(rng.integers(0, 256, (50, 1, 28, 28), dtype=np.uint8), rng.integers(0, 10, 50))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def stored(path):
    """The bytes, metadata and label of every sample."""
    file, data = beton.open_beton(path), path.read_bytes()
    return [data[row["pointer"] :][: row["size"]] for row in file.table], file


def test_workers_change_no_byte(tmp_path, photographs):
    source = FolderSource(read_folder(photographs, "train"), jpeg_share=0.5)
    one, four = tmp_path / "1.beton", tmp_path / "4.beton"
    write_beton(one, source, workers=1)
    write_beton(four, source, workers=4)
    assert one.read_bytes() == four.read_bytes()


def test_images_never_cross_a_page(tmp_path):
    images = np.zeros((9, 1, 1024, 1024), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
    path = tmp_path / "large.beton"
    write_beton(path, ArraySource(Arrays(images[:, :, :700], np.arange(9))), page_size=beton.SMALLEST_PAGE)
    data, file = stored(path)
    assert [set(image) for image in data] == [{index} for index in range(9)]
    assert (file.table["pointer"] // beton.SMALLEST_PAGE).max() > 3


def test_a_jpeg_file_is_kept_byte_for_byte(tmp_path, photographs):
    folder = read_folder(photographs, "train")
    write_beton(tmp_path / "x.beton", FolderSource(folder))
    data, file = stored(tmp_path / "x.beton")
    assert data == [path.read_bytes() for path in folder.paths]
    assert file.labels.tolist() == folder.labels.tolist()
    sizes = [pixels(path).shape[:2] for path in folder.paths]
    assert list(zip(file.heights.tolist(), file.widths.tolist(), strict=True)) == sizes


def test_raw_and_reduced_images(tmp_path, photographs):
    folder = read_folder(photographs, "train")
    write_beton(tmp_path / "raw.beton", FolderSource(folder, jpeg_share=0.0))
    data, _ = stored(tmp_path / "raw.beton")
    assert data == [pixels(path).tobytes() for path in folder.paths]
    write_beton(tmp_path / "small.beton", FolderSource(folder, max_resolution=48))
    data, file = stored(tmp_path / "small.beton")
    assert max(file.heights.max(), file.widths.max()) == 48
    for image, path in zip(data, folder.paths, strict=True):
        (height, width, _), (small_height, small_width, _) = pixels(path).shape, pixels(io.BytesIO(image)).shape
        assert small_width / small_height == pytest.approx(width / height, rel=0.05)


def test_a_side_that_the_format_cannot_hold(tmp_path):
    path = tmp_path / "line.png"
    Image.new("RGB", (300, 1)).save(path)
    source = FolderSource(Folder([path], np.array([0]), ["a"]), shorter_side=256)
    with pytest.raises(DataError, match=rf"{path} would have 76800 x 256 pixels, and a side has at most 65535"):
        write_beton(tmp_path / "x.beton", source)


@pytest.mark.parametrize(("mode", "file_format"), [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")])
def test_images_that_are_not_rgb_jpeg_become_it(tmp_path, mode, file_format):
    image = Image.new("RGB", (30, 20), (200, 30, 60)).convert(mode, palette=Image.Palette.ADAPTIVE)
    path = tmp_path / "image"
    image.save(path, file_format)
    write_beton(tmp_path / "x.beton", FolderSource(Folder([path], np.array([0]), ["a"])))
    (data,), _ = stored(tmp_path / "x.beton")
    written = Image.open(io.BytesIO(data))
    assert (written.format, written.mode, written.size) == ("JPEG", "RGB", (30, 20))
    difference = np.abs(np.asarray(written, int) - np.asarray(image.convert("RGB"), int))
    assert difference.max() < 8


def only(path, *names):
    assert sorted(entry.name for entry in path.iterdir()) == sorted(names)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_cannot_be_read_ends_the_conversion(tmp_path, photographs, workers):
    folder = read_folder(photographs, "train")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(folder.paths[9].read_bytes()[:500])
    paths = [*folder.paths[:9], broken, *folder.paths[10:]]
    out = tmp_path / "out"
    with pytest.raises(DataError, match=rf"^{broken} cannot be decoded \(.*\); replace or remove it$"):
        write_beton(out / "x.beton", FolderSource(Folder(paths, folder.labels, folder.classes)), workers=workers)
    only(out)


def test_a_failed_conversion_keeps_the_earlier_file(tmp_path, arrays):
    path = tmp_path / "x.beton"
    write_beton(path, ArraySource(arrays))
    before = path.read_bytes()

    class Failing(ArraySource):
        def __getitem__(self, index: int) -> Stored:
            if index == 30:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        write_beton(path, Failing(arrays))
    assert path.read_bytes() == before
    only(tmp_path, "x.beton")


def test_an_image_larger_than_a_page(tmp_path):
    large = Arrays(np.zeros((2, 1, 1600, 1600), np.uint8), np.array([0, 1]))
    with pytest.raises(DataError, match=r"image 0 takes 2560000 bytes and a page has 2097152: raise --page-size"):
        write_beton(tmp_path / "x.beton", ArraySource(large), page_size=beton.SMALLEST_PAGE)
    only(tmp_path)


def test_arguments_that_make_no_sense(tmp_path, arrays, photographs):
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        write_beton(tmp_path / "x.beton", ArraySource(arrays), page_size=3_000_000)
    with pytest.raises(DataError, match="there are no samples to write"):
        write_beton(tmp_path / "x.beton", ArraySource(Arrays(arrays.images[:0], arrays.labels[:0])))
    with pytest.raises(ValueError, match="jpeg_share must be from 0 to 1, not 50"):
        FolderSource(read_folder(photographs, "train"), jpeg_share=50)
    for side in (0, -5, 65536):
        with pytest.raises(ValueError, match=f"max_resolution must be from 1 to 65535 pixels, not {side}"):
            FolderSource(read_folder(photographs, "train"), max_resolution=side)
    with pytest.raises(ValueError, match="shorter_side must be from 1 to 65535 pixels, not 0"):
        FolderSource(read_folder(photographs, "train"), shorter_side=0)
    with pytest.raises(ValueError, match="give either max_resolution or shorter_side"):
        FolderSource(read_folder(photographs, "train"), max_resolution=500, shorter_side=256)
    with pytest.raises(ValueError, match="quality must be from 1 to 100, not 0"):
        FolderSource(read_folder(photographs, "train"), quality=0)


def test_a_disk_that_returns_other_bytes_is_noticed(tmp_path, arrays, monkeypatch):
    fsync = os.fsync

    def corrupting_fsync(descriptor):
        fsync(descriptor)
        partial = tmp_path / "x.beton.partial"
        data = bytearray(partial.read_bytes())
        data[data.index(arrays.images[31].tobytes()[1:]) - 1] = ~arrays.images[31].flat[0]
        partial.write_bytes(data)

    monkeypatch.setattr(beton_writer.os, "fsync", corrupting_fsync)
    with pytest.raises(DataError, match=r"image 31 was read back from .* other than written: check the disk"):
        write_beton(tmp_path / "x.beton", ArraySource(arrays))
    only(tmp_path)


def test_two_conversions_to_one_file(tmp_path, arrays):
    with open(tmp_path / "x.beton.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is writing .*x\.beton; wait for it"):
            write_beton(tmp_path / "x.beton", ArraySource(arrays))
    write_beton(tmp_path / "x.beton", ArraySource(arrays))  # what a killed conversion left is no obstacle
    only(tmp_path, "x.beton")


def write_in_process(path, prepare):
    """Write 4,000 images, slowly enough to be met at it."""
    program = f"""
        import sys, time
        import numpy as np
        sys.path.insert(0, {str(RECIPES)!r})
        from data import DataError
        from data.beton_writer import ArraySource, write_beton
        from data.datasets import Arrays

        class Slow(ArraySource):
            def __getitem__(self, index):
                time.sleep(0.001)
                return super().__getitem__(index)

        {prepare}
        try:
            write_beton({str(path)!r}, Slow(Arrays(np.ones((4000, 1, 28, 28), np.uint8), np.arange(4000) % 10)))
        except DataError as error:
            sys.exit(str(error))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(120)
def test_killed_while_writing(tmp_path, arrays):
    path, partial = tmp_path / "x.beton", tmp_path / "x.beton.partial"
    process = write_in_process(path, "")
    while not (partial.exists() and partial.stat().st_size > 0):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    only(tmp_path, "x.beton.partial")
    with pytest.raises(DataError, match="cut short or damaged"):
        beton.open_beton(partial)
    write_beton(path, ArraySource(arrays))
    assert zlib.crc32(b"".join(stored(path)[0])) == zlib.crc32(arrays.images.tobytes())
    only(tmp_path, "x.beton")


@pytest.mark.timeout(120)
def test_full_disk(tmp_path):
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))"
    process = write_in_process(tmp_path / "x.beton", limit)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.strip() == f"{tmp_path}/x.beton cannot be written (File too large); nothing was left behind"
    only(tmp_path)
