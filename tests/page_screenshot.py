"""
The picture of the page in the README, as a browser shows it.

    python tests/page_screenshot.py docs/page.png
"""

import io
import sys
import tempfile
from pathlib import Path

from browser import Browser
from PIL import Image

from sam3_hf.page.asking import Finder
from sam3_hf.page.layout import build_page, serve
from sam3_hf.page.pictures import MAX_PIXELS, find_examples

STANDARD = Path(__file__).parents[1] / "sam3_hf" / "assets" / "tiny-standard"
SIZE = (1120, 840)
COLOURS = 255  # of the file, which stays small


def main(target: str):
    page = build_page([Finder.open(str(STANDARD), device="cpu")], find_examples(None, None), 0.5, MAX_PIXELS)
    address, _ = serve(page)
    with tempfile.TemporaryDirectory() as folder, Browser(SIZE, Path(folder)) as browser:
        browser.go(address)
        browser.wait("!!document.querySelector('#examples img') && !!document.querySelector('#find')")
        browser.click("#examples button")
        browser.wait("document.querySelector('#canvas img').naturalWidth > 0")
        browser.click("#find")
        browser.wait("document.querySelectorAll('#results figure').length == 1")
        browser.evaluate("document.querySelector('#results img').decode()")
        picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    picture.quantize(COLOURS, Image.Quantize.FASTOCTREE).save(target, optimize=True)
    page.close()


if __name__ == "__main__":
    main(sys.argv[1])
