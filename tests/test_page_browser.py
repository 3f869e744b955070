"""The page of `sam3-lite demo` in a browser: load, type, draw, see masks."""

import base64
import io
import json
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page in a browser needs gradio: pip install gradio")
if browser.PROGRAM is None:
    pytest.skip("the page in a browser needs chromium: apt-get install chromium", allow_module_level=True)

from sam3_hf.data.films import draw_film
from sam3_hf.page.asking import Finder
from sam3_hf.page.layout import build_page, serve
from sam3_hf.page.pictures import ASSETS, MAX_BYTES, find_examples
from sam3_hf.visualization import instance_colors

STANDARD = Path(__file__).parents[1] / "sam3_hf" / "assets" / "tiny-standard"
MAX_PIXELS = 500 * 500
FOUND = "document.querySelectorAll('#results figure').length"


class Recorder(Finder):
    """Keeps what the model was asked."""

    asked: list = []

    def ask(self, picture, pixels, prompts):
        self.asked.append(prompts)
        return super().ask(picture, pixels, prompts)


@pytest.fixture(scope="module")
def finder():
    return Recorder.open(str(STANDARD), device="cpu")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads):
    with browser.Browser((1280, 1000), downloads) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(finder):
    page = build_page([finder, finder], find_examples(None, None), 0.3, MAX_PIXELS)
    yield serve(page)[0]
    page.close()


@pytest.fixture
def page(chromium, address, finder):
    finder.asked.clear()
    chromium.go(address)
    chromium.wait("!!document.querySelector('#find') && !!document.querySelector('#examples img')")
    return chromium


def upload(page, path: Path):
    page.wait("!!document.querySelector('#upload input[type=file]')")
    page.choose_file("#upload input[type=file]", path)


def wait_for_picture(page):
    page.wait("document.querySelector('#canvas img').naturalWidth > 0")


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_upload_type_and_see_masks(page, finder, downloads):
    upload(page, sorted(ASSETS.glob("*.jpg"))[0])
    wait_for_picture(page)
    page.type("#phrases textarea, #phrases input", "checkered heart, orange ring")
    page.click("#find")
    page.wait(f"{FOUND} == 2")
    (asked, other) = finder.asked
    assert [prompt.text for prompt in asked] == ["checkered heart", "orange ring"] and other == asked
    legend = page.evaluate("document.querySelector('#results .sam3-legend').innerText")
    assert "checkered heart" in legend and "orange ring" in legend and "found, best score" in legend
    assert "cpu, fp32" in page.evaluate("document.querySelector('#results figcaption').innerText")
    drawn = pixels(page.evaluate("document.querySelector('#results figure img').src"))
    for colour in instance_colors(2):
        assert (drawn == colour).all(2).sum() > 100

    rows = "document.querySelector('#results figure').querySelectorAll('tr').length"
    before = page.evaluate(rows)
    page.type("#threshold input[type=number]", "0.95")
    page.press("Enter", 13)
    page.wait(f"{rows} < {before}")
    assert len(finder.asked) == 2  # the models were not asked again

    page.click("#results nav a")
    while not (files := list(downloads.glob("*.png"))):
        page.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert Image.open(files[0]).size == tuple(drawn.shape[1::-1])
    coco = page.evaluate("document.querySelector('#results nav a:last-child').href")
    assert json.loads(base64.b64decode(coco.partition(",")[2]))["categories"][1]["name"] == "orange ring"


