"""A `.beton` file that is not whole is refused with a reason; the real FFCV would read it, wrongly."""

import numpy as np
import pytest
from data import DataError, beton
from data.beton_writer import ArraySource, FolderSource, write_beton
from data.datasets import Arrays
from data.folder import read_folder
from hypothesis import given
from hypothesis import strategies as st

SAMPLES = 7
PAGE = 2 * beton.SMALLEST_PAGE


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return Arrays(rng.integers(0, 256, (SAMPLES, 3, 8, 8), dtype=np.uint8), rng.integers(0, 10, SAMPLES))


@pytest.fixture(scope="module")
def array_file(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("arrays") / "arrays.beton"
    write_beton(path, ArraySource(arrays), page_size=PAGE)
    return path


@pytest.fixture(scope="module")
def photograph_file(tmp_path_factory, photographs):
    path = tmp_path_factory.mktemp("photographs") / "photographs.beton"
    write_beton(path, FolderSource(read_folder(photographs, "train"), jpeg_share=0.5), page_size=PAGE)
    return path


@pytest.fixture(params=["array_file", "photograph_file"])
def file(request):
    return request.getfixturevalue(request.param)


def edit(path, tmp_path, change, ours=True):
    """A copy of the file in which `change(header, metadata, table)` has been at work; not `ours`: as FFCV writes it."""
    data = bytearray(path.read_bytes())
    header = np.frombuffer(data, beton.HEADER, 1)
    kind = beton.ARRAY_FIELD if path.stem == "arrays" else beton.RGB_FIELD
    samples, table_start = int(header["samples"][0]), int(header["table"][0])
    start = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize
    metadata = np.frombuffer(data, beton.metadata_type(kind), samples, start)
    change(header, metadata, np.frombuffer(data, beton.TABLE, samples, table_start))
    if not ours:
        data[start - 1024 : start] = bytes(1024)
    copy = tmp_path / path.name
    copy.write_bytes(data)
    return copy


def test_what_was_written_is_read(array_file, arrays):
    file = beton.open_beton(array_file)
    assert len(file) == SAMPLES
    assert file.shape == (3, 8, 8)
    assert file.labels.tolist() == arrays.labels.tolist()
    data = array_file.read_bytes()
    for row, image in zip(file.table, arrays.images, strict=True):
        assert data[row["pointer"] :][: row["size"]] == image.tobytes()


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=rf"there is no file {tmp_path}/x.beton; tools/write_beton.py makes it"):
        beton.open_beton(tmp_path / "x.beton")


@given(data=st.data())
def test_cut_anywhere(data, array_file, photograph_file, tmp_path_factory):
    path = data.draw(st.sampled_from([array_file, photograph_file]))
    whole = path.read_bytes()
    # Cuts in the header, in the metadata, in the images, and in the last 0.01 %, which FFCV does not notice.
    length = data.draw(
        st.integers(0, 2500) | st.integers(0, len(whole) - 1) | st.integers(len(whole) - 3000, len(whole) - 1)
    )
    cut = tmp_path_factory.getbasetemp() / "cut.beton"
    cut.write_bytes(whole[:length])
    with pytest.raises(DataError, match=r"cut.beton is cut short or damaged: .*; write it again"):
        beton.open_beton(cut)


