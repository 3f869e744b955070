"""Items made by a thread before they are asked for, a bounded number of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
END = StopIteration()


def ahead(items: Generator[T, None, None], depth: int) -> Iterator[T]:
    """
    The items in their order. What making one raises is raised where it is asked for. If the iterator is closed early,
    so is `items`, by its own thread.

    Args:
        depth: how many may wait; memory holds two more, the one that is used and the one that is made.
    """
    queue, stopped = Queue(maxsize=depth), Event()

    def make():
        fault = None
        try:
            for item in items:
                queue.put((item, None))
                if stopped.is_set():
                    break
        except BaseException as error:
            fault = error
        finally:
            items.close()
            queue.put((None, fault or END))

    thread = Thread(target=make, daemon=True)
    thread.start()
    end = None
    try:
        while end is None:
            item, end = queue.get()
            if end is None:
                yield item
        if end is not END:
            raise end
    finally:
        stopped.set()
        while end is None:  # whoever waits for room in the queue gets it
            _, end = queue.get()
        thread.join()
