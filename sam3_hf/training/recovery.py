"""Which checkpoint a run goes on from: the newest one that is whole."""

import json
import logging
from pathlib import Path

from .checkpoints import STATE, damage, read_state

logger = logging.getLogger(__name__)


def checkpoint_to_resume(checkpoints: Path, resume: str) -> Path | None:
    """
    Args:
        checkpoints: folder of the run's checkpoints.
        resume: a checkpoint, or "auto" for the newest whole one in the folder.

    Returns:
        None if the folder has none.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it is damaged, or there are several and all of them are.
    """
    if resume != "auto":
        fault = damage(Path(resume))
        if fault is not None:
            raise ValueError(f"{resume} is damaged ({fault}): choose another checkpoint, or --resume auto")
        return Path(resume)
    found = checkpoints_in(checkpoints)
    if not found:
        return None
    faults = {}
    for checkpoint in found:
        try:
            fault = damage(checkpoint)
        except FileNotFoundError:
            fault = f"{STATE} is missing"
        if fault is None:
            if checkpoint.name != "last" or faults:
                _say_what_is_lost(checkpoint, faults)
            return checkpoint
        faults[checkpoint] = fault
    listed = ", ".join(f"{path.name}: {fault}" for path, fault in faults.items())
    raise ValueError(f"all checkpoints in {checkpoints} are damaged ({listed}): start anew in another --output_dir")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run: damaged ones whose step is unknown, then those of the latest step, `last` first."""
    found = [path.parent for path in folder.glob(f"[!.]*/{STATE}")]
    found += [path for path in (folder / "last",) if path.is_dir() and path not in found]

    def order(checkpoint: Path) -> tuple:
        step = _step(checkpoint)
        return (step is not None, -(step or 0), checkpoint.name != "last", checkpoint.name)

    return sorted(found, key=order)


def _step(checkpoint: Path) -> int | None:
    try:
        return int(read_state(checkpoint)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _say_what_is_lost(checkpoint: Path, faults: dict[Path, str]) -> None:
    for damaged, fault in faults.items():
        logger.warning("%s is damaged and not used: %s", damaged, fault)
    step = _step(checkpoint)
    reached = max([step, *(_step(path) or 0 for path in faults), _last_step_in(checkpoint.parent.parent)])
    logger.warning(
        "going on from %s, the newest whole checkpoint: step %d; %d steps after it are lost and done again",
        checkpoint,
        step,
        reached - step,
    )


def _last_step_in(output_dir: Path) -> int:
    """The last step that metrics.jsonl tells of, 0 if none."""
    try:
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line)["step"] for line in lines[-20:] if line.endswith("}")), default=0)
    except (OSError, ValueError, KeyError):
        return 0
