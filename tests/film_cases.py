"""A short drawn film as files, whole and cut."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_hf.data.films import draw_film

FRAMES = 10


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"needs {library}, of the extra `video`")


needs_av, needs_trackers = needs("av"), needs("trackers")


def drawn_frames() -> list[np.ndarray]:
    return [picture for picture, _ in draw_film(5, num_frames=FRAMES, image_size=64, num_objects=3)]


def write_film(frames: list[np.ndarray], path: Path) -> Path:
    """An MP4 file of them at 15 frames per second."""
    from sam3_hf.tracking.drawing import FilmWriter

    writer = FilmWriter(path, 15)
    for frame in frames:
        writer.add(Image.fromarray(frame))
    writer.close()
    return path


def cut_film(frames, path, name: str):
    """A film in a container that is readable from its start, without its last third."""
    import av

    whole = path / f"whole.{name}"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=15, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in [*frames] * 4:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    cut = path / f"cut.{name}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    return whole, cut
