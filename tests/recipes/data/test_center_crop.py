"""Test images against torchvision's Resize(256) and CenterCrop(224), on images with the statistics of photographs.

python -m pytest tests/recipes/data/test_center_crop.py -s --no-cov -n 0      # prints the table of docs/data.md
"""

import io
from contextlib import closing

import numpy as np
import pytest
import torch
from data.augment import central_boxes
from data.beton_writer import FolderSource, write_beton
from data.folder import read_folder
from data.loader import make_loader
from PIL import Image
from torchvision.transforms import v2

SIZES = [(500, 375), (375, 500), (500, 333), (500, 334), (640, 480), (500, 400), (1024, 768), (480, 411)]
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def photograph(rng, width, height):
    """Noise whose amplitude falls with frequency as in photographs, with thirty flat shapes for edges, as JPEG."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** 1.1

    def noise(deviation):
        field = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(height, width))
        return field / field.std() * deviation

    pixels = 118 + noise(40)[..., None] + np.stack([noise(12) for _ in range(3)], axis=-1)
    y, x = np.mgrid[:height, :width]
    for _ in range(30):
        left, top, side, angle = rng.random(4) * (width, height, max(width, height) / 8, np.pi)
        along, across = ((x - left) * np.cos(turn) + (y - top) * np.sin(turn) for turn in (angle, angle + np.pi / 2))
        pixels[(np.abs(along) < side) & (np.abs(across) < side * rng.random())] += rng.normal(0, 35, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("validation"), np.random.default_rng(0)
    for index, size in enumerate(2 * SIZES):
        path = root / "val" / f"class{index % 2}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(rng, *size))
    return root


@pytest.fixture(scope="module")
def expected(validation):
    """What a checkpoint of torchvision or timm was tested on, in grey levels."""
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    return torch.stack([transform(Image.open(path)) for path in read_folder(validation, "test").paths]).float()


def differences(images, expected, name):
    each = (images - expected).abs().mean((1, 2, 3))
    print(f"{name:50} {each.mean():.2f}, worst image {each.max():.2f}")
    return each


def read(data_dir, loader):
    options = {"batch_size": 8, "device": "cpu", "data_dir": data_dir, "loader": loader, "workers": 0}
    with closing(make_loader("imagenet", "test", train=False, **options)) as batches:
        return torch.cat([(images * STD + MEAN) * 255 for images, _ in batches.epoch(0)])


def resize_by_area(pixels, resolution):
    """OpenCV's INTER_AREA, with which FFCV resizes: the mean of what each pixel of the result covers."""
    for axis in (0, 1):
        edges = np.linspace(0, pixels.shape[axis], resolution + 1)
        total = np.insert(np.cumsum(pixels, axis, dtype=float), 0, 0, axis)
        whole = np.minimum(edges.astype(int), pixels.shape[axis] - 1)
        part = np.expand_dims(edges - whole, tuple(other for other in range(3) if other != axis))
        pixels = np.diff(total.take(whole, axis) * (1 - part) + total.take(whole + 1, axis) * part, axis=axis)
        pixels *= resolution / (edges[-1])
    return torch.from_numpy(np.rint(pixels)).permute(2, 0, 1)


def test_the_folder_loader(validation, expected):
    assert differences(read(validation, "torch"), expected, "without FFCV").max() < 0.1


def test_boxes_resized_as_ffcv_does(validation, expected):
    before, after = [], []
    for path in read_folder(validation, "test").paths:
        pixels = np.asarray(Image.open(path))
        height, width = pixels.shape[:2]
        side = round(0.875 * min(height, width))
        old = ((height - side) // 2, (width - side) // 2, side, side)
        for results, box in ((before, old), (after, central_boxes([height], [width], 0.875, 224)[0])):
            top, left, box_height, box_width = box
            results.append(resize_by_area(pixels[top : top + box_height, left : left + box_width], 224))
    worse = differences(torch.stack(before), expected, "FFCV's resizing, 0.875 of the shorter side, rounded").mean()
    better = differences(torch.stack(after), expected, "FFCV's resizing, nearest whole pixels").mean()
    assert better < 3 < 4 < worse


@pytest.mark.parametrize(("jpeg_share", "most"), [(0, 0.0), (1, 5.0)])
def test_files_of_the_shorter_side(validation, expected, tmp_path, jpeg_share, most):
    """The box then has the size of the result: FFCV copies it (`test_a_box_of_the_output_size_is_cut_out_exactly`)."""
    source = FolderSource(read_folder(validation, "test"), jpeg_share=jpeg_share, shorter_side=256)
    file = write_beton(tmp_path / "imagenet-test.beton", source)
    data, images = file.path.read_bytes(), []
    boxes = central_boxes(file.heights, file.widths, 0.875, 224)
    assert (boxes[:, 2:] == 224).all()
    for row, box, height, width in zip(file.table, boxes, file.heights, file.widths, strict=True):
        stored = data[row["pointer"] :][: row["size"]]
        pixels = np.asarray(Image.open(io.BytesIO(stored))) if jpeg_share else np.frombuffer(stored, np.uint8)
        top, left = box[:2]
        cut = pixels.reshape(height, width, 3)[top : top + 224, left : left + 224]
        images.append(torch.tensor(cut).permute(2, 0, 1).float())
    name = f"FFCV, --shorter-side 256 --jpeg-share {jpeg_share}"
    assert differences(torch.stack(images), expected, name).mean() <= most


@pytest.mark.ffcv
@pytest.mark.timeout(300)
def test_ffcv(validation, expected, tmp_path):
    write_beton(tmp_path / "imagenet-test.beton", FolderSource(read_folder(validation, "test")))
    assert differences(read(tmp_path, "ffcv"), expected, "FFCV").mean() < 3.5
    source = FolderSource(read_folder(validation, "test"), jpeg_share=0, shorter_side=256)
    write_beton(tmp_path / "imagenet-test.beton", source)
    assert differences(read(tmp_path, "ffcv"), expected, "FFCV, --shorter-side 256, raw").mean() < 0.01
