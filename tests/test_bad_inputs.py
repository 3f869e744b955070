"""Damaged, huge, odd and hostile pictures, names, URLs and models: a result, or a line that says what is wrong."""

import ast
import contextlib
import http.server
import io
import json
import os
import re
import shutil
import ssl
import struct
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import micro_config, run
from huggingface_hub import ModelCard
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from sam3_hf import Sam3LiteModel
from sam3_hf.checkpoints import weight_files
from sam3_hf.data.generated import write_dataset
from sam3_hf.downloads import MAX_REDIRECTS, download, is_public, is_url
from sam3_hf.mapping.calibration import calibrate_mapping
from sam3_hf.plain_text import markdown, markdown_code, plain, python_literal
from sam3_hf.reading import read_image
from sam3_hf.sharing.model_card import model_card, write_card
from sam3_hf.visualization import draw_instances, side_by_side

HOSTILE = [
    "a|b",
    "`rm -rf`",
    "two\nlines",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "**bold** _it_ # head",
    "---\nlicense: mit\n---",
    "{{ 7 * 7 }}{% raw %}",
    '"quoted" \\ \'and\' """more"""',
    "\u202eright to left\u202c",
    "\u05d0\u05d1\u05d2 \u0627\u0644\u0639",
    "\x00\x07\x1b[31m",
    "\ud800 surrogate",
    "\U0001f9a0 \U00020000 \uffff",
    "long " * 2000,
    "   ",
]


