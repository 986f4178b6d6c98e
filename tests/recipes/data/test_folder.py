"""Folders of images as people have them: links, odd names, odd pixels, and files that are not what they are called."""

import io
import os
import time

import numpy as np
import pytest
from data import DataError, beton
from data.beton_writer import FolderSource, write_beton
from data.folder import FORMATS, Folder, read_folder, read_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from torchvision.datasets import ImageFolder


def save(path, color=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path, "PNG")


@pytest.fixture
def root(tmp_path):
    """Two classes of two images."""
    for name in ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"):
        save(tmp_path / "train" / name)
    return tmp_path / "train"


def listed(root):
    folder = read_folder(root.parent, "train")
    return [
        (os.path.relpath(path, root), folder.classes[label])
        for path, label in zip(folder.paths, folder.labels.tolist(), strict=True)
    ]


TWO_EACH = [("ant/0.png", "ant"), ("ant/1.png", "ant"), ("bee/0.png", "bee"), ("bee/1.png", "bee")]


@given(st.sets(st.text("abB.-_é", min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_files_and_their_order_are_those_of_torchvision(tmp_path_factory, names, data):
    root = tmp_path_factory.mktemp("folder") / "train"
    names = sorted(names - {".", ".."}) or ["a"]
    for name in ("x", "y"):
        save(root / name / "z.jpg")
        for _ in range(3):
            parts = data.draw(st.lists(st.sampled_from(names), max_size=2))
            path = root.joinpath(name, *parts, data.draw(st.sampled_from(["0.jpg", "1.PNG", "0.txt", "a.webp"])))
            if not any(parent.is_file() for parent in path.parents):
                save(path)
    theirs = ImageFolder(str(root))
    ours = read_folder(root.parent, "train")
    assert [(str(path), label) for path, label in zip(ours.paths, ours.labels.tolist(), strict=True)] == theirs.samples
    assert ours.classes == theirs.classes


@pytest.mark.parametrize("target", [".", "..", "../..", "../bee", "../../train/ant"])
def test_a_link_to_where_it_came_from_adds_no_image(root, target):
    (root / "ant" / "loop").symlink_to(target)
    (root / "ant" / "loop2").symlink_to(target)  # ImageFolder would walk 2^40 folders
    assert listed(root) == TWO_EACH


def test_a_real_file_comes_once_whatever_links_lead_to_it(root):
    save(root.parent / "elsewhere" / "2.png")
    for name in ("more", "more2"):
        (root / "ant" / name).symlink_to("../../elsewhere")
    (root / "ant" / "again.png").symlink_to("0.png")
    (root / "cat").mkdir()
    (root / "cat" / "2.png").symlink_to("../../elsewhere/2.png")
    assert listed(root) == [*TWO_EACH[:2], ("ant/more/2.png", "ant"), *TWO_EACH[2:], ("cat/2.png", "cat")]


def test_class_folders_may_be_links_but_not_to_one_folder(root):
    (root / "bee").rename(root.parent / "bees")
    (root / "bee").symlink_to("../bees")
    assert listed(root) == TWO_EACH
    (root / "wasp").symlink_to("../bees")
    with pytest.raises(DataError, match=r"bee and .*wasp are one folder, and its images cannot be of two classes$"):
        listed(root)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("nothing"), lambda path: path.symlink_to(path)]
)
@pytest.mark.timeout(30)
def test_a_name_that_is_no_file_is_named(root, make):
    make(root / "ant" / "x.jpg")
    with pytest.raises(DataError, match=r"ant/x\.jpg is no file|Too many levels .*ant/x\.jpg"):
        listed(root)


def test_folders_called_like_images_and_odd_class_names(root):
    save(root / "ant" / "x.jpg" / "0.jpg")
    for name in ("..ant", "a..b", " ", "n\nl", os.fsdecode(b"caf\xe9")):  # the last one is Latin-1, not UTF-8
        save(root / name / "0.png")
    odd = [(name, name.split("/")[0]) for name in (" /0.png", "..ant/0.png", "a..b/0.png")]
    last = [(name, name.split("/")[0]) for name in (os.fsdecode(b"caf\xe9/0.png"), "n\nl/0.png")]
    assert listed(root) == [*odd, *TWO_EACH[:2], ("ant/x.jpg/0.jpg", "ant"), *TWO_EACH[2:], *last]
    assert read_image(root / os.fsdecode(b"caf\xe9") / "0.png")[0].size == (8, 8)


def test_what_cannot_be_opened_is_named(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # tests may run as root, who may open anything
    with pytest.raises(DataError, match=r"ant/0\.png cannot be decoded \(.*Permission denied.*\); replace or remove"):
        read_image(root / "ant" / "0.png")
    scandir = os.scandir
    monkeypatch.setattr("os.scandir", lambda path: refuse(path) if str(path).endswith("bee") else scandir(path))
    with pytest.raises(DataError, match=r"train cannot be listed \(.*Permission denied: '.*bee'\)"):
        listed(root)


@pytest.mark.timeout(60)
def test_thousands_of_classes_are_listed_in_seconds(tmp_path):
    root = tmp_path / "train"
    save(root / "0" / "0.png")
    for index in range(1, 3000):
        (root / str(index)).mkdir()
        os.link(root / "0" / "0.png", root / str(index) / "0.png")
    start = time.process_time()
    folder = read_folder(tmp_path, "train")
    assert time.process_time() - start < 10
    assert len(folder.classes) == len(folder) == 3000
    (root / "1567" / "0.png").unlink()
    with pytest.raises(DataError, match=r"\(no image in 1567\)$"):
        read_folder(tmp_path, "train")


GRAY = np.array([[0, 255, 256, 4660, 65279, 65535]], np.uint16)


@pytest.mark.parametrize(
    ("file_format", "order"), [("PNG", "<u2"), ("PNG", ">u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")]
)
def test_gray_of_16_bits_keeps_its_upper_8(tmp_path, file_format, order):
    path = tmp_path / "x.png"
    Image.fromarray(GRAY.astype(order)).save(path, file_format)
    image, _ = read_image(path)
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 0, 1, 18, 254, 255]]
    write_beton(tmp_path / "x.beton", FolderSource(Folder([path], np.array([0]), ["a"]), jpeg_share=0))
    row = beton.open_beton(tmp_path / "x.beton").table[0]
    stored = (tmp_path / "x.beton").read_bytes()[row["pointer"] :][: row["size"]]
    assert stored == np.repeat([0, 0, 1, 18, 254, 255], 3).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("pixels", "mode"), [(np.ones((4, 4), np.float32), "F"), (np.ones((4, 4), np.int32), "I"), (None, "LAB")]
)
def test_pixels_without_a_known_range_are_refused_by_name(tmp_path, pixels, mode):
    path = tmp_path / "x.tif"
    (Image.new(mode, (4, 4)) if pixels is None else Image.fromarray(pixels)).save(path)
    with pytest.raises(DataError, match=rf"^{path} has pixels of PIL's mode {mode}, .* convert it to gray or RGB"):
        read_image(path)


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **_: started.append(arguments))
    path = tmp_path / "x.jpg"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with pytest.raises(DataError, match=r"cannot be decoded \(it is none of JPEG, PNG, PPM, BMP, TIFF, WEBP\)"):
        read_image(path)
    assert not started


