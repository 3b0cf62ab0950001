"""Image files: every format is read as RGB or class ids, and a damaged file is refused with its path."""

import io
import threading
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from ocrnet.data import image_io
from ocrnet.data.image_io import image_size, read_image, read_label, write_png
from ocrnet.utils.errors import OcrnetError

RNG = np.random.default_rng(0)
IMAGE = cv2.GaussianBlur(RNG.integers(0, 256, (24, 40, 3), np.uint8), (5, 5), 0)
IDS = RNG.integers(0, 16, (24, 40), np.uint8)


def encoded(kind: str, array=IMAGE, mode=None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def stored(tmp_path, data: bytes, name="file.png"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_a_written_png_is_read_back(tmp_path):
    write_png(tmp_path / "new/folders/rgb.png", IMAGE)
    write_png(tmp_path / "gray.png", IDS)
    image, label = read_image(tmp_path / "new/folders/rgb.png"), read_label(str(tmp_path / "gray.png"))
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(label, IDS)
    assert image.dtype == label.dtype == np.uint8
    # Pillow agrees that the file holds R, G, B in this order.
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new/folders/rgb.png")), IMAGE)


def test_a_large_png_is_written_in_small_chunks(tmp_path):
    noise = RNG.integers(0, 256, (1500, 2000, 3), np.uint8)
    write_png(tmp_path / "a.png", noise)
    data, position, longest = (tmp_path / "a.png").read_bytes(), 8, 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        longest, position = max(longest, length), position + 12 + length
    assert longest == 2**20
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), noise)


