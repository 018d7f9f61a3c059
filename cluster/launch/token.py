"""The cluster's token on this machine, and what else goes to each node as a file.

Ray asks every process, and everybody who submits a job, for one token. It is made here, copied to the machines over
SSH, and stands in no generated file, command or variable. On Kubernetes the operator makes it, as a secret.
"""

import os
import secrets
import stat
from pathlib import Path

from cluster.errors import ConfigError, Fault
from cluster.launch.vm import LOCAL_FOLDER


def folder(name: str) -> Path:
    """Where a cluster's token lies on this machine."""
    return Path(LOCAL_FOLDER.format(name=name)).expanduser()


def token_file(name: str) -> Path:
    """What RAY_AUTH_TOKEN_PATH is set to by whoever speaks to the cluster."""
    return folder(name) / "token"


def prepare(name: str, environment_file: str | None) -> None:
    """Make the folder that is copied to each node: the token, once; the environment, each time as it is now.

    Raises ConfigError when the environment's file is missing or others may read it.
    """
    folder(name).mkdir(parents=True, exist_ok=True)
    folder(name).chmod(0o700)
    if not token_file(name).exists():
        write(token_file(name), secrets.token_hex(32))
    copy = folder(name) / "environment"
    if environment_file is None:
        copy.unlink(missing_ok=True)
        return
    source = Path(environment_file).expanduser()
    if not source.is_file():
        raise ConfigError([Fault(f"cluster {name}", "provider.environment_file", f"no file {source}")])
    if stat.S_IMODE(source.stat().st_mode) & 0o077:
        message = f"others may read {source}; it holds secrets: chmod 600 {source}"
        raise ConfigError([Fault(f"cluster {name}", "provider.environment_file", message)])
    write(copy, source.read_text())


def write(path: Path, text: str) -> None:
    """Write a file that is never readable by others, not even while it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)
