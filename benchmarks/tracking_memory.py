"""
Peak memory of `sam3-lite track` on films of several lengths, each followed by a process of its own.

    nice -n 19 python benchmarks/tracking_memory.py --frames 200 2000

The films are a drawn one of 60 frames over and over, enlarged to 640 x 480, and asked for two of its phrases. Linux
only.
"""

import argparse
import multiprocessing
import tempfile
from itertools import cycle, islice
from pathlib import Path

from common import parser, reporting
from PIL import Image

from sam3_hf.cli import app
from sam3_hf.data.films import RATE, draw_film, film_phrases
from sam3_hf.tracking.drawing import FilmWriter

SEED = 50_000
DRAWN = 60  # frames
SIZE = (640, 480)


def main():
    options = parser(__doc__)
    options.add_argument("--frames", type=int, nargs="+", default=[200, 2000], help="of each film")
    options.add_argument("--model", default="sam3_hf/assets/tiny-standard", help="folder or Hub id")
    options.add_argument("--prompts", nargs="+", default=film_phrases(SEED)[:2])
    arguments = options.parse_args()
    with reporting(arguments) as (rows, more), tempfile.TemporaryDirectory() as folder:
        more["size"] = SIZE
        for count in arguments.frames:
            film = Path(folder) / f"{count}.mp4"
            write_film(film, count)
            rows.append({"frames": count, **measure(film, Path(folder) / str(count), arguments)})


def write_film(path: Path, count: int) -> None:
    writer = FilmWriter(path, RATE)
    frames = [Image.fromarray(picture).resize(SIZE) for picture, _ in draw_film(SEED, DRAWN)]
    for frame in islice(cycle(frames), count):
        writer.add(frame)
    writer.close()


def measure(film: Path, output: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """
    MB of a process that follows the film, and of these before it opens the model.

    Raises:
        RuntimeError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    prompts = [word for prompt in arguments.prompts for word in ("--prompt", prompt)]
    command = ["track", str(film), "--model", arguments.model, "--output", str(output), *prompts]
    process = context.Process(target=follow, args=(command, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"sam3-lite {' '.join(command)} failed") from None
    finally:
        process.join()


def follow(command: list[str], results) -> None:
    before = peak_mb()
    app(command, standalone_mode=False)
    results.send({"peak MB": peak_mb(), "of these before loading": before})


def peak_mb() -> float:
    """Most memory that this process had."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
