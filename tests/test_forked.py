# SPDX-License-Identifier: Apache-2.0
"""A forked command is what a new interpreter makes of the same words and environment."""

import subprocess

import pytest
from conftest import environment, python

SCRIPT = """
import atexit, multiprocessing, os, sys, threading, time
print(sys.argv, sys.path[0], os.getcwd(), sorted(os.environ.items()), __name__, __file__)
print("error", file=sys.stderr)
atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2,), daemon=True)
child.start()
print(multiprocessing.active_children() == [child])
{end}
"""
ENDS = [
    "",
    "sys.exit(3)",
    "sys.exit('in words')",
    "sys.exit(-1)",
    "1 / 0",
    "import no_such",
    "os.kill(os.getpid(), 15)",
]
ENDS += ["raise KeyboardInterrupt", "sys.excepthook = lambda *error: print('hook', error[0]); 1 / 0", "import shared"]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.partition("=")[0])
def test_a_fork_prints_and_returns_what_an_interpreter_does(server, tmp_path, monkeypatch, end):
    monkeypatch.setenv("ONE_MORE", "of this command")
    monkeypatch.delenv("SHELL", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT.format(end=end))
    ours, real = (python("script.py", "a b", 1, cwd=tmp_path, server=each) for each in (server, None))
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout)
    assert ours.stderr == real.stderr


def test_an_environment_that_a_fork_cannot_have_is_refused(server):
    with pytest.raises(AssertionError, match="HF_HOME"):
        server.python(["x.py"], env=environment(HF_HOME="other"))


def test_a_command_that_hangs_is_ended_and_the_next_one_runs(server, tmp_path):
    (tmp_path / "hangs.py").write_text("import time; print('begun', flush=True); time.sleep(1000)")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        python("hangs.py", cwd=tmp_path, server=server, timeout=1)
    assert caught.value.output == "begun\n"
    (tmp_path / "next.py").write_text("print('next')")
    assert python("next.py", cwd=tmp_path, server=server).stdout == "next\n"