@given(bit=st.integers(0, 24 * SAMPLES * 8 - 1))
def test_any_flipped_bit_in_the_table(bit, array_file, tmp_path_factory):
    data = bytearray(array_file.read_bytes())
    data[len(data) - 24 * SAMPLES + bit // 8] ^= 1 << bit % 8
    damaged = tmp_path_factory.getbasetemp() / "flipped.beton"
    damaged.write_bytes(data)
    with pytest.raises(DataError, match="cut short or damaged"):
        beton.open_beton(damaged)


def set_field(part, field, value):
    def change(header, metadata, table):
        {"header": header, "metadata": metadata, "table": table}[part][field][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("header", "version", 0), "its version is 0, not 2"),
        (set_field("header", "fields", 3), "it has 3 fields"),
        (set_field("header", "page_size", 12345), "its page size is 12345"),
        (set_field("header", "samples", 0), "it holds no samples"),
        (set_field("header", "fields", 0), "it has 0 fields"),
        (set_field("header", "fields", 65535), "it has 65535 fields"),
        (set_field("metadata", "label", 3), "its checksum does not fit its header, labels and table"),
        (set_field("header", "samples", 2**60), "it ends after"),
        (set_field("header", "table", 2**50), "its table lies outside of the file"),
        (set_field("header", "table", 8), "its table lies outside of the file"),
        (set_field("metadata", "label", -1), "a label is negative"),
        (set_field("table", "pointer", 2**63), "an image lies outside of the data"),
        (set_field("table", "pointer", 8), "an image lies outside of the data"),
        (set_field("table", "size", 2**63), "an image lies outside of the data"),
        (set_field("table", "size", 0), "an image lies outside of the data"),
        (set_field("table", "sample", 1), "does not have every sample once"),
    ],
)
def test_damage_of_any_file(file, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        beton.open_beton(edit(file, tmp_path, change))


def keep(header, metadata, table):
    pass


def test_a_file_without_a_checksum_is_read(file, tmp_path):
    theirs, ours = beton.open_beton(edit(file, tmp_path, keep, ours=False)), beton.open_beton(file)
    assert theirs.labels.tolist() == ours.labels.tolist()
    assert np.array_equal(theirs.table, ours.table)


def test_ffcv_finds_the_label_where_it_looks(array_file, arrays):
    """FFCV's reader in three lines: descriptions by type and name only, then metadata, then the table to the end."""
    offset = beton.HEADER.itemsize + 2 * 1041
    theirs = np.dtype([("", "<u8"), ("", "<i8")], align=True)
    assert np.fromfile(array_file, theirs, SAMPLES, offset=offset)["f1"].tolist() == arrays.labels.tolist()
    start = int(np.fromfile(array_file, beton.HEADER, 1)["table"][0])
    assert len(np.fromfile(array_file, beton.TABLE, offset=start)) == SAMPLES


@given(data=st.data())
def test_any_changed_byte_outside_of_the_images_is_noticed(data, array_file, photograph_file):
    path = data.draw(st.sampled_from([array_file, photograph_file]))
    header = np.fromfile(path, beton.HEADER, 1)[0]
    kind = beton.metadata_type(beton.ARRAY_FIELD if path == array_file else beton.RGB_FIELD)
    metadata_end = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize + int(header["samples"]) * kind.itemsize
    place = data.draw(st.integers(0, metadata_end - 1) | st.integers(int(header["table"]), path.stat().st_size - 1))
    with open(path, "r+b", buffering=0) as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ data.draw(st.integers(1, 255))]))
        try:
            with pytest.raises(DataError, match=r"^\S* is cut short or damaged: [^\n]*; write it again$"):
                beton.open_beton(path)
        finally:
            file.seek(place)
            file.write(byte)


def describe(*fields):
    described = np.zeros(len(fields), beton.FIELD)
    for row, (name, kind) in zip(described, fields, strict=True):
        row["name"], row["type"] = name, kind
    return described.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([(b"label", 1), (b"image", 2)], r"its fields are label \(int\), image \(RGB image\)"),
        ([(b"img", 2), (b"target", 1)], r"its fields are img \(RGB image\), target \(int\)"),
        ([(b"image", 2), (b"label", 0)], r"its fields are image \(RGB image\), label \(float\)"),
        (
            [(b"image", 2), (b"label", 1), (b"caption", 5)],
            r"its fields are image \(RGB image\), label \(int\), caption \(JSON\)",
        ),
        ([(b"covariate", 4)], r"its fields are covariate \(array\)"),
    ],
)
def test_files_with_other_fields_are_named_as_such(tmp_path, fields, message):
    header = np.array((beton.VERSION, len(fields), PAGE, 1, 1 << 20), beton.HEADER)
    path = tmp_path / "foreign.beton"
    path.write_bytes(header.tobytes() + describe(*fields) + bytes(5000))
    with pytest.raises(
        DataError, match=rf"^\S* is a file of FFCV's that the recipes do not read: {message}; they read"
    ):
        beton.open_beton(path)


