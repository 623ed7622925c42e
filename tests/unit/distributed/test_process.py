import os
import subprocess
import sys

from trainer.distributed.process import is_alive, pid_namespace


def test_a_process_is_alive_until_it_was_waited_for() -> None:
    assert is_alive(os.getpid()) and is_alive(1)
    process = subprocess.Popen([sys.executable, "-c", ""])
    assert is_alive(process.pid)
    process.wait()
    assert not is_alive(process.pid)


def test_processes_of_one_machine_have_one_pid_namespace() -> None:
    code = "from trainer.distributed.process import pid_namespace; print(pid_namespace())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == pid_namespace() != ""
