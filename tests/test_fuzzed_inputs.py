"""Seeded damage to pictures and model files: each outcome is a result, or one line of an OSError or ValueError."""

import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

from sam3_hf.reading import read_image

FORMATS = {
    "bmp": ("BMP", {}),
    "gif": ("GIF", {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]}),
    "jpg": ("JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
    "png": ("PNG", {}),
    "ppm": ("PPM", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {"lossless": True}),
}
# Values that fields of a JSON file are changed to.
ODD_VALUES = [
    None, True, -1, 0, 1, 3, 10**6, 10**30, 1.5, 1e400, "", "x", "float16", "\ud800", [], [1], ["a"], {}, {"a": 1},
]  # fmt: skip


def picture_bytes(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file_format, options = FORMATS[kind]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def damaged(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Bytes changed (most often in the head), cut off, repeated, left out, or with the head of another file."""
    content = bytearray(content)
    way = rng.choice(["change", "change", "head", "head", "cut", "swap", "insert", "remove"])
    length = len(content)
    if way in ("change", "head"):
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(min(length, 80) if way == "head" else length)] = rng.choice(
                [0, 1, 127, 128, 255, 65]
            )
    elif way == "cut":
        del content[rng.randrange(length) :]
    elif way == "swap":
        head = rng.randrange(1, 60)
        content[:head] = rng.choice(others)[:head]
    elif way == "insert":
        place = rng.randrange(length)
        content[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
    else:
        place = rng.randrange(length)
        del content[place : place + rng.choice([1, 4, 100])]
    return bytes(content)


def read_damaged_pictures(folder: Path, count: int, seed: int) -> Counter:
    """{outcome: how often}; anything but a picture or an OSError of one line is raised."""
    rng, outcomes = random.Random(seed), Counter()
    whole = {kind: picture_bytes(kind) for kind in FORMATS}
    for index in range(count):
        kind = rng.choice(list(FORMATS))
        path = folder / f"{index}.{kind}"
        path.write_bytes(damaged(whole[kind], list(whole.values()), rng))
        try:
            pixels = read_image(path, max_pixels=1_000_000)
        except OSError as error:
            assert str(path) in str(error) and "\n" not in str(error), (index, error)
            outcomes["refused"] += 1
        else:
            assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels.numel()
            outcomes["read"] += 1
        path.unlink()
    return outcomes


def odd_name(rng: random.Random) -> str:
    """A file name of characters that systems, terminals, globs, URLs and JSON treat specially."""
    alphabet = [
        *"ab .%*?[]{}\\'\"`$&;|<>~#:-@+=!\n\t\r\x1b\x07",
        "\u202e",
        "\u0301",
        "\u05d0",
        "\U0001f9a0",
        "\udcff",
        ".json",
    ]
    name = "".join(rng.choice(alphabet) for _ in range(rng.choice([1, 4, 12, 60, 200])))
    return name.encode("utf-8", "surrogateescape")[: rng.choice([20, 240, 251])].decode("utf-8", "surrogateescape")


def changed_somewhere(fields: dict, rng: random.Random) -> dict:
    """A copy with one to three fields, of any depth, changed, deleted, renamed or added."""
    fields = json.loads(json.dumps(fields))
    for _ in range(rng.randint(1, 3)):
        part = fields
        while True:
            nested = [value for value in part.values() if isinstance(value, dict) and value]
            if not nested or rng.random() < 0.3:
                break
            part = rng.choice(nested)
        key = rng.choice(list(part)) if part else "x"
        way = rng.choice(["change", "change", "change", "delete", "rename", "add"])
        if way == "change":
            part[key] = rng.choice(ODD_VALUES)
        elif way == "add":
            part[rng.choice(["x", "num_layers", "hidden_size", "dtype", "model_type"])] = rng.choice(ODD_VALUES)
        else:
            value = part.pop(key, None)
            if way == "rename":
                part[f"{key}_"] = value
    return fields


def damaged_config(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damaged(text.encode(), [b"\xef\xbb\xbf", b"[" * 60, b"\xff\xfe" * 30], rng)
    return json.dumps(changed_somewhere(json.loads(text), rng)).encode()


def outcome_of(result) -> str:
    """ "result" or "refused" of a command; raised is what ended in neither one."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code in (0, 1) and len(lines) <= 1 and "Traceback" not in result.output, result.output
    return "result" if result.exit_code == 0 else "refused"


def predict_with_damaged_configs(saved: Path, folder: Path, count: int, seed: int) -> Counter:
    rng, outcomes = random.Random(seed), Counter()
    Image.open(io.BytesIO(picture_bytes("png"))).save(folder / "a.png")
    copy = Path(shutil.copytree(saved, folder / "copy"))
    text = (copy / "config.json").read_text()
    for index in range(count):
        (copy / "config.json").write_bytes(damaged_config(text, rng))
        output = folder / "out"
        options = ["--model", copy, "--prompt", "cat", "--output", output, "--workers", 0, "--max-detections", 1]
        try:
            outcomes[outcome_of(run("predict", folder / "a.png", *options))] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {index}: {(copy / 'config.json').read_bytes()!r}") from error
        shutil.rmtree(output, ignore_errors=True)
    return outcomes


def predict_odd_names(saved: Path, folder: Path, count: int, seed: int) -> Counter:
    """One run over pictures of odd names, of which some are damaged; each is predicted or listed on a line."""
    rng = random.Random(seed)
    pictures = folder / "pictures"
    pictures.mkdir()
    whole = picture_bytes("png")
    for _ in range(count):
        name = odd_name(rng).replace("\0", "").strip("/") or "x"
        content = whole if rng.random() < 0.7 else damaged(whole, [b"GIF89a" * 20], rng)
        path = pictures / f"{name}.png"
        if len(path.name.encode("utf-8", "surrogateescape")) <= 255:
            path.write_bytes(content)
    output = folder / "out"
    options = ["--model", saved, "--prompt", "cat", "--output", output, "--workers", 0, "--max-detections", 1]
    result = run("predict", pictures, *options, "--overlays", "--batch-size", 8)
    outcome_of(result)
    _, _, tail = result.stderr.partition("could not be read or written:\n")
    listed = len(tail.splitlines())
    done = len([path for path in (output / "predictions").rglob("*") if path.is_file()])
    assert done + listed == len(list(pictures.iterdir()))
    return Counter(result=done, refused=listed)


def test_damaged_pictures(tmp_path):
    outcomes = read_damaged_pictures(tmp_path, 60, seed=0)
    assert min(outcomes["read"], outcomes["refused"]) > 10


def test_damaged_configs(saved, tmp_path):
    outcomes = predict_with_damaged_configs(saved, tmp_path, 12, seed=0)
    assert outcomes["refused"] > 4


def test_odd_names(saved, tmp_path):
    outcomes = predict_odd_names(saved, tmp_path, 20, seed=0)
    assert outcomes["result"] > 5


@pytest.mark.slow
def test_many_damaged_pictures(tmp_path, capsys):
    outcomes = read_damaged_pictures(tmp_path, 3000, seed=1)
    with capsys.disabled():
        print(f"\n3000 damaged pictures: {dict(outcomes)}")  # noqa: T201


@pytest.mark.slow
def test_many_damaged_configs(saved, tmp_path, capsys):
    outcomes = predict_with_damaged_configs(saved, tmp_path, 300, seed=1)
    with capsys.disabled():
        print(f"\n300 damaged configs: {dict(outcomes)}")  # noqa: T201


@pytest.mark.slow
def test_many_odd_names(saved, tmp_path, capsys):
    outcomes = predict_odd_names(saved, tmp_path, 300, seed=1)
    with capsys.disabled():
        print(f"\n300 odd names: {dict(outcomes)}")  # noqa: T201
