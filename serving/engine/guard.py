"""Runs a command and sees to it that nothing of it outlives whoever asked for it, even one killed by SIGKILL.

    guard.py FOLDER COMMAND…      as the leader of a process group, its stdin a pipe that the asker holds

The pipe's end means that the asker is gone, and then FOLDER is removed, which the asker would have done; the command's
end, that what it started must go too. Either way the whole group is killed, this process included: a server's own
children (an engine, its workers) stay in their parent's group.
It runs as a plain file in a fresh interpreter and imports only the standard library.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Run the command until it ends, or until stdin does."""
    if os.getpgrp() != os.getpid():
        sys.exit("guard: start it as the leader of a process group; it kills its group")
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the group; the command's own end is what counts here
    folder, *command = sys.argv[1:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_wait_for_asker, args=(folder,), daemon=True).start()
    code = child.wait()
    print(f"exit code {code}", flush=True)
    _kill_group()


def _wait_for_asker(folder: str) -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)  # what somebody still writes there is a socket or a log
    _kill_group()


def _kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
