"""The worker processes of a loader, which end with what they work for."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import DataLoader


@contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator]:
    """
    The batches of a loader for the time of a `with` block, at whose end no worker is left. By itself an iterator keeps
    them for as long as the traceback of an error refers to it, and Python then waits for them at its exit.
    """
    batches = iter(loader)
    workers = getattr(batches, "_workers", [])  # torch names neither them nor their end in public
    try:
        yield batches
    finally:
        try:
            if workers:
                batches._shutdown_workers()
        finally:
            for worker in workers:
                if worker.is_alive():  # busy with an image, and deaf to SIGTERM
                    worker.kill()
                    worker.join()
