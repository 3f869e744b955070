"""Every image decoded once before it is needed, and a memory of those that were sound.

Damage in the middle of a file shows only there; it would stop a run after hours. The memory is a file in the cache of
`datasets`, one for each split, which knows an image by the size and time of its file and by the size that the
annotations state. Processes that check the same split do it one after the other, so that the second finds it done.
"""

import hashlib
import json
import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..files import write_file
from .checks import CHECK_THREADS, Problems
from .images import load_image
from .rows import RawSplit

logger = logging.getLogger(__name__)


def decode_images(split: RawSplit, problems: Problems) -> None:
    """Decodes the images that are not known to be sound; adds a problem for each that cannot be.

    Args:
        split: checked by `check_dataset`.
        problems: what is found is added.
    """
    with memory_of(split) as sound:
        todo = [position for position in range(len(split.rows)) if not _is_known(split, position, sound)]
        pool = ThreadPoolExecutor(min(CHECK_THREADS, os.cpu_count() or 1))  # decoders leave Python's lock
        try:
            faults = pool.map(lambda position: decoding_fault(split, position), todo)
            bar = tqdm(
                faults, f"decoding {split.name} images", len(todo), unit="image", disable=None if todo else True
            )
            for position, fault in zip(todo, bar, strict=True):
                if fault:
                    problems.add("unreadable image", split.rows[position]["file_name"], fault)
                else:
                    sound[_key(split, position)] = _print_of(split, position)
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest


def decoding_fault(split: RawSplit, position: int) -> str | None:
    """What keeps an image from being decoded; None if nothing does."""
    row = split.rows[position]
    try:
        load_image(split.image(position), row["width"], row["height"])
    except OSError as error:
        return f"{error}; replace the file, or remove the image from the annotations"
    return None


@contextmanager
def memory_of(split: RawSplit):
    """
    {key of an image: print of it} of the sound images of a split, to be read and added to; written when the `with`
    block ends, by an error too. Where the cache cannot be written, the memory is empty and lost.
    """
    source = os.path.abspath(split.source) if os.path.exists(split.source) else split.source
    name = hashlib.sha256(f"{source}\n{split.name}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "sam3_hf" / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = _hold(FileLock(f"{file}.lock"), split)
    except (OSError, NotImplementedError) as error:  # no room or right, or a file system without locks
        logger.warning("images will be decoded again at the next start, as %s cannot be written: %s", file, error)
        lock, file = nullcontext(), None
    with lock:
        sound = {} if file is None else _read(file)
        before = dict(sound)
        try:
            yield sound
        finally:
            if file is not None and sound != before:
                _write(file, sound)


def _hold(lock: FileLock, split: RawSplit) -> AbstractContextManager:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process, which decodes the %s images of %s", split.name, split.source)
        return lock.acquire()


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none yet, or damaged
        return {}
    return content if isinstance(content, dict) else {}


def _write(file: Path, sound: dict) -> None:
    try:
        write_file(file, json.dumps(sound))
    except OSError as error:
        logger.warning("images will be decoded again at the next start, as %s cannot be written: %s", file, error)


def _is_known(split: RawSplit, position: int, sound: dict) -> bool:
    known = sound.get(_key(split, position))
    return known is not None and known == _print_of(split, position)


def _key(split: RawSplit, position: int) -> str:
    source = split.image(position)
    return str(position) if source["bytes"] is not None else os.path.abspath(source["path"])


def _print_of(split: RawSplit, position: int) -> list[int] | None:
    """What changes when an image does: [bytes, time in ns (or checksum of embedded bytes), width, height]."""
    source, row = split.image(position), split.rows[position]
    stated = [row["width"], row["height"]]
    if source["bytes"] is not None:
        return [len(source["bytes"]), zlib.crc32(source["bytes"]), *stated]
    try:
        status = os.stat(source["path"])
    except OSError:  # removed meanwhile
        return None
    return [status.st_size, status.st_mtime_ns, *stated]
