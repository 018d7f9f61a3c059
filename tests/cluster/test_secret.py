"""Secrets travel by name: read where they are needed, and refused where their values would be seen."""

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import certifi
import pytest

from cluster import secret
from cluster.config import load
from cluster.errors import ConfigError
from jobs.config import Recipe
from tests.servers import ministack

CANARY = "kept-out-of-sight"
RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "support.yaml"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `load` puts into the environment goes again."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    os.environ["TEAM_TOKEN"] = CANARY
    (tmp_path / "token").write_text(f"{CANARY}-too\n")
    secret.load({"HF_TOKEN": "secret://env/TEAM_TOKEN", "OTHER": f"secret://file{tmp_path}/token"})
    assert os.environ["HF_TOKEN"] == CANARY
    assert os.environ["OTHER"] == f"{CANARY}-too"


def test_all_that_cannot_be_read_is_told_at_once_and_nothing_is_set(tmp_path: Path) -> None:
    os.environ["THERE"] = CANARY
    with pytest.raises(ConfigError) as error:
        secret.load({"A": "secret://env/THERE", "B": "secret://env/MISSING", "C": f"secret://file{tmp_path}/none"})
    assert "no variable MISSING" in str(error.value)
    assert f"cannot read {tmp_path}/none: No such file" in str(error.value)
    assert "A" not in os.environ
    assert CANARY not in str(error.value)


def test_from_aws_secrets_manager() -> None:
    with ministack("s3,iam,sts,secretsmanager") as server:
        os.environ.update(server.env, AWS_DEFAULT_REGION="us-east-1")
        client = boto3.client("secretsmanager", aws_access_key_id="test", aws_secret_access_key="test")
        client.create_secret(Name="plain", SecretString=CANARY)
        client.create_secret(Name="fields", SecretString=json.dumps({"hf": f"{CANARY}-hf"}))
        client.close()
        os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
        secret.load({"PLAIN": "secret://aws/plain", "HF": "secret://aws/fields#hf"})
        assert (os.environ["PLAIN"], os.environ["HF"]) == (CANARY, f"{CANARY}-hf")
        for reference, wanted in [("secret://aws/nobody", "nobody"), ("secret://aws/fields#x", "a field x")]:
            with pytest.raises(ConfigError, match=wanted):
                secret.load({"NAME": reference})


def test_from_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/api/v1/namespaces/team-a/secrets/store"
            allowed = self.headers["Authorization"] == "Bearer pod-token"
            self.send_response(200 if known and allowed else 404 if allowed else 403)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"key": base64.b64encode(CANARY.encode()).decode()}}).encode())

        def log_message(self, *parts: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, text in [("namespace", "team-a"), ("token", "pod-token"), ("ca.crt", Path(certifi.where()).read_text())]:
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(secret, "_ACCOUNT", tmp_path)
    monkeypatch.setattr(secret, "_API", f"http://127.0.0.1:{server.server_port}")
    secret.load({"KEY": "secret://kubernetes/store/key"})
    assert os.environ["KEY"] == CANARY
    with pytest.raises(ConfigError, match="has no key other; it has key"):
        secret.load({"KEY": "secret://kubernetes/store/other"})
    with pytest.raises(ConfigError, match="answers 404"):
        secret.load({"KEY": "secret://kubernetes/nobody/key"})
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "value", ["plain", "secret://", "secret://env/", "secret://vault/x", "secret://kubernetes/only-a-name", "env/X"]
)
def test_a_reference_that_names_no_place_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"HF_TOKEN: write (where|secret)"):
        load(RECIPE, Recipe, [f"secrets.HF_TOKEN={value}", "store=file:///x"])


@pytest.mark.parametrize(
    "value",
    [
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "hf_" + "a1B2" * 9,
        "ghp_" + "x" * 36,
        "glpat-" + "y" * 20,
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "s3://user:" + "pass@host/bucket",
    ],
)
@pytest.mark.parametrize("key", ["secrets.HF_TOKEN", "publish.name", "data.train.0", "store"])
def test_a_value_that_looks_like_a_secret_is_refused_and_not_repeated(value: str, key: str) -> None:
    override = f'data.train=["{value}"]' if key == "data.train.0" else f'{key}="{value}"'
    with pytest.raises(ConfigError, match="looks like a secret") as error:
        load(RECIPE, Recipe, [override])
    assert value not in str(error.value)


@pytest.mark.parametrize("text", ["s3://bucket/prefix", "Qwen/Qwen3-8B", "hf://datasets/a/b", "sk-learn", "a@b:c", ""])
def test_what_is_no_secret_is_let_through(text: str) -> None:
    assert not secret.looks_like_one(text)
