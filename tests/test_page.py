"""What the page of `sam3-lite demo` computes, without the libraries that show it."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import micro_config, run
from faster_coco_eval import COCO
from PIL import Image, ImageDraw
from test_bad_inputs import HOSTILE

from sam3_hf import Sam3LitePipeline
from sam3_hf.commands.demo import GRADIO
from sam3_hf.data.words import SEEN_PHRASES, UNSEEN_PHRASES
from sam3_hf.exporting.folder import Export
from sam3_hf.exporting.model import ExportedModel, precision_of
from sam3_hf.page import asking, pictures
from sam3_hf.page.asking import DRAWN_BOXES, LOWEST_SCORE, Answer, Finder, as_line, ask, read_prompts
from sam3_hf.page.phrases import split_phrases
from sam3_hf.page.pictures import MAX_EXAMPLES, Picture, as_url, find_examples, open_picture
from sam3_hf.page.results import BOXES, MASKS, as_coco, as_error, colours_of, draw, show
from sam3_hf.prediction.detections import Detections
from sam3_hf.rle import encode_masks

ROOT = Path(__file__).parents[1]
STANDARD = ROOT / "sam3_hf" / "assets" / "tiny-standard"
KNOWN = "star, checkered heart, orange ring, large orange star"


@pytest.fixture(scope="module")
def finder() -> Finder:
    return Finder.open(str(STANDARD), device="cpu")


@pytest.fixture(scope="module")
def example() -> Picture:
    return find_examples(None, None)[0].picture


@pytest.fixture(scope="module")
def answer(finder, example) -> Answer:
    (answer,) = ask([finder], example, KNOWN, [], None)
    return answer


def drawn(*box: float, positive: bool = True) -> dict:
    return {"box": list(box), "positive": positive}


def grey(width: int, height: int, name: str = "grey.png") -> Picture:
    return Picture(name, Path(name), (height, width), torch.full((3, height, width), 128, dtype=torch.uint8))


def squares(labels=("cat", "dog", "cat"), prompts=("cat", "dog", "bird"), name="grey.png", masks=True) -> Answer:
    """Squares of 20 pixels in a picture of 200 x 100, with scores of 0.9, 0.7, 0.5 and so on."""
    count = len(labels)
    pixels = torch.zeros(count, 100, 200, dtype=torch.bool)
    boxes = torch.tensor([[30.0 * index, 40, 30 * index + 20, 60] for index in range(count)])
    for mask, (left, top, right, bottom) in zip(pixels, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    scores, rle = 0.9 - 0.2 * torch.arange(count), encode_masks(pixels) if masks else None
    found = Detections(boxes, scores, list(labels), rle, (100, 200), list(prompts))
    found.best = {label: scores[labels.index(label)].item() if label in labels else 0.002 for label in prompts}
    return Answer("me/model", grey(200, 100, name), found, 0.25, "cpu, fp32")


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data + "\n"

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for own, attributes in self.tags if own == tag]


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(";base64,")[2])


def test_phrases_are_parts_of_a_text():
    assert split_phrases(" red  car,dog;\n dog \n\n,a, b") == ["red car", "dog", "a", "b"]
    assert split_phrases(None) == split_phrases(" ,\n") == []


def test_boxes_are_of_a_phrase_or_a_prompt_of_their_own():
    boxes = [drawn(0.1, 0.2, 0.5, 0.4), drawn(0, 0, 1, 1, positive=False)]
    cat, own = read_prompts("cat", boxes, None, (100, 200))
    assert (cat.label, cat.all_boxes) == ("cat", [])
    assert (own.text, own.label) == (None, DRAWN_BOXES)
    assert own.boxes == [[20, 20, 100, 40]] and own.negative_boxes == [[0, 0, 200, 100]]
    cat, dog = read_prompts("cat, dog", boxes, "dog", (100, 200))
    assert cat.all_boxes == [] and (dog.boxes, dog.negative_boxes) == (own.boxes, own.negative_boxes)
    (cat,) = read_prompts("cat", boxes[1:], "cat", (100, 200))
    assert cat.boxes == [] and cat.negative_boxes


@pytest.mark.parametrize(
    "phrases, boxes, said",
    [
        (" , ", [], "Type a phrase, or draw a box"),
        ("", [drawn(0, 0, 1, 1, positive=False)], "need a phrase, or a box"),
        (", ".join(map(str, range(17))), [], "17 phrases: the page takes 16"),
        ("cat", [drawn(0, 0, 1, 1)] * 33, "33 boxes: the page takes 32"),
        ("cat", [drawn(0.5, 0, 0.5, 1)], "is not left < right"),
        ("cat", [drawn(0, 0, 1, 1.5)], "outside of the picture"),
        ("cat", [drawn(0, 0, 1, float("nan"))], "outside of the picture"),
        ("cat", [drawn(0, 0, 1)], "A box of the page is none"),
        ("cat", [{"box": "abcd", "positive": True}], "A box of the page is none"),
        ("cat", ["box"], "A box of the page is none"),
    ],
)
def test_prompts_that_cannot_be_are_one_line(phrases, boxes, said):
    with pytest.raises(ValueError, match=said) as error:
        read_prompts(phrases, boxes, None, (100, 200))
    assert "\n" not in as_line(error.value)


def test_any_threshold_shows_what_the_pipeline_finds_with_it_and_the_model_runs_once(
    finder, example, answer, monkeypatch
):
    prompts = read_prompts(KNOWN, [], None, example.size)
    expected = {
        threshold: finder.pipe(example.read(), prompts, threshold=threshold, max_detections=asking.MAX_DETECTIONS)
        for threshold in (LOWEST_SCORE, 0.3, 0.6)
    }
    monkeypatch.setattr(finder.pipe.model, "find", None)
    counts = []
    for threshold, found in expected.items():
        shown = answer.above(threshold)
        assert shown.labels == found.labels and shown.rle == found.rle and torch.equal(shown.scores, found.scores)
        table = Elements(show([answer], threshold)).attributes("tr")
        assert len(table) == len(found) + 1
        counts.append(len(found))
    assert counts[0] > counts[1] >= counts[2] > 2


def test_words_and_boxes_find_what_is_drawn(finder, tmp_path):
    image = Image.new("RGB", (96, 96), (150, 150, 140))
    for middle in (24, 72):
        ImageDraw.Draw(image).ellipse((middle - 14, 34, middle + 14, 62), fill=(206, 52, 46))
    image.save(tmp_path / "circles.png")
    picture = open_picture(tmp_path / "circles.png")
    box = drawn(10 / 96, 34 / 96, 38 / 96, 62 / 96)
    (answer,) = ask([finder], picture, "red circle", [box], None)
    found = answer.above(0.3)
    assert found.prompts == ["red circle", DRAWN_BOXES]
    centres = found.boxes[[label == "red circle" for label in found.labels]].reshape(-1, 2, 2).mean(1)
    for middle in (24, 72):
        assert (centres - torch.tensor([middle, 48.0])).abs().max(1).values.min() < 5
    assert answer.error is None and answer.seconds > 0 and answer.computed == "cpu, fp32"


@pytest.mark.parametrize(
    "format, device, dtype, said",
    [
        ("onnx", "cpu", torch.float32, "cpu, int8"),
        ("openvino", "GPU", torch.float32, "GPU, int8"),
        ("openvino", "cpu", torch.bfloat16, "cpu, bf16"),
    ],
)
def test_an_export_says_where_and_in_what_it_computes(format, device, dtype, said):
    facts = {"format": format, "precision": "int8"}
    model = ExportedModel(Export(Path("folder"), facts, micro_config()), device, dtype)
    assert Finder("folder", SimpleNamespace(model=model)).computed == said
    assert precision_of(model, "fp16") == said.split()[-1]


def test_two_models_answer_beside_each_other_and_one_may_fail(finder, example):
    def refuse(*_, **__):
        raise ValueError("'checkered heart' is not in the vocabulary;\nknown are: <b>cat</b>")

    model = SimpleNamespace(config=SimpleNamespace(vocabulary=["cat"]))
    refuse.model = model
    other = Finder("/home/me/outputs/other/final/", refuse)
    assert other.name == "other/final"
    first, second = ask([finder, other], example, "checkered heart", [], None)
    assert (
        len(first.above(0.5)) and second.error == "'checkered heart' is not in the vocabulary; known are: <b>cat</b>"
    )
    html = Elements(show([first, second], 0.5))
    assert [tag for tag, _ in html.tags].count("figure") == 2 and len(html.attributes("img")) == 1
    assert second.error in html.text and "assets/tiny-standard" in html.text
    first, second = ask([finder, finder], example, "checkered heart", [], None)
    assert len(re.findall(r"\d found in .* m?s \(cpu, fp32\)", Elements(show([first, second], 0.5)).text)) == 2


def test_what_nobody_expects_is_a_line_too_and_is_logged(example, caplog):
    def broken(*_, **__):
        raise KeyError("layers")

    broken.model = SimpleNamespace(config=SimpleNamespace(vocabulary=None))
    (answer,) = ask([Finder("m", broken)], example, "cat", [], None)
    assert answer.error == "KeyError: 'layers'" and "Traceback" in caplog.text
    assert "smaller picture" in as_line(torch.OutOfMemoryError("CUDA out of memory"))


def test_without_a_picture_nothing_is_asked():
    with pytest.raises(ValueError, match="There is no picture: upload one"):
        ask([], None, "cat", [], None)


def test_masks_and_boxes_are_drawn_in_the_colours_of_the_phrases():
    answer = squares()
    colours = colours_of(answer.found)
    assert list(colours) == ["cat", "dog", "bird"] and len(set(colours.values())) == 3

    def seen(threshold, layers):
        pixels = np.asarray(draw(answer, threshold, layers))
        assert pixels.shape == (256, 512, 3)  # small pictures are enlarged
        return [int((pixels == colour).all(2).sum()) for colour in colours.values()]

    both, masks, boxes = (seen(0, layers) for layers in ([MASKS, BOXES], [MASKS], [BOXES]))
    assert min(masks[:2]) > 100 and min(boxes[:2]) > 100 and both[2] == 0
    assert both != masks != boxes
    assert seen(0.8, [MASKS])[1] == 0 and 0 < seen(0.8, [MASKS])[0] < masks[0]
    assert seen(0, []) == [0, 0, 0] and seen(0.95, [MASKS, BOXES]) == [0, 0, 0]
    only_boxes = squares(masks=False)
    assert np.array_equal(draw(only_boxes, 0, [MASKS, BOXES]), draw(only_boxes, 0, [BOXES]))


def test_what_was_found_scales_to_the_picture_that_is_shown():
    found = squares().found
    boxes, masks = found.scaled(100, 25)
    assert boxes[1].tolist() == [15, 10, 25, 15] and masks.shape == (3, 25, 100)
    assert [np.argwhere(masks[1]).min(0).tolist(), np.argwhere(masks[1]).max(0).tolist()] == [[10, 15], [14, 24]]
    boxes, masks = squares(masks=False).found.scaled(400, 200)
    assert boxes[1].tolist() == [60, 80, 100, 120] and masks is None


def test_the_legend_says_how_many_and_the_best_score():
    text = Elements(show([squares()], 0.6)).text
    for line in ("2 found in 0.25 s (cpu, fp32)", "1 found, best score 0.90", "1 found, best score 0.70"):
        assert line in text.splitlines()
    assert "none, best score 0.002" in text  # bird
    assert "none, best score 0.70" in Elements(show([squares()], 0.8)).text
    assert "30 40 50 60" in text and "400" in text  # box and pixels of the dog
    assert "pixels of the mask" not in Elements(show([squares(masks=False)], 0.6)).text


def test_downloads_are_the_picture_and_a_coco_dataset(tmp_path):
    answer = squares(name="street.jpg")
    links = Elements(show([answer], 0.6)).attributes("a")
    assert [link["download"] for link in links] == ["street-me-model.png", "street-me-model.json"]
    path = tmp_path / "coco.json"
    path.write_bytes(decoded(links[1]["href"]))
    coco = COCO(str(path))
    assert coco.imgs[1] == {"id": 1, "file_name": "street.jpg", "width": 200, "height": 100}
    assert [category["name"] for category in coco.cats.values()] == ["cat", "dog", "bird"]
    cat, dog = coco.loadAnns(coco.getAnnIds())
    assert (cat["bbox"], dog["bbox"]) == ([0, 40, 20, 20], [30, 40, 20, 20])
    assert dog["area"] == 400 and dog["score"] == pytest.approx(0.7)
    assert np.array_equal(coco.annToMask(dog).astype(bool), answer.found.masks[1])
    boxes = as_coco(squares(masks=False), 0.6)["annotations"]
    assert boxes[0]["area"] == 400 and "segmentation" not in boxes[0]

    image = Image.open(io.BytesIO(decoded(Elements(show([answer], 0.6)).attributes("img")[0]["src"])))
    assert image.format == "PNG" and np.array_equal(image, draw(answer, 0.6))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_phrases_are_no_markup(name):
    harmless = Elements(show([squares()], 0))
    answer = squares([name] * 3, [name, "dog", "bird"], name=name)
    answer.model = name
    elements = Elements(show([answer], 0))
    assert [tag for tag, _ in elements.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(values) for _, values in elements.tags] == [sorted(values) for _, values in harmless.tags]
    assert all(re.fullmatch(r"[\w.-]+", link["download"]) for link in elements.attributes("a"))
    assert [tag for tag, _ in Elements(as_error(name)).tags] == ["p"]
    show([answer], 0).encode()


def as_file(path: Path, width: int, height: int, **options) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, **options)
    return path


def test_an_upload_is_shown_upright_and_small_and_asked_in_full(tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # a quarter turn
    picture = open_picture(as_file(tmp_path / "large.jpg", 1600, 400, exif=orientation))
    assert (picture.name, picture.size) == ("large.jpg", (1600, 400))
    assert picture.shown.shape == (3, 1280, 320) and picture.read().shape == (3, 1600, 400)
    assert Image.open(io.BytesIO(decoded(as_url(picture.shown, 64)))).size == (16, 64)


def test_uploads_are_bounded_and_damaged_ones_are_one_line_without_a_folder(tmp_path, monkeypatch):
    path = as_file(tmp_path / "photo.png", 60, 50)

    def said(**options) -> str:
        with pytest.raises(OSError) as error:
            open_picture(path, **options)
        line = as_line(error.value)
        assert "\n" not in line and str(tmp_path) not in line and "photo.png" in line
        return line

    assert open_picture(path, max_pixels=3000).size == (50, 60)
    assert "60 x 50 pixels, more than 2,999" in said(max_pixels=2999)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "MAX_BYTES", 4000)
        assert "MiB, more than" in said()
    picture = open_picture(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert "cannot decode image photo.png" in said()
    path.write_text("no picture")
    assert "damaged or of none of the formats" in said()
    path.unlink()
    assert said() == "photo.png is not there any more: choose it again"
    with pytest.raises(OSError, match="choose it again"):
        picture.read()
    with pytest.raises(OSError, match="not there any more"):
        open_picture(Path("https://example.org/photo.png"))  # nothing is downloaded


def test_examples_are_drawn_or_of_a_folder(tmp_path, finder):
    examples = find_examples(None, None)
    assert len({example.picture.name for example in examples}) == len(examples) >= 3
    asked = [split_phrases(example.phrases) for example in examples]
    assert asked[0] == split_phrases(KNOWN) and set(chain(*asked)) <= {*SEEN_PHRASES, *UNSEEN_PHRASES}
    assert all({1, 2, 3} == {len(phrase.split()) for phrase in phrases} for phrases in asked)
    assert find_examples(None, ["cat", "dog"])[0].phrases == "cat, dog"
    known = ["salt, pepper", "cats; dogs", "two\nlines", *(f"thing {number}" for number in range(40))]
    words = [prompt.text for prompt in read_prompts(find_examples(None, known)[0].phrases, [], None, (1, 1))]
    assert len(words) > 2 and words == known[3 : 3 + len(words)]
    assert find_examples(None, known[:1])[0].phrases == ""
    for number in range(MAX_EXAMPLES + 1):
        as_file(tmp_path / f"{number:02d}.png", 8, 6)
    names = [example.picture.name for example in find_examples(tmp_path, None)]
    assert names == [f"{number:02d}.png" for number in range(MAX_EXAMPLES)]
    with pytest.raises(ValueError, match="there is no such file and no picture"):
        find_examples(tmp_path / "none", None)


def test_a_model_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        Finder.open(str(tmp_path))


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(Sam3LitePipeline, "from_pretrained", None)  # nothing is loaded before
    result = run("demo", STANDARD)
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ") and f"pip install '{GRADIO}'" in line
    assert f'demo = ["{GRADIO}"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_help_and_the_docs_take_exports_of_the_hub():
    said = " ".join(re.sub(r"[│|*]", " ", run("demo", "--help").output).split())
    assert "Folder or Hub id of a model or of what `export` wrote" in said
    docs = " ".join((ROOT / "docs" / "inference.md").read_text(encoding="utf-8").split())
    assert "a folder or a repository of the Hub, with a model or with what [`sam3-lite export`]" in docs


def test_the_page_is_local_unless_asked(monkeypatch):
    """The command with a stand-in for the module that needs gradio."""
    served = []

    def build_page(*arguments):
        served.append(arguments)
        return SimpleNamespace(block_thread=lambda: None)

    def serve(page, port, share):
        return f"http://127.0.0.1:{port}", "https://public" if share else None

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sam3_hf.page.layout", SimpleNamespace(build_page=build_page, serve=serve))
    monkeypatch.setattr(Finder, "open", lambda model, *_: SimpleNamespace(name=model, vocabulary=None))
    for flags, public in ([], False), (["--share"], True):  # what `serve` makes of it
        result = run("demo", "one", "--compare", "other", "--threshold", 0.4, "--port", 7000, *flags)
        assert result.exit_code == 0 and "at http://127.0.0.1:7000" in result.output
        assert ("https://public" in result.output) == public
        finders, examples, threshold, max_pixels = served.pop()
        assert [finder.name for finder in finders] == ["one", "other"] and len(examples) >= 3
        assert (threshold, max_pixels) == (0.4, pictures.MAX_PIXELS)


@pytest.mark.parametrize(
    "options, names",
    [
        ([], ["me/model", "me/model"]),
        (["--revision", "v1"], ["me/model@v1", "me/model@v1"]),
        (["--revision-b", "v2"], ["me/model", "me/model@v2"]),
        (["--revision", "v1", "--revision-b", "main"], ["me/model@v1", "me/model"]),
    ],
)
def test_two_revisions_of_a_model_have_names_of_their_own(options, names, monkeypatch):
    served = []

    def build_page(finders, *_):
        served.extend(finders)
        return SimpleNamespace(block_thread=lambda: None)

    def from_pretrained(model, revision, **_):
        loaded.append(revision)
        pipe = lambda *_, **__: None  # noqa: E731
        pipe.model = SimpleNamespace(config=SimpleNamespace(vocabulary=None))
        return pipe

    loaded = []
    layout = SimpleNamespace(build_page=build_page, serve=lambda *_, **__: ("http://127.0.0.1:7860", None))
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sam3_hf.page.layout", layout)
    monkeypatch.setattr(Sam3LitePipeline, "from_pretrained", from_pretrained)
    result = run("demo", "me/model", "--compare", "me/model", *options)
    assert result.exit_code == 0, result.output
    assert [finder.name for finder in served] == names
    assert loaded == [name.partition("@")[2] or "main" for name in names]


def test_a_folder_has_no_revision(finder):
    assert Finder(STANDARD.as_posix(), finder.pipe, "v2").name == "assets/tiny-standard"


def test_scores_in_json_are_numbers(answer):
    json.loads(json.dumps(as_coco(answer, 0.3), allow_nan=False))
