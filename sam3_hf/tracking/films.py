"""Where frames come from: a film, a folder of pictures, or a camera."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..picture_files import find_pictures
from ..prediction.output_folder import state_of
from ..reading import read_image

RATE = 30.0  # frames per second of pictures, and of films that do not say it
SHORTER = 1.0  # seconds by which a film may be shorter than its header says: headers round


class Frame(NamedTuple):
    """A frame: its number in the film from 0, its time in seconds, and `(height, width, 3)` uint8 RGB, upright."""

    number: int
    time: float
    pixels: np.ndarray


class Film:
    """
    A file that PyAV opens. What decodes is given; what is wrong with the rest is in `faults` when `frames` has ended.

    Args:
        path: of the file.

    Attributes:
        name: for messages.
        rate: frames per second.
        length: how many frames there are, as far as the file says it; None if it does not.
        pixels: width times height of a frame.
        live: whether frames come only once.
        record: plain values that tell it from others.

    Raises:
        OSError: the file is missing, is no film, or has no pictures.
    """

    live = False

    def __init__(self, path: Path):
        if not path.is_file():
            raise OSError(f"{path} is no file: give a film, a folder of pictures or the number of a camera.")
        self.path, self.name, self.faults = path, str(path), []
        self.record = {"film": os.path.realpath(path), **state_of(path)}
        with self._open() as container:
            stream = _pictures_of(container, self.name)
            self.pixels = stream.width * stream.height
            self.rate = float(stream.average_rate or stream.guessed_rate or RATE)
            seconds = _seconds_of(stream)
            self.length = stream.frames or (None if seconds is None else round(seconds * self.rate))

    def frames(self, wanted: Callable[[int], bool], end: int | None) -> Iterator[Frame]:
        """
        Decodes from the start, one frame in memory.

        Args:
            wanted: whether a frame of this number is needed; the others are decoded, and not made RGB.
            end: number of the frame to stop before.
        """
        av = _av()
        number, packets, last, damaged = 0, 0, 0.0, 0
        with self._open() as container:
            stream = _pictures_of(container, self.name)
            stream.thread_type = "AUTO"
            expected, seconds = stream.frames, _seconds_of(stream)
            try:
                for packet in container.demux(stream):
                    packets += packet.size > 0
                    damaged += packet.is_corrupt
                    try:
                        decoded = packet.decode()
                    except av.FFmpegError:
                        damaged += 1
                        continue
                    for image in decoded:
                        if end is not None and number >= end:
                            return
                        last = image.time if image.time is not None else number / self.rate
                        if wanted(number):
                            yield Frame(number, last, upright(image.to_ndarray(format="rgb24"), image.rotation))
                        number += 1
            except av.FFmpegError:
                damaged += 1
        missing = packets < expected if expected else seconds is not None and last + SHORTER < seconds
        if missing or damaged:
            whole = f" of {expected}" if expected else ""
            what = "its end is missing" if missing else f"{damaged} packets of it are damaged"
            self.faults.append(f"{self.name}: {what}: {number}{whole} frames could be read.")

    def _open(self):
        return _opened(str(self.path), None, self.name)


class Camera:
    """
    A camera by its number, from now until it is stopped. Attributes are those of [`Film`] but for `pixels`.

    Raises:
        OSError: there is none.
    """

    live, length = True, None

    def __init__(self, index: int):
        self.index, self.name = index, f"camera {index}"
        self.faults, self.record = [], {"camera": index}
        with self._open() as container:
            stream = _pictures_of(container, self.name)
            self.rate = float(stream.average_rate or stream.guessed_rate or RATE)

    def frames(self, wanted: Callable[[int], bool], end: int | None) -> Iterator[Frame]:
        """
        As those of [`Film`], from when it is called on. Where the camera fails, `faults` says it, and they end; one
        that arrives damaged is left out, and has no number.
        """
        av = _av()
        number, start = 0, None
        with self._open() as container:
            try:
                for packet in container.demux(_pictures_of(container, self.name)):
                    try:
                        decoded = packet.decode()
                    except av.FFmpegError:
                        continue  # it did not arrive whole
                    for image in decoded:
                        if end is not None and number >= end:
                            return
                        time = image.time if image.time is not None else number / self.rate
                        start = time if start is None else start
                        if wanted(number):
                            yield Frame(number, time - start, image.to_ndarray(format="rgb24"))
                        number += 1
            except av.FFmpegError as error:
                self.faults.append(f"{self.name} gave {number} frames and then failed ({error.strerror}).")

    def _open(self):
        address = camera_address(self.index)
        try:
            return _opened(*address, self.name)
        except OSError as error:
            raise OSError(f"{self.name} cannot be opened: is it there, free, and yours to use?") from error


class Pictures:
    """
    The pictures of a folder as frames, numbers in their names read as numbers. Attributes are those of [`Film`] but
    for `pixels`.

    Args:
        folder: searched to any depth.
        exclude: a folder in it that is our own.

    Raises:
        ValueError: there are none.
    """

    live = False

    def __init__(self, folder: Path, exclude: Path):
        self.pictures = sorted(find_pictures([str(folder)], exclude), key=lambda picture: _natural(picture.name))
        self.name, self.rate, self.length, self.faults = str(folder), RATE, len(self.pictures), []
        states = [(name, *state_of(path).values()) for path, name in self.pictures if path.is_file()]
        self.record = {
            "frames": os.path.realpath(folder),
            "pictures": len(self.pictures),
            "state": hashlib.sha256(repr(states).encode()).hexdigest(),
        }

    def frames(self, wanted: Callable[[int], bool], end: int | None) -> Iterator[Frame]:
        """As those of [`Film`]. A picture that cannot be read is left out, and keeps its number."""
        self.faults = []
        for number, picture in enumerate(self.pictures[:end]):
            if wanted(number):
                try:
                    pixels = read_image(picture.path)
                except OSError as error:
                    self.faults.append(str(error))
                    continue
                yield Frame(number, number / self.rate, pixels.permute(1, 2, 0).numpy())


Source = Film | Camera | Pictures


def open_source(given: str, exclude: Path) -> Source:
    """
    Args:
        given: file, folder, or the number of a camera.
        exclude: a folder whose pictures are left out, because they are our own.

    Raises:
        OSError, ValueError: as [`Film`], [`Camera`] and [`Pictures`].
        ImportError: PyAV is not installed.
    """
    _av()
    path = Path(given)
    if path.is_dir():
        return Pictures(path, exclude)
    if given.isdecimal() and not path.exists():
        return Camera(int(given))
    return Film(path)


def upright(pixels: np.ndarray, rotation: float) -> np.ndarray:
    """Pixels of a film that is stored turned, `rotation` degrees counterclockwise of which set it right."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90) % 4))


