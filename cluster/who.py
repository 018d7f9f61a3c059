"""Who a job is for.

On a laptop that is whoever is logged in. The driver of a submitted job runs under the account that Ray has on its node,
the same for everybody; there it is whoever submitted it, as the job's metadata says. It is what people say of
themselves: good for sharing among colleagues, and no proof of anything.
"""

import getpass
import json
import os
import re

from cluster import env

USER = "user"
"""The key of a submitted job's metadata."""


def user() -> str:
    """Who is logged in here, as part of an id."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container runs under any number
        name = f"uid-{os.getuid()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "somebody"


def submitter() -> str:
    """Who this process works for: the user in the metadata of the submitted job that it is, else who is logged in."""
    return submitted().get(USER) or user()


def submitted() -> dict[str, str]:
    """The metadata of the submitted job that this process is the driver of; empty where it is none."""
    config = json.loads(os.environ.get(env.RAY_JOB_CONFIG) or "{}")
    metadata: dict[str, str] = config.get("metadata") or {}
    return metadata
