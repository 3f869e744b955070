"""Imports what the trainer and the commands do, then only forks: once for each program of `warm.py`."""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path


def load() -> None:
    from sam3_hf.training.main import LIBRARIES

    for name in (*LIBRARIES.values(), "sam3_hf.cli", "sam3_hf.evaluation", "sam3_hf.training.session"):
        importlib.import_module(name)
    gc.freeze()  # what is loaded stays shared, and need not be taken apart at each end


def next_program(requests: socket.socket) -> dict:
    """Forks for each request; returns in the process that is to run it, with the arguments of `run`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those ended that watch over the programs
    while True:
        message, files, *_ = socket.recv_fds(requests, 1, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    request, output, errors, status = files
    program = os.fork()
    if program != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        os.write(status, b"%d\n" % code)
        os._exit(0)
    os.setsid()
    os.write(status, b"%d\n" % os.getpid())
    os.close(status)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    with open(request) as file:
        return json.load(file)


def run(arguments: list[str], folder: str, environment: dict) -> None:
    """As the interpreter does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = arguments
    if first == "-c":
        code, sys.argv, sys.path[0] = rest[0], ["-c", *rest[1:]], ""
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif first == "-m":
        sys.argv, sys.path[0] = rest, folder
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    load()
    run(**next_program(socket.socket(fileno=int(sys.argv[1]))))
