"""The process that a pickle is converted in: no environment, no files, no network, little memory, little time.

It is started with two open files, the archive and an empty one, and knows no path. Before the first byte is read it
gives up what it can: its limits are set, no process may be begun, and where the kernel allows it (namespaces of one's
own) it has neither a network nor a file system but an empty folder. What the kernel did not allow is told, not hidden.

The conversion itself never calls anything that a file names (pickles.py): this is the second wall, for faults in ours.

    {"tensors": {"name": bytes, …}, "walls": {"network": "", "files": "Operation not permitted"}}
    {"refused": "it calls for os.system, …", "walls": {…}}
"""

import codecs
import ctypes
import json
import os
import resource
import sys

from cluster.catalogue import archive
from cluster.catalogue.pickles import Refused

_NEW_USER, _NEW_NET, _NEW_MOUNTS = 0x10000000, 0x40000000, 0x00020000
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS
_CODECS = ("ascii", "cp437", "latin-1", "utf-8", "utf-32", "unicode-escape", "raw-unicode-escape")
"""Of names in archives and text in pickles: modules, which cannot be imported once the file system is gone."""
_OVERHEAD_BYTES = 512 << 20
_HEADER_BYTES = 64 << 20


def main() -> None:
    """`… source_fd target_fd` in an empty folder; prints one JSON object."""
    source, target = (int(argument) for argument in sys.argv[1:])
    size = os.fstat(source).st_size
    _limit(size)
    walls = _close()
    said: dict[str, object] = {"walls": walls}
    try:
        with open(source, "rb") as reading, open(target, "wb") as writing:
            said["tensors"] = archive.convert(reading, writing)
    except Refused as refusal:
        said["refused"] = str(refusal)
    except MemoryError:
        said["refused"] = "it needs more memory than its own size, as no state dict does"
    except OSError as error:
        said["refused"] = f"it could not be written: {error.strerror}"
    print(json.dumps(said))


def _limit(size: int) -> None:
    """Limits in proportion to the archive: a storage is in memory at a time; tied weights are written twice."""
    limits = {
        resource.RLIMIT_AS: size + _OVERHEAD_BYTES,
        resource.RLIMIT_FSIZE: 2 * size + _HEADER_BYTES,
        resource.RLIMIT_CPU: 60 + size // (10 << 20),
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most, most) if hard == resource.RLIM_INFINITY or most <= hard else (hard, hard))


def _close() -> dict[str, str]:
    """Leave the network and the file system; says for each why it could not be left, or nothing."""
    for codec in _CODECS:
        codecs.lookup(codec)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_MOUNTS) == 0 or libc.unshare(_NEW_NET | _NEW_MOUNTS) == 0:
        network = ""
    else:
        network = os.strerror(ctypes.get_errno())
    try:
        os.chroot(".")
        os.chdir("/")
        files = ""
    except OSError as error:
        files = error.strerror or str(error)
    return {"network": network, "files": files}