def test_every_kind_of_image_becomes_8_bit_rgb(tmp_path):
    gray = IMAGE[..., 0]
    for mode in ("L", "1", "P", "RGBA", "LA"):
        source = Image.fromarray(IMAGE).convert(mode)
        source.save(tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(read_image(tmp_path / f"{mode}.png"), np.asarray(source.convert("RGB")), mode)
    deep = IMAGE.astype(np.uint16) * 257
    assert cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    assert cv2.imwrite(str(tmp_path / "deepgray.png"), deep[..., 0])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), IMAGE)
    np.testing.assert_array_equal(read_image(tmp_path / "deepgray.png"), np.stack([gray] * 3, -1))


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_an_opencv_without_an_rgb_flag_gives_the_same_image(tmp_path, monkeypatch, kind, upright):
    turned = Image.Exif()
    turned[0x112] = 6
    for mode in ("RGB", "L", "CMYK") if kind == "JPEG" else ("RGB", "L", "RGBA"):
        path = stored(tmp_path, encoded(kind, mode=mode, exif=turned))
        direct = read_image(path, upright=upright)
        monkeypatch.setattr(image_io, "_COLORS", cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(read_image(path, upright=upright), direct)
        monkeypatch.undo()


def test_the_size_is_read_without_decoding(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP"):
        assert image_size(stored(tmp_path, encoded(kind))) == (24, 40)
    with pytest.raises(OcrnetError, match="does not exist"):
        image_size(tmp_path / "none.png")
    with pytest.raises(OcrnetError, match=r"file\.png is damaged or not an image"):
        image_size(stored(tmp_path, b"no image"))


def test_transparent_pixels_keep_their_color(tmp_path):
    transparent = np.dstack([IMAGE, np.zeros(IMAGE.shape[:2], np.uint8)])
    np.testing.assert_array_equal(read_image(stored(tmp_path, encoded("PNG", transparent))), IMAGE)


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_read(tmp_path, kind):
    read = read_image(stored(tmp_path, encoded(kind, quality=95), f"file.{kind.lower()}"))
    assert read.shape == IMAGE.shape
    assert np.abs(read.astype(int) - IMAGE).mean() < 6


def test_exif_orientation_is_ignored(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by 90 degrees
    read = read_image(stored(tmp_path, encoded("JPEG", quality=95, exif=turned), "turned.jpg"))
    assert read.shape == IMAGE.shape


def test_data_that_a_camera_appends_to_a_jpeg_is_ignored(tmp_path):
    whole = encoded("JPEG")
    read = read_image(stored(tmp_path, whole + b"appended by a camera", "file.jpg"))
    np.testing.assert_array_equal(read, read_image(stored(tmp_path, whole, "whole.jpg")))


@pytest.mark.parametrize("read", [read_image, read_label])
def test_missing_empty_and_other_files_are_refused_with_their_path(tmp_path, read):
    for data, message in (
        (None, "does not exist"),
        (b"", "is empty"),
        (b"no image at all", "is damaged or not an image"),
    ):
        path = tmp_path / "the_file.png" if data is None else stored(tmp_path, data, "the_file.png")
        with pytest.raises(OcrnetError, match=f"the_file.png {message}"):
            read(path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OcrnetError, match=r"folder.png cannot be read"):
        read(tmp_path / "folder.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_truncated_images_are_refused(tmp_path, kind):
    whole = encoded(kind)
    read_image(stored(tmp_path, whole, "whole"))
    for cut in (1, 2, 3, 4, 8, 12, 13, 40, 200, len(whole) // 2, len(whole) - 20):
        with pytest.raises(OcrnetError, match="the_cut_one"):
            read_image(stored(tmp_path, whole[:-cut], "the_cut_one"))


def test_truncated_and_altered_labels_are_refused(tmp_path):
    whole = encoded("PNG", IDS)
    for cut in (1, 4, 12, 13, 40, len(whole) // 2):
        with pytest.raises(OcrnetError, match=r"the_label.*truncated"):
            read_label(stored(tmp_path, whole[:-cut], "the_label"))
    for position in range(8, len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        with pytest.raises(OcrnetError, match="the_label"):
            read_label(stored(tmp_path, bytes(altered), "the_label"))


def test_an_altered_png_image_is_refused(tmp_path):
    whole = encoded("PNG")
    for position in range(0, len(whole), 7):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        with pytest.raises(OcrnetError, match="the_image"):
            read_image(stored(tmp_path, bytes(altered), "the_image"))


def test_labels_are_ids_as_stored(tmp_path):
    palette = Image.frombytes("P", (40, 24), IDS.tobytes())
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_label(tmp_path / "palette.png"), IDS)
    Image.fromarray(IDS % 2 == 1).save(tmp_path / "one_bit.png")
    np.testing.assert_array_equal(read_label(tmp_path / "one_bit.png"), IDS % 2)
    Image.fromarray(IDS.astype(np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_label(tmp_path / "deep.png"), IDS)
    np.testing.assert_array_equal(read_label(stored(tmp_path, gray_png(IDS, bits=4))), IDS)
    np.testing.assert_array_equal(read_label(stored(tmp_path, gray_png(IDS % 4, bits=2))), IDS % 4)


def gray_png(ids: np.ndarray, *, bits: int) -> bytes:
    """Return a gray PNG of 2 or 4 bits: Pillow writes none, so this removes the palette from a PNG with one."""
    image = Image.frombytes("P", ids.shape[::-1], ids.tobytes())
    image.putpalette([0, 0, 0] * 2**bits)
    file = io.BytesIO()
    image.save(file, "PNG", bits=bits)
    data = bytearray(file.getvalue())
    assert data[24:26] == bytes([bits, 3])
    data[25] = 0  # color type gray
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    begin = data.index(b"PLTE") - 4
    del data[begin : begin + 12 + 3 * 2**bits]
    return bytes(data)


def test_colored_lossy_and_too_deep_labels_are_refused(tmp_path):
    for mode in ("RGB", "RGBA", "LA"):
        path = stored(tmp_path, encoded("PNG", mode=mode), f"{mode}.png")
        with pytest.raises(OcrnetError, match=f"{mode}.png has mode {mode}; a label is a one-channel PNG"):
            read_label(path)
    with pytest.raises(OcrnetError, match=r"lossy.png is a JPEG, which changes ids"):
        read_label(stored(tmp_path, encoded("JPEG", IDS), "lossy.png"))
    path = stored(tmp_path, encoded("PNG", IDS.astype(np.uint16) * 100), "deep.png")
    with pytest.raises(OcrnetError, match=r"deep.png holds values from 0 to 1500"):
        read_label(path)


def test_a_file_is_complete_at_any_moment_of_writing(tmp_path):
    path = tmp_path / "label.png"
    big = [np.full((200, 300), value, np.uint8) for value in (1, 2)]
    write_png(path, big[0])
    threads = [threading.Thread(target=lambda: [write_png(path, array) for array in big * 20]) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert np.ptp(read_label(path)) == 0
    for thread in threads:
        thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["label.png"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OcrnetError, match=r"taken/label.png cannot be written"):
        write_png(tmp_path / "taken" / "label.png", IDS)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OcrnetError, match=r"folder.png cannot be written"):
        write_png(tmp_path / "folder.png", IDS)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.png", "taken"]