@pytest.mark.parametrize("file_format", ["GIF", "ICO", "TGA", "PCX", "JPEG2000", "PDF"])
def test_other_formats_are_refused(tmp_path, file_format):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (32, 32)).save(path, file_format)
    with pytest.raises(DataError, match="it is none of JPEG"):
        read_image(path)


def test_an_exif_orientation_turns_nothing_in_any_loader(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    path = tmp_path / "x.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    assert read_image(path)[0].size == (30, 20)
    for share, most in ((0.0, None), (1.0, None), (1.0, 24)):
        source = FolderSource(Folder([path], np.array([0]), ["a"]), jpeg_share=share, max_resolution=most)
        file = write_beton(tmp_path / "x.beton", source)
        assert file.widths[0] > file.heights[0]


def read_or_error(path):
    try:
        return read_image(path)
    except DataError as error:
        return error


def encoded(file_format):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4))
def test_any_damaged_file_is_an_image_or_an_error_that_names_it(tmp_path_factory, file_format, changes):
    data = bytearray(encoded(file_format))
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(data)
    result = read_or_error(path)
    if isinstance(result, DataError):
        assert str(path) in str(result)
    else:
        assert result[0].convert("RGB").mode == "RGB"
        assert result[1] == data


def test_an_error_of_pil_that_is_none_of_its_documented_ones(tmp_path, monkeypatch):
    save(tmp_path / "x.png")

    def overflow(*_args, **_kwargs):
        raise OverflowError("Python int too large to convert to C ssize_t")

    monkeypatch.setattr(Image, "open", overflow)
    with pytest.raises(DataError, match=r"x\.png cannot be decoded \(Python int too large"):
        read_image(tmp_path / "x.png")


def test_too_little_memory_is_not_a_damaged_image(root, monkeypatch):
    def fail(self):
        raise MemoryError

    path = root / "ant" / "0.png"
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(DataError, match=f"{path} cannot be decoded for lack of memory: give fewer --workers"):
        read_image(path)
