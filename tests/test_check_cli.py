"""`sam3-lite check`: what a dataset is, and whether training takes it."""

import json

import numpy as np
import pytest
from data_cases import CATEGORIES, annotation, image, write_coco, write_roboflow
from PIL import Image
from typer.testing import CliRunner

from sam3_hf.cli import app
from sam3_hf.visualization import contact_sheet, instance_colors


def check(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def cells(text: str, first: str) -> list[str]:
    """The words of the line that begins so."""
    return next(line for line in text.splitlines() if line.startswith(first)).split()


def test_a_dataset_is_described(tmp_path):
    result = check(write_roboflow(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}: COCO, 3 classes" in result.output
    assert cells(result.output, "train ")[1:5] == ["4", "1", "8", "8"]  # pictures, of nothing, objects, with mask
    assert "0 / 2 / 4" in result.output and "120x80" in result.output and "22 / 22 / 35 px" in result.output
    assert cells(result.output, "RBC") == ["RBC", "6", "(3)", "6", "(3)"]
    assert cells(result.output, "platelet") == ["platelet", "0", "(0)", "0", "(0)"]
    assert "no faults: training would take it" in result.output


def test_what_training_refuses_is_counted_all_the_same(tmp_path):
    write_coco(tmp_path / "train", [image(1), image(2)], [annotation(1), annotation(2, bbox=[100, 1, 50, 5])])
    result = check(tmp_path)
    assert result.exit_code == 1
    assert cells(result.output, "RBC")[1:] == ["2", "(1)"]
    assert (
        "training would refuse it: " in result.output and "[box out of the image] 1.png, annotation 2" in result.output
    )


def test_no_concept_in_common_is_refused(tmp_path):
    write_coco(tmp_path / "train", [image(1)], [annotation(1)])
    write_coco(tmp_path / "valid", [image(1)], [annotation(1, category_id=7)])
    result = check(tmp_path)
    assert result.exit_code == 1 and "no concept of the validation split (WBC)" in result.output


def test_what_would_be_held_out_is_said(tmp_path):
    write_coco(tmp_path / "train", [image(1), image(2)], [annotation(1)])
    result = check(tmp_path)
    assert result.exit_code == 0
    assert "no validation split: training holds 1 of 2 pictures out (--validation_split 0.1)" in result.output
    write_coco(tmp_path / "train", [image(1)], [annotation(1)])
    result = check(tmp_path)
    assert result.exit_code == 1 and "there is 1 picture" in result.output


def test_nothing_there(tmp_path):
    result = check(tmp_path / "none")
    assert result.exit_code == 1 and result.output.startswith("Error: there is no dataset")
    assert result.output.count("\n") == 1
    (tmp_path / "a.json").write_text("[")
    result = check(tmp_path / "a.json")
    assert result.exit_code == 1 and "a.json is not valid JSON" in result.output


def test_a_contact_sheet_shows_every_class(tmp_path):
    names = ["cat", "dog", "bird"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    images = [image(number) for number in range(1, 41)]
    annotations = [annotation(number, number, int(number == 7) + 2 * int(number == 9)) for number in range(1, 41)]
    write_coco(tmp_path / "data", images, annotations, categories)
    before = sorted((tmp_path / "data").iterdir())
    result = check(tmp_path / "data", "--contact-sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    assert sorted((tmp_path / "data").iterdir()) == before
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 4 * 400 + 16
    pictures = sheet[: 3 * (384 + 40)]
    for color in instance_colors(3):
        assert (np.abs(pictures.astype(int) - color).sum(axis=2) < 30).sum() > 50


def test_a_contact_sheet_of_a_dataset_with_faults(tmp_path):
    file = write_coco(tmp_path, [image(1), image(2)], [annotation(1), annotation(2, bbox="x")], CATEGORIES)
    content = json.loads(file.read_text())
    content["images"].append(image(3))
    file.write_text(json.dumps(content))
    result = check(tmp_path, "--contact-sheet", tmp_path / "sheets" / "sheet.png")
    assert result.exit_code == 1 and "missing image" in result.output and "malformed box" in result.output
    assert Image.open(tmp_path / "sheets" / "sheet.png").width == 2 * 400 + 16  # of the two that are there


def test_pictures_of_a_contact_sheet_lie_in_a_grid():
    pictures = [Image.new("RGB", size, color) for size, color in (((900, 300), "red"), ((20, 50), "blue"))]
    sheet = contact_sheet(pictures, ["first", "second"], {"cat": (1, 2, 3)}, columns=1)
    row = 24 + 128 + 16  # a title, the highest picture, a margin
    assert sheet.size == (416, 2 * row + 16 + 28 + 16)
    assert sheet.getpixel((16 + 100, 16 + 24 + 50)) == (255, 0, 0)  # enough room for 384 x 128 of it
    assert sheet.getpixel((16 + 10, 16 + row + 24 + 20)) == (0, 0, 255)  # small ones stay as they are
    assert contact_sheet(pictures, ["first", "second"], {}, columns=2).size == (816, row + 16)
    with pytest.raises(ValueError, match="strict|longer|shorter"):
        contact_sheet(pictures, ["first"], {})
