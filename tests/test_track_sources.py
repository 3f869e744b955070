"""What `sam3-lite track` reads: films, also damaged or turned ones, folders of pictures, cameras."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from film_cases import FRAMES, cut_film, needs_av
from PIL import Image

from sam3_hf.tracking.films import Film, open_source, upright
from sam3_hf.tracking.run import Span


@needs_av
def test_the_wanted_frames_of_a_film_are_read(film, frames):
    source = Film(film)
    assert (source.rate, source.length, source.live) == (15, FRAMES, False)
    read = list(source.frames(Span(1, None, 3).has, 8))
    assert [frame.number for frame in read] == [1, 4, 7] and source.faults == []
    assert [frame.time for frame in read] == pytest.approx([1 / 15, 4 / 15, 7 / 15])
    for frame in read:
        assert frame.pixels.shape == (48, 64, 3)
        assert np.abs(frame.pixels.astype(int) - frames[frame.number]).mean() < 6
    assert Span(1, 8, 3).size(source.length) == 3 and Span(1, None, 3).size(source.length) == 3


@needs_av
@pytest.mark.parametrize("name", ["avi", "mkv"])
def test_a_film_without_its_end_gives_what_is_there_and_says_so(frames, tmp_path, name):
    whole, cut = cut_film(frames, tmp_path, name)
    source = Film(whole)
    assert len(list(source.frames(Span().has, None))) == 4 * FRAMES and source.faults == []
    source = Film(cut)
    read = list(source.frames(Span().has, None))
    assert FRAMES < len(read) < 4 * FRAMES
    assert len(source.faults) == 1 and f"{cut}: its end is missing: {len(read)}" in source.faults[0]
    assert list(source.frames(Span().has, 3))[-1].number == 2


def test_a_film_that_is_stored_turned_is_set_upright():
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(upright(pixels, 90)[:, 0], pixels[0, ::-1])  # counterclockwise
    assert np.array_equal(upright(pixels, -90), upright(pixels, 270))
    assert np.array_equal(upright(pixels, 0), pixels)


@needs_av
def test_a_film_that_says_that_it_is_turned_is_set_upright(film, tmp_path):
    import av
    from av.bitstream import BitStreamFilterContext

    path = tmp_path / "turned.mp4"
    with av.open(str(film)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        turn = "h264_metadata=display_orientation=insert:rotate=90"  # counterclockwise
        turned = BitStreamFilterContext(turn, source.streams.video[0], stream)
        for packet in source.demux(video=0):
            for changed in turned.filter(packet if packet.size else None):
                changed.stream = stream
                target.mux(changed)
    (before,), (after,) = (list(Film(name).frames(Span().has, 1)) for name in (film, path))
    assert np.array_equal(after.pixels, np.rot90(before.pixels))


@needs_av
def test_pictures_of_a_folder_come_by_their_numbers(frames, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in (10, 9, 2):
        Image.fromarray(frames[number - 2]).save(folder / f"frame{number}.png")
    (folder / "frame3.png").write_bytes(b"none")
    source = open_source(str(folder), tmp_path / "out")
    read = list(source.frames(Span().has, None))
    assert [frame.number for frame in read] == [0, 2, 3] and source.length == 4
    assert all(np.array_equal(frame.pixels, frames[i]) for frame, i in zip(read, (0, 7, 8), strict=True))
    assert len(source.faults) == 1 and "frame3.png" in source.faults[0]


@needs_av
def test_a_camera_is_what_a_number_means(film, monkeypatch):
    import sam3_hf.tracking.films as films

    monkeypatch.setattr(films, "camera_address", lambda index: (str(film), None))
    source = open_source("0", film.parent)
    assert source.live and source.record == {"camera": 0}
    assert [frame.number for frame in source.frames(Span().has, 4)] == [0, 1, 2, 3]
    monkeypatch.setattr(films, "camera_address", lambda index: ("/dev/none", "v4l2"))
    with pytest.raises(OSError, match="camera 7 cannot be opened"):
        open_source("7", film.parent)


class Unplugged:
    """A container of a camera whose third frame arrives damaged, and that is gone after so many packets."""

    def __init__(self, container, packets: int):
        self._container, self._left, self.streams = container, packets, container.streams

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._container.close()

    def demux(self, stream):
        import av

        def damaged():
            raise av.error.InvalidDataError(1, "damaged")

        for number, packet in enumerate(islice(self._container.demux(stream), self._left)):
            yield SimpleNamespace(decode=damaged) if number == 2 else packet
        raise av.error.OSError(19, "No such device")


@needs_av
def test_a_camera_that_fails_gave_what_it_gave_and_says_so(frames, tmp_path, monkeypatch):
    import sam3_hf.tracking.films as films

    whole, _ = cut_film(frames, tmp_path, "avi")
    opened = films._opened
    monkeypatch.setattr(films, "_opened", lambda address, kind, name: Unplugged(opened(str(whole), None, name), 8))
    source = open_source("3", tmp_path / "out")
    assert [frame.number for frame in source.frames(Span().has, None)] == [*range(7)]
    assert source.faults == ["camera 3 gave 7 frames and then failed (No such device)."]
