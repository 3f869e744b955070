"""
Python programs as processes of their own that begin with the libraries loaded.

Importing takes seconds of a processor, more than most tests ask of a process. So one process imports and then only
forks, once for each program: what runs is as good as a process that has just imported. But it has not read variables
anew that libraries read at their import, and has no hash seed of its own. Tests of that, of launchers and of what is
imported when start an ordinary process, and so do runs that are resumed.
"""

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from conftest import HUNG

ROOT = Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ)  # before any test has changed it


class WarmProcess:
    """
    `python *arguments` in a session of its own.

    Args:
        arguments: a script, `-c` and code, or `-m` and a module; and what follows it.
        environment: all variables of the process.
        output, errors: open files that it writes to.
    """

    def __init__(self, arguments: list, folder: Path, environment: dict, output, errors):
        self.args, self.returncode = [*map(str, arguments)], None
        read, status = os.pipe()
        self._status = os.fdopen(read)
        with tempfile.TemporaryFile("w+") as request:
            json.dump({"arguments": self.args, "folder": str(folder), "environment": environment}, request)
            request.seek(0)
            socket.send_fds(_server(), [b"."], [request.fileno(), output.fileno(), errors.fileno(), status])
        os.close(status)
        self.pid = int(self._status.readline())

    def wait(self, timeout: float = HUNG) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def end_all(self) -> None:
        """Ends it, and whatever it leaves running."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@functools.cache
def _server() -> socket.socket:
    """The socket to the process that forks, which ends with this one."""
    ours, theirs = socket.socketpair()
    with theirs:
        known = ENVIRONMENT.get("PYTHONPATH")
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{known}" if known else str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("warm_server.py")), str(theirs.fileno())]
        subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    return ours


def run(arguments: list, folder: Path, environment: dict, *, together=False) -> subprocess.CompletedProcess:
    """Runs to the end. What it writes is in `stdout` and `stderr`, or, `together`, all of it in `stdout`."""
    return _run_all(arguments, folder, [environment], together)


def run_two(arguments: list, folder: Path, environment: dict, *, together=False) -> subprocess.CompletedProcess:
    """Two processes with the variables that torchrun gives its own; the status of one that fails."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    ranks = [{**environment, **shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return _run_all(arguments, folder, ranks, together)


def _run_all(arguments: list, folder: Path, environments: list[dict], together: bool) -> subprocess.CompletedProcess:
    with tempfile.TemporaryFile("a+") as output, tempfile.TemporaryFile("a+") as errors:
        files = (output, output if together else errors)
        processes = [WarmProcess(arguments, folder, environment, *files) for environment in environments]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.end_all()
        written = []
        for file in (output, errors):
            file.seek(0)
            written.append(file.read())
    return subprocess.CompletedProcess(processes[0].args, next(filter(None, codes), 0), *written)
