"""Clips in the page of `sam3-lite demo`, without a browser."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from sam3_hf import Sam3LitePipeline
from sam3_hf.data.films import draw_film
from sam3_hf.page import clips
from sam3_hf.page.asking import Finder
from sam3_hf.page.clips import follow_clip

pytestmark = pytest.mark.skipif(None in map(find_spec, ("av", "trackers")), reason="needs the extra `video`")


@pytest.fixture
def finder(saved) -> Finder:
    """A model of random weights, whose scores are all the same."""
    return Finder("me/model", Sam3LitePipeline.from_pretrained(saved, device="cpu"))


@pytest.fixture
def clip(tmp_path) -> Path:
    from sam3_hf.tracking.drawing import FilmWriter

    path = tmp_path / "uploads" / "clip.mp4"
    path.parent.mkdir()
    writer = FilmWriter(path, 15)
    for picture, _ in draw_film(0, num_frames=5, image_size=64, num_objects=2):
        writer.add(Image.fromarray(picture))
    writer.close()
    return path


def frames_in(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_clip_is_followed(finder, clip, tmp_path, monkeypatch):
    film, said = follow_clip(finder, clip, "cat, <b>dog</b>", 0.01, tmp_path / "all")
    assert frames_in(film) == 5 and "5 frames" in said
    assert said.count(" followed</small>") == 2 and "&lt;b&gt;dog" in said and "<b>" not in said
    monkeypatch.setattr(clips, "MAX_FRAMES", 3)
    film, said = follow_clip(finder, clip, "cat", 0.95, tmp_path / "some")
    assert frames_in(film) == 3 and "3 frames" in said and "none, best score 0." in said


def test_what_is_wrong_with_a_clip_is_said_without_its_folder(finder, clip, tmp_path):
    damaged = clip.with_name("damaged.mp4")
    damaged.write_bytes(b"none")
    for path, phrases, message in (
        (None, "cat", "There is no clip"),
        (clip, " , ", "Type a phrase"),
        (clip, ", ".join(map(str, range(17))), "the page takes 16"),
        (damaged, "cat", "^damaged.mp4 cannot be opened"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            follow_clip(finder, path, phrases, 0.3, tmp_path / "out")


def test_frames_of_a_clip_are_as_large_as_the_page_allows(finder, clip, tmp_path):
    """48 x 64 pixels; the frames of a small file can fill the memory of a server."""
    with pytest.raises(OSError, match="clip.mp4 has frames of 3,072 pixels, more than 3,000"):
        follow_clip(finder, clip, "cat", 0.3, tmp_path / "out", max_pixels=3000)
    assert not (tmp_path / "out").exists()


def test_a_clip_without_its_end_is_followed_and_named(finder, tmp_path):
    import av

    path = tmp_path / "cut.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=15, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture, _ in draw_film(0, num_frames=20, image_size=64, num_objects=2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    film, said = follow_clip(finder, path, "cat", 0.01, tmp_path / "out")
    assert 1 < frames_in(film) < 20
    assert ">cut.avi: its end is missing" in said and str(tmp_path) not in said


def test_the_page_shows_the_film_and_keeps_nothing_of_it(finder, clip):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
    from sam3_hf.page.layout import build_page

    page = build_page([finder], [], 0.3, 10_000)
    (followed,) = (event.fn for event in page.fns.values() if event.name == "followed")
    (shown,) = ((Path(film), frames_in(film), said) for film, said in followed(str(clip), "cat", 0.1))
    assert not shown[0].exists() and shown[1] == 5 and "5 frames" in shown[2]
    ((film, said),) = followed(None, "cat", 0.1)
    assert film is None and "There is no clip" in said and 'role="alert"' in said
