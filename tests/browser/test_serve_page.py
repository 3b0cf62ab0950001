"""The page of `ocrnet serve` in a real browser, before the real server and a tiny network."""

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest
from serving import TOKEN, Fake, faked, real, write_tiny

import ocrnet
from ocrnet.config import EVAL_SCALES

SIZE = (90, 140)
DROP = """([name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], name, { type: kind }));
  const event = new DragEvent("drop", { dataTransfer: moved, bubbles: true, cancelable: true });
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
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def offline(tiny):
    return ocrnet.load(tiny, engine="torch", device_target="CPU")


@pytest.fixture(scope="module")
def served(tiny):
    with real(tiny) as found:
        yield found


def drop(page, name, kind, data):
    page.evaluate(DROP, [name, kind, base64.b64encode(data).decode()])


def shown(page):
    page.wait_for_selector("#result:not([hidden])")
    page.wait_for_selector("#busy", state="hidden")


def pixels(page, canvas):
    """Return the RGBA of a canvas, as the page sees it."""
    return np.array(page.evaluate(
        f"""() => {{ const c = document.getElementById("{canvas}");
        return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }}"""
    )).reshape(*SIZE, 4)  # fmt: skip


def click(page, x, y):
    box = page.locator("#frame").bounding_box()
    page.mouse.click(box["x"] + (x + 0.5) * box["width"] / SIZE[1], box["y"] + (y + 0.5) * box["height"] / SIZE[0])


def kept(page, button):
    with page.expect_download() as got:
        page.click(button)
    data = Path(got.value.path()).read_bytes()
    return got.value.suggested_filename, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_from_a_dropped_image_to_the_result_kept(open_page, served, offline, image, photo):
    seen = open_page(served.url)
    page = seen.page
    page.wait_for_selector("#network:text-is('OCRNet-HRNet-W4, 5 classes')")
    drop(page, "photo.png", "image/png", photo)
    shown(page)
    found = offline.outputs(image, ("labels", "confidence", "relation"))
    labels = offline.predict(image)

    np.testing.assert_array_equal(pixels(page, "image")[..., :3], image)
    overlay = pixels(page, "overlay")
    assert (overlay[..., 3] > 0).all()
    assert len(np.unique(overlay.reshape(-1, 4), axis=0)) == len(np.unique(labels)) > 1

    def cut():
        return page.evaluate("getComputedStyle(document.getElementById('overlay')).clipPath")

    before = cut()
    page.locator("#slider").fill("80")
    assert cut() != before
    assert page.evaluate("document.getElementById('divider').getBoundingClientRect().x") > 640

    for x, y in ((3, 4), (131, 80), (60, 33)):
        click(page, x, y)
        assert page.inner_text("#chosen strong") == offline.names[labels[y, x]]
        sure = round(float(found["confidence"][y, x]) * 255) / 255
        assert f"Probability {100 * sure:.1f} %, at column {x}, row {y}" == page.inner_text("#confidence")
        rows, columns = found["relation"].shape[1:]
        names, parts = (page.locator(f"#relation {part}").all_inner_texts() for part in (".name", ".name + span"))
        told = dict(zip(names, parts, strict=True))
        for index, name in enumerate(offline.names):
            part = round(float(found["relation"][index, y * rows // SIZE[0], x * columns // SIZE[1]]) * 255) / 255
            assert told[name] == ("< 0.1 %" if part < 0.001 else f"{100 * part:.1f} %")

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

    name, indices = kept(page, "#save-labels")
    assert name == "photo_labels.png"
    assert indices.dtype == np.uint8
    np.testing.assert_array_equal(indices, labels)
    name, picture = kept(page, "#save-overlay")
    assert (name, picture.shape[:2]) == ("photo_overlay.png", SIZE)

    page.check("[name=mode][value=multi]", force=True)
    shown(page)
    np.testing.assert_array_equal(kept(page, "#save-labels")[1], offline.predict(image, EVAL_SCALES, flip=True))
    seen.assert_clean()


def test_an_error_is_told_and_what_was_there_stays(open_page, served, photo):
    seen = open_page(served.url, width=390, dark=True)
    page = seen.page
    drop(page, "letter.txt", "text/plain", b"Dear network,")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "letter.txt: unsupported image format; supported: JPEG, PNG, WebP, BMP."
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    shown(page)
    assert not page.is_visible("#error")
    drop(page, "cut.png", "image/png", photo[:200])
    page.wait_for_selector("#error:not([hidden])")
    assert "cut.png: the image is damaged" in page.inner_text("#error")
    assert page.inner_text("#caption").startswith("photo.png: 140\u00a0×\u00a090")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out of a phone
    assert seen.foreign == []
    assert all("415" in text or "400" in text for text in seen.errors)  # Chromium's own words for such an answer


def test_the_whole_page_is_reached_by_keyboard(open_page, served, photo):
    seen = open_page(served.url)
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.id") == "file"
    seen.page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    shown(seen.page)
    reached = []
    for _ in range(30):
        seen.page.keyboard.press("Tab")
        reached.append(seen.page.evaluate("document.activeElement.id || document.activeElement.name"))
    wanted = ["frame", "slider", "mode", "save-labels", "save-overlay", "all-title"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted
    seen.assert_clean()


def test_a_token_is_asked_for_and_remembered(open_page, photo):
    network = Fake()
    with faked(network, token=TOKEN) as served:
        seen = open_page(served.url)
        seen.page.wait_for_selector("#token-form:not([hidden])")
        assert seen.page.inner_text("#error") == "this server requires a token."
        seen.page.fill("#token", TOKEN)
        seen.page.click("#token-form button")
        seen.page.wait_for_selector("#network:not(:empty)")
        drop(seen.page, "photo.png", "image/png", photo)
        shown(seen.page)
        assert seen.foreign == []
    assert network.batches == [1]