def test_arrays_of_another_type_are_named_as_such(array_file, tmp_path):
    floats = edit(array_file, tmp_path, keep, ours=False)
    floats.write_bytes(floats.read_bytes().replace(b"|u1", b"<f4", 1))
    with pytest.raises(DataError, match=r"do not read: its images are arrays of 3 dimensions and of type b'.*<f4"):
        beton.open_beton(floats)


def move_image(header, metadata, table):
    metadata["image"][0] += 1


def swap_pointers(header, metadata, table):
    metadata["image"][:2] = metadata["image"][1::-1].copy()


def overlap(header, metadata, table):
    table["pointer"][1] = metadata["image"][1] = table["pointer"][0] + 1


def cross_page(header, metadata, table):
    header["page_size"] = PAGE // 2
    table["pointer"][-1] = metadata["image"][-1] = 3 * PAGE // 2 - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_image, "pointer is not in the table"),
        (swap_pointers, "pointer is not in the table"),
        (overlap, "two images overlap"),
        (cross_page, "an image crosses a page"),
    ],
)
def test_damaged_pointers(array_file, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        beton.open_beton(edit(array_file, tmp_path, change))


def set_image(field, value, mode):
    def change(header, metadata, table):
        metadata["image"][field][np.flatnonzero(metadata["image"]["mode"] == mode)[0]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_image("height", 0, beton.JPEG), "an image has no pixels"),
        (set_image("height", 1000, beton.RAW), "has not as many bytes as pixels"),
        (set_image("mode", 2, beton.JPEG), "neither JPEG nor raw"),
        (set_image("mode", beton.RAW, beton.JPEG), "has not as many bytes as pixels"),
        (set_image("pointer", 1, beton.JPEG), "pointer is not in the table"),
    ],
)
def test_damaged_photographs(photograph_file, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        beton.open_beton(edit(photograph_file, tmp_path, change))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"\x09", "it has 2 fields, not all of a name and a type"),
        (1, b"\xe9mage", "it has 2 fields, not all of a name and a type"),
        (1, b"im`ge", r"damaged: its fields are im`ge \(array\), label \(int\)"),
        (17, bytes(8), "its images are of shape"),
    ],
)
def test_damaged_fields(array_file, tmp_path, offset, value, message):
    data = bytearray(array_file.read_bytes())
    start = beton.HEADER.itemsize + offset
    data[start : start + len(value)] = value
    other = tmp_path / "other.beton"
    other.write_bytes(data)
    with pytest.raises(DataError, match=message):
        beton.open_beton(other)


def test_a_listing_changes_with_a_pixel_and_not_with_the_place(array_file, arrays, tmp_path):
    listing = beton.open_beton(array_file).listing()
    (tmp_path / "moved.beton").write_bytes(array_file.read_bytes())
    assert beton.open_beton(tmp_path / "moved.beton").listing() == listing
    write_beton(tmp_path / "again.beton", ArraySource(arrays), page_size=PAGE)
    assert beton.open_beton(tmp_path / "again.beton").listing() == listing
    other = Arrays(arrays.images.copy(), arrays.labels)
    other.images[3, 0, 0, 0] ^= 1
    write_beton(tmp_path / "other.beton", ArraySource(other), page_size=PAGE)
    assert beton.open_beton(tmp_path / "other.beton").listing() != listing


def test_a_listing_of_a_file_without_checksums_changes_with_an_image_of_another_size(photograph_file, tmp_path):
    def smaller(header, metadata, table):
        jpeg = metadata["image"]["mode"] == beton.JPEG
        table["size"][jpeg.argmax()] -= 1

    bare = edit(photograph_file, tmp_path, lambda *parts: None, ours=False)
    listing = beton.open_beton(bare).listing()
    assert beton.open_beton(edit(photograph_file, tmp_path, smaller, ours=False)).listing() != listing