def camera_address(index: int) -> tuple[str, str | None]:
    """What PyAV opens for a camera: its name and format."""
    if sys.platform == "darwin":
        return str(index), "avfoundation"
    if sys.platform == "win32":
        cameras = [device for device in _av().enumerate_input_devices("dshow") if "video" in device.media_types]
        if index >= len(cameras):
            raise OSError(f"camera {index} cannot be opened: there are {len(cameras)} cameras.")
        return f"video={cameras[index].name}", "dshow"
    return f"/dev/video{index}", "v4l2"


def _opened(address: str, kind: str | None, name: str):
    """A container of PyAV; `kind` is its format where the address does not tell."""
    av = _av()
    try:
        return av.open(address, format=kind)
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{name} cannot be opened ({reason}): it is damaged, without its end, or no film.") from error


def _pictures_of(container, name: str):
    if not container.streams.video:
        raise OSError(f"{name} has no pictures, only sound or text.")
    return container.streams.video[0]


def _seconds_of(stream) -> float | None:
    """How long a stream is as the file says it, in seconds."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    text = stream.metadata.get("DURATION", "")  # in Matroska
    parts = re.fullmatch(r"(\d+):(\d+):([\d.]+)", text)
    return None if parts is None else int(parts[1]) * 3600 + int(parts[2]) * 60 + float(parts[3])


def _natural(name: str) -> list:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _av():
    """
    Raises:
        ImportError: PyAV is not installed; the message says how to.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("films need PyAV: pip install 'sam3-hf[video]'") from error
    return av
