"""Secrets by name: a config says where a value is kept, and only the process that needs it looks there.

    secrets:
      HF_TOKEN: secret://env/TEAM_HF_TOKEN                a variable of the node's own environment
      AWS_SECRET_ACCESS_KEY: secret://file/run/secrets/s3 the file /run/secrets/s3 of each node
      WANDB_API_KEY: secret://aws/training#wandb          AWS Secrets Manager; the field of one that is JSON
      OTHER: secret://kubernetes/team/token               the key `token` of the secret `team`, of the pod's namespace

What stands in a runtime environment is shown by Ray's REST answers, logs and events to anybody; so is a config, which
is stored with its run. A value in either is refused.
"""

import base64
import json
import os
import re
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from cluster.errors import ConfigError, Fault

SCHEME = "secret://"
PLACES = ("env", "file", "aws", "kubernetes")

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # mounted into each pod
_API = "https://kubernetes.default.svc"
_TIMEOUT_S = 10.0

# What the makers of these keys say that they look like.
_LOOKS = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|\bhf_[A-Za-z0-9]{30,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{22,}|\bglpat-[\w-]{20,}"  # GitHub, GitLab
    r"|\bxox[abprs]-[\w-]{10,}"  # Slack
    r"|\bAIza[\w-]{35}\b"  # Google
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\."  # a signed web token
    r"|://[^/\s:@]+:[^/\s:@]+@"  # a password in a URL
)


def looks_like_one(text: str) -> bool:
    """Whether a text has something in it that is a secret by its looks."""
    return bool(_LOOKS.search(text))


def check(secrets: Mapping[str, str]) -> None:
    """Raise ValueError unless each says where its value is kept."""
    for name, reference in secrets.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} cannot be a variable's name: write letters, digits and '_'")
        parts = urlsplit(reference)
        if not reference.startswith(SCHEME) or parts.netloc not in PLACES or len(parts.path) < 2:
            raise ValueError(
                f"{name}: write where the value is kept, never the value: secret://env/NAME, secret://file/PATH, "
                "secret://aws/NAME or secret://kubernetes/NAME/KEY"
            )
        if parts.netloc == "kubernetes" and parts.path.count("/") != 2:
            raise ValueError(f"{name}: write secret://kubernetes/NAME/KEY")


def load(secrets: Mapping[str, str]) -> None:
    """Put the values into this process's environment. Raises ConfigError with all that cannot be read."""
    faults, values = [], {}
    for name, reference in secrets.items():
        try:
            values[name] = _read(reference)
        except _NotThere as error:
            faults.append(Fault(f"secrets.{name}", reference, f"{error}, on {os.uname().nodename}"))
    if faults:
        raise ConfigError(faults)
    os.environ.update(values)


def load_in_workers(secrets: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of a job whose processes all load these, wherever they run; it holds no value.

    A process that cannot read one starts without it, and whoever needs it says so: a hook that fails would keep Ray
    starting processes for ever.
    """

    def hook() -> None:
        try:
            load(secrets)
        except ConfigError as error:
            print(f"warning: {error}", file=sys.stderr)

    return {"worker_process_setup_hook": hook} if secrets else {}


class _NotThere(Exception):
    """Why a value cannot be read."""


def _read(reference: str) -> str:
    parts = urlsplit(reference)
    path = parts.path[1:]
    match parts.netloc:
        case "env":
            if path not in os.environ:
                raise _NotThere(f"the environment has no variable {path}; set it where the node starts Ray")
            return os.environ[path]
        case "file":
            try:
                return Path("/", path).read_text().strip()
            except OSError as error:
                raise _NotThere(f"cannot read /{path}: {error.strerror}") from None
        case "aws":
            return _field(_from_aws(path), parts.fragment)
        case _:
            name, _, key = path.partition("/")
            return _from_kubernetes(name, key)


def _from_aws(name: str) -> str:
    from cluster import s3  # boto3 takes half a second
    from cluster.errors import StoreError

    try:
        return s3.secret(name)
    except StoreError as error:
        raise _NotThere(str(error)) from None


def _field(text: str, field: str) -> str:
    if not field:
        return text
    try:
        return str(json.loads(text)[field])
    except (ValueError, KeyError, TypeError):
        raise _NotThere(f"it is no JSON object with a field {field}") from None


def _from_kubernetes(name: str, key: str) -> str:
    try:
        namespace, token = (_ACCOUNT / "namespace").read_text(), (_ACCOUNT / "token").read_text()
        answer = httpx.get(
            f"{_API}/api/v1/namespaces/{namespace}/secrets/{name}",
            headers={"Authorization": f"Bearer {token}"},
            verify=ssl.create_default_context(cafile=_ACCOUNT / "ca.crt"),
            timeout=_TIMEOUT_S,
        )
    except (OSError, httpx.HTTPError) as error:
        raise _NotThere(f"this is no pod that may ask its cluster ({type(error).__name__})") from None
    if not answer.is_success:
        raise _NotThere(f"the cluster answers {answer.status_code}; may the pod's account read the secret {name}?")
    data = answer.json().get("data", {})
    if key not in data:
        raise _NotThere(f"the secret {name} has no key {key}; it has {', '.join(sorted(data)) or 'none'}")
    return base64.b64decode(data[key]).decode()
