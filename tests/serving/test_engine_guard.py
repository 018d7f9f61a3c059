"""What the guard started is gone when it should be, with everything that it started in turn.

Every process of a group holds the write end of one pipe, so its end is the proof that none is left.
"""

import signal
import subprocess
import sys
from pathlib import Path

from serving.engine import guard

GUARD = [sys.executable, "-I", guard.__file__]
FAMILY = "sleep 600 & sleep 600 & echo ready; exec sleep 600"  # three processes


def test_nothing_outlives_an_asker_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "adapter").write_text("linked")
    asker = (
        "import subprocess, sys, signal\n"
        "guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", asker, *GUARD, str(folder), "sh", "-c", FAMILY], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""
    assert not folder.exists()


def test_nothing_outlives_the_command(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*GUARD, str(tmp_path), "sh", "-c", "sleep 600 & echo begun; exit 3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "begun\nexit code 3\n"
    assert process.returncode == -signal.SIGKILL
    assert tmp_path.exists(), "it is the asker's, who lives"


def test_it_kills_no_group_but_its_own() -> None:
    done = subprocess.run([*GUARD, "folder", "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert "leader of a process group" in done.stderr
