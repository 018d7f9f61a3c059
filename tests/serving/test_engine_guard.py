"""What the guard started is gone when it should be, with everything that it started in turn.

Every process of a group holds the write end of one pipe, so its end is the proof that none is left.
"""

import signal
import subprocess
import sys

from serving.engine import guard

GUARD = [sys.executable, "-I", guard.__file__]
FAMILY = "sleep 600 & sleep 600 & echo ready; exec sleep 600"  # three processes


def test_nothing_outlives_an_asker_that_is_killed() -> None:
    asker = (
        "import subprocess, sys, signal\n"
        "guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", asker, *GUARD, "sh", "-c", FAMILY], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""


def test_nothing_outlives_the_command() -> None:
    with subprocess.Popen(
        [*GUARD, "sh", "-c", "sleep 600 & echo begun; exit 3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "begun\nexit code 3\n"
    assert process.returncode == -signal.SIGKILL


def test_it_kills_no_group_but_its_own() -> None:
    done = subprocess.run([*GUARD, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert "leader of a process group" in done.stderr