def one_line(result) -> str:
    """The error of a command that ended with status 1, and no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.output
    return line


@pytest.fixture
def predict(saved, tmp_path):
    def command(*inputs, output=tmp_path / "out", workers=0):
        options = ["--model", saved, "--output", output, "--threshold", 0, "--max-detections", 2, "--prompt", "cat"]
        return run("predict", *inputs, *options, "--workers", workers)

    return command


def noise(width=40, height=30, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_bytes(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def ascii_orientation() -> bytes:
    entry = struct.pack("<HHI4s", 0x0112, 2, 2, b"6\0\0\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + struct.pack("<I", 0)


def huge_png() -> bytes:
    """13,000 x 13,000 pixels of one bit, a few kilobytes."""
    return as_bytes(Image.new("1", (13_000, 13_000)), "PNG", optimize=True)


def predicted(output: Path) -> set[str]:
    root = output / "predictions"
    found = {path.relative_to(root).as_posix().removesuffix(".json") for path in root.rglob("*") if path.is_file()}
    assert all((root / f"{name}.json").is_file() for name in found)
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_listed_and_the_rest_is_finished(predict, tmp_path, workers):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    good = {
        "plain.png": as_bytes(noise(), "PNG"),
        "cmyk.jpg": as_bytes(noise().convert("CMYK"), "JPEG"),
        "deep.png": as_bytes(Image.fromarray(np.full((20, 20), 60_000, dtype=np.uint16)), "PNG"),
        "palette.png": as_bytes(noise().quantize(4), "PNG", transparency=0),
        "bits.png": as_bytes(Image.new("1", (9, 5)), "PNG"),
        "moving.gif": as_bytes(noise(), "GIF", save_all=True, append_images=[noise(seed=1)]),
        "thin.png": as_bytes(noise(1, 3000), "PNG"),
    }
    bad = {
        "ascii.jpg": (as_bytes(noise(), "JPEG", exif=ascii_orientation()), "orientation is '6'"),
        "avif.avif": (as_bytes(noise(), "AVIF"), "none of the formats BMP"),
        "avif.jpg": (as_bytes(noise(), "AVIF"), "none of the formats BMP"),
        "cut.jpg": (as_bytes(noise(), "JPEG")[:500], "Truncated"),
        "cut.png": (good["plain.png"][:200], "truncated"),
        "empty.png": (b"", "damaged or of none"),
        "eps.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "none of the formats"),
        "huge.png": (huge_png(), "13000 x 13000 pixels, more than 100,000,000"),
        "text.tif": (b"no picture", "damaged or of none"),
    }
    for name, content in [*good.items(), *((name, content) for name, (content, _) in bad.items())]:
        (pictures / name).write_bytes(content)
    limit = Image.MAX_IMAGE_PIXELS
    result = predict(pictures, workers=workers)
    assert result.exit_code == 1 and f"{len(bad)} could not be read" in result.stderr, result.output
    listed = result.stderr.split("could not be read or written:\n")[1].splitlines()
    assert len(listed) == len(bad)
    for name, (_, reason) in bad.items():
        (line,) = [line for line in listed if f"/{name}:" in line]
        assert reason in line
    assert predicted(tmp_path / "out") == set(good)
    assert len(json.loads((tmp_path / "out" / "coco_images.json").read_text())["images"]) == len(good)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_largest_picture_is_a_setting(tmp_path):
    path = tmp_path / "picture.png"
    noise().save(path)
    assert read_image(path, max_pixels=1200).shape == (3, 30, 40)
    with pytest.raises(OSError, match="picture.png: it has 40 x 30 pixels, more than 1,199"):
        read_image(path, max_pixels=1199)


def test_frames_and_pages_beyond_the_first_are_not_dropped_without_a_word(tmp_path, caplog):
    first, second = noise(), noise(seed=1)
    for name in ("moving.png", "pages.tif", "moving.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
        caplog.clear()
        assert np.array_equal(read_image(tmp_path / name).permute(1, 2, 0).numpy(), np.array(first))
        assert name in caplog.text and "the first is used" in caplog.text
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
    caplog.clear()
    read_image(tmp_path / "phone.jpg")
    assert not caplog.text


def test_what_is_no_file_is_listed(predict, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise().save(pictures / "plain.png")
    os.mkfifo(pictures / "pipe.png")
    (pictures / "loop.png").symlink_to("pool.png")
    (pictures / "pool.png").symlink_to("loop.png")
    (pictures / "gone.png").symlink_to("nothing")
    (pictures / "device.png").symlink_to("/dev/zero")
    (pictures / "again").symlink_to(pictures)
    result = predict(pictures, pictures / "loop.png")
    assert result.exit_code == 1 and "5 could not be read" in result.stderr, result.output
    for words in ("pipe.png: it is no file, but a pipe", "no file, but a device", "symbolic links", "No such file"):
        assert words in result.stderr
    assert predicted(tmp_path / "out") == {"plain.png"}


def test_names_that_cannot_be_written(predict, tmp_path):
    pictures = tmp_path / "pictures"
    (pictures / "a.png.json").mkdir(parents=True)
    for name in ("a.png", "a.png.json/b.png", "x" * 246 + ".png", "line\nbreak.png", os.fsdecode(b"\xff.png")):
        noise().save(pictures / name)
    result = predict(pictures)
    assert result.exit_code == 1 and "2 could not be read or written" in result.stderr, result.output
    assert "its name is too long" in result.stderr and "rename the picture" in result.stderr
    assert predicted(tmp_path / "out") == {"a.png", "line\nbreak.png", os.fsdecode(b"\xff.png")}
    again = predict(pictures)  # the one that was written keeps its file
    assert again.exit_code == 1 and "0 pictures were new, 3 done before" in again.output


@pytest.mark.parametrize(
    "content",
    [
        *[b'{"file": "a', b"[]", b"\xff\xfe", b"", b"{}", b'\xef\xbb\xbf{"file": 1}', b"[" * 100_000],
        *["gone", {"size": [30, 40], "counts": "no counts"}, {"size": [30, 40], "counts": "9"}],
        *[{"size": [30, 40], "counts": "\u00e9"}, {"size": [30, 40], "counts": ""}],
    ],
)
def test_a_broken_prediction_is_named_and_made_again(predict, tmp_path, caplog, content):
    noise().save(tmp_path / "a.png")
    assert predict(tmp_path / "a.png").exit_code == 0
    path = tmp_path / "out" / "predictions" / "a.png.json"
    whole = path.read_bytes()
    if not isinstance(content, bytes):
        record = json.loads(whole)
        record["detections"][0]["segmentation"] = content
        content = json.dumps(record).encode()
    path.write_bytes(content)
    result = predict(tmp_path / "a.png")
    assert result.exit_code == 0 and "1 pictures were new" in result.output
    assert str(path) in caplog.text and "predicted again" in caplog.text
    assert path.read_bytes() == whole


def test_a_broken_prediction_of_another_run_is_listed(predict, tmp_path):
    for name in ("a.png", "b.png"):
        noise().save(tmp_path / name)
        assert predict(tmp_path / name).exit_code == 0
    (tmp_path / "out" / "predictions" / "a.png.json").write_text("{")
    result = predict(tmp_path / "b.png")
    assert result.exit_code == 1 and "1 earlier predictions are broken" in result.stderr and "a.png" in result.stderr
    images = json.loads((tmp_path / "out" / "coco_images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["b.png"]


@pytest.mark.parametrize("content", ["[]", "{", '"prompts"', "[" * 100_000, "\ufeff{}"])
def test_broken_settings_are_named(predict, tmp_path, content):
    noise().save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(content, encoding="utf-8")
    assert "settings.json" in one_line(predict(tmp_path / "a.png"))


class PictureServer(http.server.ThreadingHTTPServer):
    """Answers {path: (status, headers, body or its parts)} on 127.0.0.1; a body of None is never sent."""

    daemon_threads = True

    def __init__(self, answers: dict):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.answers, self.asked, self.over = answers, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        status, headers, body = self.server.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body is None:
            self.server.over.wait()
            return
        with contextlib.suppress(OSError):  # whoever asked has left
            for part in [body] if isinstance(body, bytes) else body:
                self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = PictureServer({})
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_a_url_is_read_and_private_ones_only_if_allowed(server):
    body = as_bytes(noise(), "PNG")
    server.answers["/a%20b.png?x=1"] = (200, {"Content-Type": "image/png", "Content-Length": len(body)}, body)
    url = f"{server.url}/a b.png?x=1"
    assert np.array_equal(read_image(url, private_addresses=True).permute(1, 2, 0).numpy(), np.array(noise()))
    assert server.asked == ["/a%20b.png?x=1"]
    localhost = url.replace("127.0.0.1", "localhost")
    for refused in (
        url,
        localhost,
        url.replace("127.0.0.1", "[::ffff:127.0.0.1]"),
        url.replace("127.0.0.1", "2130706433"),
    ):
        with pytest.raises(OSError, match="private address") as caught:
            read_image(refused)
        assert refused in str(caught.value) and "private_addresses=True" in str(caught.value)
    assert len(server.asked) == 1


def test_what_a_server_may_not_do(server):
    body = as_bytes(noise(), "PNG")
    image = {"Content-Type": "image/png"}
    server.answers = {
        "/404": (404, image, b""),
        "/html": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>"),
        "/untyped": (200, {}, body),
        "/gzip": (200, {**image, "Content-Encoding": "gzip"}, body),
        "/said": (200, {**image, "Content-Length": 10**12}, b""),
        "/sent": (200, image, bytes(5000)),
        "/cut": (200, {**image, "Content-Length": len(body)}, body[:-1]),
        "/silent": (200, {**image, "Content-Length": 9}, None),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/nowhere": (302, {}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/ftp": (301, {"Location": "ftp://127.0.0.1/a.png"}, b""),
        "/words": (200, image, b"no picture"),
    }
    reasons = {
        "/404": "answered 404",
        "/html": "text/html",
        "/untyped": "unnamed type",
        "/gzip": "compressed",
        "/said": "1000000000000 bytes, more than 4000",
        "/sent": "more than 4000 bytes",
        "/cut": "connection broke, 1 bytes before the end",
        "/silent": "too long to answer",
        "/loop": f"more than {MAX_REDIRECTS} times",
        "/nowhere": "without saying where",
        "/file": "redirect from http to 'file'",
        "/ftp": "redirect from http to 'ftp'",
    }
    for path, reason in reasons.items():
        with pytest.raises(OSError, match=reason) as caught:
            download(server.url + path, private_addresses=True, max_bytes=4000, timeout=0.5)
        assert server.url + path in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match="/words: it is damaged"):
        read_image(f"{server.url}/words", private_addresses=True)


def test_a_server_that_never_comes_to_an_end_is_left(server, monkeypatch):
    """It sends a byte before every time-out."""

    def drip():
        while not server.over.wait(0.05):
            yield b"x"

    monkeypatch.setattr("sam3_hf.downloads.TOTAL_TIMEOUT", 0.5)
    for headers in ({"Content-Type": "image/png"}, {"Content-Type": "image/png", "Content-Length": 10**6}):
        server.answers["/drip"] = (200, headers, drip())
        with pytest.raises(OSError, match="/drip: it took too long to answer"):
            download(f"{server.url}/drip", private_addresses=True)


def test_https_is_checked(server, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=x", "-addext"]
    command = ["openssl", "req", *options, "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    body = as_bytes(noise(), "PNG")
    server.answers["/a.png"] = (200, {"Content-Type": "image/png"}, body)
    server.answers["/down"] = (302, {"Location": f"{server.url}/a.png"}, b"")
    url = server.url.replace("http:", "https:")
    with pytest.raises(OSError, match="/a.png: .*certificate"):
        download(f"{url}/a.png", private_addresses=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert download(f"{url}/a.png", private_addresses=True) == body
    with pytest.raises(OSError, match="redirect from https to 'http'"):
        download(f"{url}/down", private_addresses=True)


def test_redirects_are_checked_where_they_lead(server, monkeypatch):
    """A server that counts as public here leads to one that does not."""
    body = as_bytes(noise(), "PNG")
    server.answers = {
        "/ok": (302, {"Location": f"http://127.0.0.1:{server.server_port}/there"}, b""),
        "/there": (200, {"Content-Type": "image/png"}, body),
        "/inside": (302, {"Location": f"http://127.0.0.2:{server.server_port}/there"}, b""),
    }
    monkeypatch.setattr("sam3_hf.downloads.is_public", lambda address: address == "127.0.0.1")
    assert download(f"{server.url}/ok") == body
    with pytest.raises(OSError, match=r"/inside \(redirected to http://127.0.0.2.*private address 127.0.0.2"):
        download(f"{server.url}/inside")


def test_the_address_that_was_checked_is_the_one_connected_to(server, monkeypatch):
    """A name that gives another address when it is asked for again does not help."""
    answers = iter(["127.0.0.1", "127.0.0.2"])
    monkeypatch.setattr(
        "socket.getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (next(answers) if host == "x" else host, port))]
    )
    connected = []
    monkeypatch.setattr("socket.create_connection", lambda address, *_: connected.append(address) or 1 / 0)
    monkeypatch.setattr("sam3_hf.downloads.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(ZeroDivisionError):
        download("http://x/a.png")
    assert connected == [("127.0.0.1", 80)]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://127.0.0.1/a.png", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("http://", "names no server"),
        ("http://127.0.0.1:99999/a.png", "[Pp]ort"),
        ("http://[::1/a.png", "Invalid IPv6"),
        ("http://me:secret@127.0.0.1/a.png", "passwords"),
        ("http://127.0.0.1:1/a.png", "private address"),
        ("http://no-such-server.invalid/a.png", "no server"),
        ("http://" + "a" * 70 + "..b/", "no-such|server|label|codec"),
    ],
)
def test_urls_that_cannot_be(url, reason, monkeypatch):
    if "invalid" in url:  # asks no name server
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError(-2, "unknown")))
    assert is_url(url)
    with pytest.raises(OSError, match=reason) as caught:
        read_image(url)
    assert "secret" not in str(caught.value) and "cannot download" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((address, False) for address in ("::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1")),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def changed_config(folder: Path, path: tuple, value) -> None:
    fields = json.loads((folder / "config.json").read_text())
    part = fields
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(fields))


VIT = ("vision_config", "backbone_config")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ((*VIT, "num_hidden_layers"), 10**6, "`vision_config.backbone_config.num_hidden_layers` must be at most 512"),
        ((*VIT, "hidden_size"), 10**400, "`vision_config.backbone_config.hidden_size` must be at most 16,384"),
        (("detr_decoder_config", "num_layers"), 10**6, "`detr_decoder_config.num_layers` must be at most 512"),
        (("text_config", "vocab_size"), 10**9, "`text_config.vocab_size` must be at most 10,000,000"),
        (("text_config", "hidden_act"), "nope", "`text_config.hidden_act`='nope' is no activation"),
        (("text_config", "layer_norm_eps"), float("nan"), "`text_config.layer_norm_eps`=nan"),
        (("text_config", "hidden_size"), "64", "hidden_size"),
        (("vision_config",), 3, "vision_config"),
        (("loss_config",), [1], "config.json has a value that cannot be"),
        (("loss_config", "class_alpha"), "x", "`loss_config.class_alpha` must be a number"),
        (("summary_token",), "yes", "`summary_token` must be true or false"),
        (("dtype",), "float99", "float99"),
    ],
)
def test_configurations_that_cannot_be_are_refused_before_anything_is_built(copied, monkeypatch, path, value, words):
    built = []
    monkeypatch.setattr(Sam3LiteModel, "__init__", lambda *_, **__: built.append(1))
    changed_config(copied, path, value)
    with pytest.raises(ValueError) as caught:
        Sam3LiteModel.from_pretrained(copied)
    source, _, reason = str(caught.value).partition(": ")
    assert source == str(copied) and words in reason and "\n" not in reason and len(reason) < 500
    for command in (["info", copied], ["push", copied, "me/model"]):
        assert f"Error: {copied}: {reason}" == one_line(run(*command))
    assert not built


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no json", "is no JSON"),
        (b"", "is no JSON"),
        (b"[]", "holds a list"),
        (b'\xef\xbb\xbf{"model_type": "sam3_lite"}', "byte order mark"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "no text in UTF-8"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is no JSON"),
    ],
)
def test_a_config_file_that_is_none(copied, tmp_path, content, words):
    noise().save(tmp_path / "a.png")
    (copied / "config.json").write_bytes(content)
    for command in (
        ["info", copied],
        ["predict", tmp_path / "a.png", "--model", copied, "--prompt", "cat", "--output", tmp_path / "out"],
        ["push", copied, "me/model"],
    ):
        line = one_line(run(*command))
        assert "config.json" in line and words in line
    assert not (tmp_path / "out").exists()


def asks(source, folder: Path) -> dict[str, list]:
    """{command: its arguments}, of all that read a model."""
    noise().save(folder / "a.png")
    data = write_dataset(folder / "data", num_train=1, num_valid=1, image_size=64, num_concepts=2)
    return {
        "predict": [folder / "a.png", "--model", source, "--prompt", "cat", "--output", folder / "out"],
        "evaluate": ["--model", source, "--data", data, "--workers", 0],
        "convert": [source, folder / "converted"],
        "info": [source],
    }


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("me/model", "no network: me/model is not on this machine, and HF_HUB_OFFLINE is set"),
        ("no/such/folder", "there is no folder or file no/such/folder, and repositories of the Hub are named"),
        ("./model.pt", "there is no folder or file ./model.pt, and repositories of the Hub are named"),
        ("gated/model", "no access to gated/model: ask for it at https://huggingface.co/gated/model, then log in"),
        ("empty", "empty has neither a config.json nor a .pt file of Meta's"),
    ],
)
def test_a_source_that_is_no_model_is_said_alike_by_all_commands(tmp_path, monkeypatch, source, words):
    def refuse(*_, **__):
        raise GatedRepoError("refused", response=SimpleNamespace(status_code=403, headers={}, request=None))

    if source == "gated/model":
        monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
        monkeypatch.setattr("sam3_hf.errors.HfApi.auth_check", refuse)
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for command, arguments in asks(source, tmp_path).items():
        assert one_line(run(command, *arguments)).startswith(f"Error: {words}"), command
    with pytest.raises(OSError, match=re.escape(words)):
        calibrate_mapping(source)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", b"no weights", "SafetensorError|model.safetensors cannot be read"),
        ("tokenizer.json", b'{"a": 1}', "added_tokens"),
    ],
)
def test_a_model_of_which_a_file_is_damaged_is_named_by_all_commands(copied, tmp_path, name, content, words):
    (copied / name).write_bytes(content)
    for command, arguments in asks(copied, tmp_path).items():
        if (command, name) != ("info", "tokenizer.json"):  # which reads none
            line = one_line(run(command, *arguments))
            assert str(copied) in line and re.search(words, line), command


def test_a_checkpoint_to_resume_from_is_no_model(copied, tmp_path):
    """But for `convert`, which makes one of it."""
    (copied / "trainer_state.json").write_text("{}")
    for command, arguments in asks(copied, tmp_path).items():
        if command in ("predict", "evaluate"):
            line = one_line(run(command, *arguments))
            assert f"{copied} is a checkpoint to resume from, not a model: take the folder final/" in line
            assert f"`sam3-lite convert {copied} FOLDER`" in line


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", 7, "..\\b.safetensors"]
)
def test_an_index_that_points_outside_of_its_folder(copied, shard):
    (copied / "model.safetensors").rename(copied.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"text_projection.bias": shard}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (Sam3LiteModel.from_pretrained, weight_files, model_card):
        with pytest.raises(ValueError, match="model.safetensors.index.json") as caught:
            load(copied)
        assert "do not trust" in str(caught.value) or shard == 7
    one_line(run("info", copied))
    (copied / "model.safetensors.index.json").rename(copied / "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match="pytorch_model.bin.index.json"):
        Sam3LiteModel.from_pretrained(copied, use_safetensors=False)


def test_parts_in_a_folder_of_the_folder_are_found(copied):
    (copied / "parts").mkdir()
    (copied / "model.safetensors").rename(copied / "parts" / "one.safetensors")
    names = dict.fromkeys(Sam3LiteModel(micro_config()).state_dict(), "parts/one.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert weight_files(copied) == [copied / "parts" / "one.safetensors"]


@pytest.mark.parametrize("name", ["mapping_report.json", "provenance.json"])
@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"origin": 7, "totals": 7, "source": [], "strategy": {}}'])
def test_a_damaged_report_is_named(copied, name, content):
    (copied / name).write_text(content)
    assert name in one_line(run("push", copied, "me/model"))


def trained_card(folder: Path, concepts: list[str], dataset_name: str = "mine") -> str:
    """The card of a model in a folder, as if trained on these concepts."""
    dataset = {"name": dataset_name, "hub_id": None, "training images": 3, "concepts": concepts, "has masks": True}
    scores = {"segm_AP": 0.5}
    provenance = {
        "origin": {"base": f"/runs/{dataset_name}", "derived": False},
        "versions": {"sam3-hf": "1"},
        "arguments": {"epochs": 1},
        "steps": 3,
        "epochs": 1,
        "images_per_step": 1,
        "dataset": dataset,
        "best": {"step": 3, "epoch": 1.0, "scores": scores},
    }
    write_card(folder, provenance)
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_are_shown_as_they_are_in_cards(copied, name):
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    plain_card = trained_card(copied, ["plain", "cat"])
    card = trained_card(copied, [name, "cat"], name)
    assert card.count("\n") - plain_card.count("\n") in (0, 1)  # YAML may break a long name, inside of its quotes
    fields, plain_fields = ModelCard(card).data.to_dict(), ModelCard(plain_card).data.to_dict()
    assert fields.keys() == plain_fields.keys() and "license" not in fields
    body, plain_body = (text.split("\n---\n", 1)[1] for text in (card, plain_card))
    tags, plain_tags = (re.findall("<[^>]*>", renderer.render(text)) for text in (body, plain_body))
    assert tags == plain_tags
    (line,) = [line for line in body.splitlines() if line.startswith("phrases = ")]
    phrases = ast.literal_eval(line.removeprefix("phrases = "))
    assert phrases == ([name, "cat"] if len(name) < 100 else ["cat"])
    assert all(character.isprintable() for character in line)
    (concepts,) = [line for line in body.splitlines() if "Concepts: " in line]
    assert len(concepts) < 400 and concepts.endswith(", cat.")


def test_markdown_and_code():
    assert markdown("a|b`c`<b>") == r"a\|b\`c\`&lt;b&gt;"
    assert markdown("red blood cell (1-2)") == "red blood cell (1-2)"
    assert markdown_code("a`b\nc") == "`a'b c`"
    assert plain("a\n\tb\x00\u202ec\ud800") == "a bc\ufffd"
    assert len(plain("x" * 500)) == 80 and plain("x" * 80) == "x" * 80
    for name in HOSTILE:
        assert ast.literal_eval(python_literal(name)) == name


@pytest.mark.parametrize("size", [(40, 30), (1, 3000), (3000, 1)])
def test_names_are_drawn_whatever_they_are(size):
    image = Image.new("RGB", size)
    boxes = [[0, 0, 1, 1]] * len(HOSTILE)
    drawn = draw_instances(image, boxes, labels=HOSTILE, scores=[0.5] * len(HOSTILE))
    assert max(drawn.size) in (512, 1280)
    instances = {"boxes": boxes, "labels": HOSTILE}
    side_by_side(image, {**instances, "scores": [0.5] * len(HOSTILE)}, instances, title=HOSTILE[2] + HOSTILE[-2] * 10)


def test_two_names_that_differ_are_drawn_differently_and_one_line_is_one_line():
    image, box = Image.new("RGB", (90, 90)), [[10, 40, 80, 80]]
    one, two = (draw_instances(image, box, labels=[label]) for label in ("two lines", "two\nlines"))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != draw_instances(image, box, labels=["other"]).tobytes()


def test_names_are_plotted_whatever_they_are(tmp_path):
    from sam3_hf.evaluation.plots import plot_confusion, plot_precision_recall

    names = [*HOSTILE, r"$x^$", r"\frac{"]
    size = len(names) + 1
    curves = {"recall": [0, 1], "precision": {name: [1, 0] for name in names}}
    plot_precision_recall(curves, "title", tmp_path / "curves.png")
    counts = np.ones((size, size), dtype=int).tolist()
    plot_confusion({"counts": counts, "concepts": names}, "title", tmp_path / "confusion.png")
    assert Image.open(tmp_path / "curves.png").size and Image.open(tmp_path / "confusion.png").size
