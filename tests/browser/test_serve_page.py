"""The page of `ocrnet serve` in a browser, with a tiny network."""

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest
from serving import TOKEN, FakeNetwork, fake_server, real_server, write_checkpoint

import ocrnet
from ocrnet.config import EVAL_SCALES

SIZE = (90, 140)
DROP = """([name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: kind }));
  const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.getElementById("drop").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def image():
    small = np.random.default_rng(5).integers(0, 256, (12, 18, 3), np.uint8)
    return cv2.resize(small, SIZE[::-1], interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def photo(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def offline(tiny):
    return ocrnet.load(tiny, engine="torch", device_target="CPU")


@pytest.fixture(scope="module")
def served(tiny):
    with real_server(tiny) as running:
        yield running


def drop(page, name, kind, data):
    page.evaluate(DROP, [name, kind, base64.b64encode(data).decode()])


def wait_for_result(page):
    page.wait_for_selector("#result:not([hidden])")
    page.wait_for_selector("#busy", state="hidden")


def pixels(page, canvas):
    """Return the RGBA values of a canvas."""
    return np.array(page.evaluate(
        f"""() => {{ const c = document.getElementById("{canvas}");
        return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }}"""
    )).reshape(*SIZE, 4)  # fmt: skip


def click(page, x, y):
    box = page.locator("#frame").bounding_box()
    page.mouse.click(box["x"] + (x + 0.5) * box["width"] / SIZE[1], box["y"] + (y + 0.5) * box["height"] / SIZE[0])


def saved_file(page, button):
    with page.expect_download() as download:
        page.click(button)
    data = Path(download.value.path()).read_bytes()
    return download.value.suggested_filename, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_a_dropped_image_is_predicted_explained_and_saved(open_page, served, offline, image, photo):
    watched = open_page(served.url)
    page = watched.page
    page.wait_for_selector("#network:text-is('OCRNet-HRNet-W4, 5 classes')")
    drop(page, "photo.png", "image/png", photo)
    wait_for_result(page)
    outputs = offline.outputs(image, ("labels", "confidence", "relation"))
    labels = offline.predict(image)

    np.testing.assert_array_equal(pixels(page, "image")[..., :3], image)
    overlay = pixels(page, "overlay")
    assert (overlay[..., 3] > 0).all()
    assert len(np.unique(overlay.reshape(-1, 4), axis=0)) == len(np.unique(labels)) > 1

    def clip_path():
        return page.evaluate("getComputedStyle(document.getElementById('overlay')).clipPath")

    before = clip_path()
    page.locator("#slider").fill("80")
    assert clip_path() != before
    assert page.evaluate("document.getElementById('divider').getBoundingClientRect().x") > 640

    for x, y in ((3, 4), (131, 80), (60, 33)):
        click(page, x, y)
        assert page.inner_text("#chosen strong") == offline.names[labels[y, x]]
        confidence = round(float(outputs["confidence"][y, x]) * 255) / 255
        assert f"Probability {100 * confidence:.1f} %, at column {x}, row {y}" == page.inner_text("#confidence")
        rows, columns = outputs["relation"].shape[1:]
        names, parts = (page.locator(f"#relation {part}").all_inner_texts() for part in (".name", ".name + span"))
        shown_relation = dict(zip(names, parts, strict=True))
        for index, name in enumerate(offline.names):
            part = round(float(outputs["relation"][index, y * rows // SIZE[0], x * columns // SIZE[1]]) * 255) / 255
            assert shown_relation[name] == ("< 0.1 %" if part < 0.001 else f"{100 * part:.1f} %")

    page.focus("#frame")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#chosen strong") == offline.names[labels[32, 70]]
    assert page.inner_text("#confidence").endswith("at column 70, row 32")

    page.click("#relation li:first-child button")
    assert page.is_visible("#heat")
    page.click("#relation li:first-child button")
    assert not page.is_visible("#heat")
    names = page.locator("#legend .name").all_inner_texts()
    counts = np.bincount(labels.reshape(-1), minlength=5)
    assert names == [offline.names[i] for i in np.argsort(-counts, kind="stable") if counts[i]]

    name, indices = saved_file(page, "#save-labels")
    assert name == "photo_labels.png"
    assert indices.dtype == np.uint8
    np.testing.assert_array_equal(indices, labels)
    name, overlay_saved = saved_file(page, "#save-overlay")
    assert (name, overlay_saved.shape[:2]) == ("photo_overlay.png", SIZE)

    page.check("[name=mode][value=multi]", force=True)
    wait_for_result(page)
    np.testing.assert_array_equal(saved_file(page, "#save-labels")[1], offline.predict(image, EVAL_SCALES, flip=True))
    watched.assert_clean()


def test_an_error_is_shown_and_the_previous_result_stays(open_page, served, photo):
    watched = open_page(served.url, width=390, dark=True)
    page = watched.page
    drop(page, "letter.txt", "text/plain", b"not an image")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "letter.txt: unsupported image format; supported: JPEG, PNG, WebP, BMP."
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    wait_for_result(page)
    assert not page.is_visible("#error")
    drop(page, "cut.png", "image/png", photo[:200])
    page.wait_for_selector("#error:not([hidden])")
    assert "cut.png: the image is damaged" in page.inner_text("#error")
    assert page.inner_text("#caption").startswith("photo.png: 140\u00a0×\u00a090")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing overflows a phone
    assert watched.foreign == []
    assert all("415" in text or "400" in text for text in watched.errors)  # Chromium logs each 4xx response as an error


def test_all_controls_are_reached_by_keyboard(open_page, served, photo):
    watched = open_page(served.url)
    watched.page.keyboard.press("Tab")
    assert watched.page.evaluate("document.activeElement.id") == "file"
    watched.page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    wait_for_result(watched.page)
    focused = []
    for _ in range(30):
        watched.page.keyboard.press("Tab")
        focused.append(watched.page.evaluate("document.activeElement.id || document.activeElement.name"))
    expected = ["frame", "slider", "mode", "save-labels", "save-overlay", "all-title"]
    assert [name for name in dict.fromkeys(focused) if name in expected] == expected
    watched.assert_clean()


def test_the_page_asks_for_the_token_once(open_page, photo):
    network = FakeNetwork()
    with fake_server(network, token=TOKEN) as served:
        watched = open_page(served.url)
        watched.page.wait_for_selector("#token-form:not([hidden])")
        assert watched.page.inner_text("#error") == "this server requires a token."
        watched.page.fill("#token", TOKEN)
        watched.page.click("#token-form button")
        watched.page.wait_for_selector("#network:not(:empty)")
        drop(watched.page, "photo.png", "image/png", photo)
        wait_for_result(watched.page)
        assert watched.foreign == []
    assert network.batches == [1]