def test_draw_boxes_on_an_example(page, finder):
    page.click("#examples button:nth-of-type(2)")
    wait_for_picture(page)
    assert "dotted crescent" in page.wait("document.querySelector('#phrases textarea, #phrases input').value")
    page.type("#phrases textarea, #phrases input", "ring")
    page.drag("#canvas svg", (0.25, 0.5), (0.5, 0.75))
    page.wait("document.querySelectorAll('#canvas rect').length == 2")  # one is what is being drawn
    page.click("#canvas [data-do=other]")
    page.drag("#canvas svg", (0.9, 0.9), (0.7, 0.6))
    page.wait("document.querySelectorAll('#canvas rect.sam3-other').length == 1")
    page.drag("#canvas svg", (0.1, 0.1), (0.2, 0.2))
    page.wait("document.querySelectorAll('#canvas rect').length == 4")
    page.click("#canvas [data-do=undo]")
    page.wait("document.querySelectorAll('#canvas rect').length == 3")
    page.click("#find")
    page.wait(f"{FOUND} == 2")
    words, boxes = finder.asked[0]
    height, width = find_examples(None, None)[1].picture.size
    assert words.text == "ring" and not words.all_boxes
    parts = np.array(boxes.all_boxes) / [width, height, width, height]
    np.testing.assert_allclose(parts, [[0.25, 0.5, 0.5, 0.75], [0.7, 0.6, 0.9, 0.9]], atol=0.01)
    assert (len(boxes.boxes), len(boxes.negative_boxes)) == (1, 1)
    assert "drawn boxes" in page.evaluate("document.querySelector('#results .sam3-legend').innerText")

    page.click("#of input")
    page.wait("document.querySelectorAll('[role=option]').length == 2")
    page.click("[role=option]:nth-of-type(2)")
    page.click("#find")
    page.wait("!document.querySelector('#results .sam3-legend').innerText.includes('drawn boxes')")
    (one,) = finder.asked[-1]
    assert (one.text, one.boxes, one.negative_boxes) == ("ring", boxes.boxes, boxes.negative_boxes)


def test_what_goes_wrong_is_a_line_in_the_page(page, tmp_path):
    page.click("#find")
    said = "document.querySelector('#status .sam3-error')?.innerText"
    assert page.wait(said) == "There is no picture: upload one, or take an example."
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    upload(page, tmp_path / "damaged.png")
    line = page.wait(f"{said}?.includes('damaged.png') && {said}")
    assert line.startswith("cannot decode image damaged.png") and "\n" not in line
    page.click("#examples button")
    wait_for_picture(page)
    page.wait(f"!({said})")
    page.type("#phrases textarea, #phrases input", " ")
    page.click("#find")
    assert "Type a phrase" in page.wait(said)


def test_uploads_are_bounded_by_the_server(page):
    send = "fetch('/gradio_api/upload', {method: 'POST', body: form}).then((answer) => answer.status)"
    form = "const form = new FormData(); form.append('files', new Blob([new Uint8Array(%d)]), 'a.png')"
    statuses = [page.evaluate(f"(() => {{ {form % size}; return {send}; }})()") for size in (1000, MAX_BYTES + 1)]
    assert statuses == [200, 413]


def test_a_port_that_is_taken_is_said(finder, address):
    port = int(address.strip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"port {port} is taken: choose another --port"):
        serve(build_page([finder], [], 0.3, MAX_PIXELS), port=port)


def test_nothing_is_asked_of_others(page, address):
    assert address.startswith("http://127.0.0.1:")
    assert len(page.requested) > 10
    assert [url for url in page.requested if not url.startswith((address, "data:", "blob:", "about:"))] == []


def test_a_clip_is_followed_in_its_tab(page, tmp_path):
    pytest.importorskip("av", reason="needs PyAV, of the extra `video`")
    pytest.importorskip("trackers", reason="needs trackers, of the extra `video`")
    from sam3_hf.tracking.drawing import FilmWriter

    writer = FilmWriter(tmp_path / "clip.mp4", 15)
    for picture, _ in draw_film(0, num_frames=4):
        writer.add(Image.fromarray(picture))
    writer.close()
    page.evaluate(
        "[...document.querySelectorAll('[role=tab]')].find((tab) => tab.textContent.includes('Clips')).click()"
    )
    page.wait("!!document.querySelector('#clip input[type=file]')")
    page.choose_file("#clip input[type=file]", tmp_path / "clip.mp4")
    page.wait("document.querySelector('#clip').textContent.includes('clip.mp4')")
    page.type("#clip-phrases textarea", "red circle")
    page.click("#follow")
    page.wait("document.querySelector('#clip-status').textContent.includes('4 frames')")
    page.wait("document.querySelector('#film video')?.readyState > 0")
