"""
Trains a lite SAM 3 on a COCO dataset.

    accelerate launch training/train.py training/configs/lite_fp16.yaml --data path/to/dataset

Where the package is installed, `accelerate launch -m sam3_hf.training` and, for one process, `sam3-lite train` do the
same. All that a run writes is in its output folder: checkpoints/{last,best,epoch_N}, tensorboard/, logs/train.log,
metrics.jsonl, predictions/epoch_N/*.png and final/, which `Sam3LiteModel.from_pretrained` takes.
"""

import importlib
import logging
import os
import sys
from multiprocessing import active_children
from pathlib import Path

from . import DEFAULT_COMMAND

# All of sam3-hf[train]: a run must not find out at its end that it cannot draw its curves.
LIBRARIES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "evaluate": "evaluate",
    "matplotlib": "matplotlib.pyplot",
    "psutil": "psutil",
    "pyyaml": "yaml",
    "tensorboard": "tensorboard",
    "xxhash": "xxhash",
}
FAILED = 2
INTERRUPTED = 130  # as shells say it for SIGINT


def main(argv: list[str] | None = None, command: str = DEFAULT_COMMAND) -> int:
    """
    Trains. Errors end it with a line on stderr; their traceback goes to OUTPUT_DIR/logs/train.log.

    Args:
        argv: the command line without the program; `sys.argv[1:]` if None.
        command: what the user called, for the help.

    Returns:
        The exit status: 0, 2 after an error, or 128 + the number of the signal that ended the run early.

    Raises:
        SystemExit: help was asked for, or an argument is wrong.
    """
    others = active_children()
    folder = None
    try:
        import_libraries()
        from .arguments import parse_arguments
        from .session import run_session

        arguments = parse_arguments(argv, command)
        folder = Path(arguments.output.output_dir)
        return run_session(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: the last checkpoint is as it was; to go on, add --resume auto\n")
        status = INTERRUPTED
    except Exception as error:
        from .failure import report

        report(error, folder)
        status = FAILED
    finally:
        for child in active_children():
            if child not in others:  # Python would wait for it at its exit
                child.kill()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)  # at an ordinary exit, what connects the processes may wait for the others for ever
    return status


def import_libraries() -> None:
    """
    Raises:
        ImportError: a library of the trainer is not installed, or cannot be imported.
    """
    for package, module in LIBRARIES.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = package if (error.name or module) in (module, package) else error.name
            raise ImportError(f'{missing} is not installed; training needs pip install "sam3-hf[train]".') from error
        except ImportError as error:
            raise ImportError(f"{package} cannot be imported ({error}): install it anew") from error
