"""Programs of `warm.py` are processes like others."""

import os
import signal

import pytest
from warm import WarmProcess, run, run_two

ENVIRONMENT = {**os.environ, "OWN": "value"}


def test_a_program_has_its_arguments_folder_variables_and_files(tmp_path):
    shown = "sys.argv, os.getcwd(), os.environ['OWN'], __name__"
    (tmp_path / "named.py").write_text(f"import sys, os, beside\nprint({shown})")
    (tmp_path / "beside.py").write_text("import sys\nsys.stderr.write('from beside')")
    finished = run(["named.py", "a", "b c"], tmp_path, ENVIRONMENT)
    assert finished.stdout == f"['named.py', 'a', 'b c'] {tmp_path} value __main__\n"
    assert (finished.returncode, finished.stderr) == (0, "from beside")
    for arguments in (["-m", "named", "x"], ["-c", "import sys; print(sys.argv[1:])", "x"]):
        assert "'x']" in run(arguments, tmp_path, ENVIRONMENT, together=True).stdout


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os, signal; os.killpg(0, signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_how_a_program_ended_is_known(tmp_path, code, status, error):
    finished = run(["-c", code], tmp_path, ENVIRONMENT)
    assert finished.returncode == status and error in finished.stderr


def test_programs_share_nothing_but_what_is_loaded(tmp_path):
    code = "import sys, json, threading; print(hasattr(json, 'mark'), 'torch' in sys.modules); json.mark = 1"
    code += "; print(threading.active_count())"
    for _ in range(2):
        assert run(["-c", code], tmp_path, ENVIRONMENT).stdout == "False True\n1\n"


def test_two_processes_know_each_other(tmp_path):
    start = "import os, torch; torch.distributed.init_process_group('gloo'); rank = int(os.environ['RANK'])\n"
    code = "total = torch.tensor(rank + 1); torch.distributed.all_reduce(total)\nif rank: print(total.item())"
    finished = run_two(["-c", start + code], tmp_path, ENVIRONMENT)
    assert (finished.returncode, finished.stdout) == (0, "3\n"), finished.stderr
    assert run_two(["-c", "import os; os._exit(3 * int(os.environ['RANK']))"], tmp_path, ENVIRONMENT).returncode == 3


def test_what_is_left_running_is_ended(tmp_path):
    with (tmp_path / "out").open("w") as file:
        process = WarmProcess(["-c", "import time; time.sleep(10**6)"], tmp_path, ENVIRONMENT, file, file)
    assert process.returncode is None
    process.end_all()
    assert process.wait() == -signal.SIGKILL
