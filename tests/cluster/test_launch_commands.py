"""`luthier cluster files|up|down|status|dashboard` as a person meets them: real processes, files, exit codes.

kubectl is a small script here that writes down what it was asked and answers as a Kubernetes with KubeRay does;
`ray up` on real machines is test_launch_ssh.py.
"""

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.launch import token

ROOT = Path(__file__).parents[2]
IMAGE = "registry.example/luthier@sha256:" + "1" * 64
TOKEN = "f00d" * 16

KUBECTL = f"""#!/bin/sh
echo "$@" >> "$HOME/asked"
case "$*" in
  *api-resources*) cat "$HOME/resources" ;;
  *"get pods"*) echo pod/kubernetes-head ;;
  *"get secret"*) printf %s {base64.b64encode(TOKEN.encode()).decode()} ;;
  *forbidden*) echo "no rights" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a `kubectl`, and an empty folder to work in."""
    for name in ("bin", "work"):
        (tmp_path / name).mkdir()
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    (tmp_path / "resources").write_text("rayclusters.ray.io\nrayjobs.ray.io\n")
    return tmp_path


def example(home: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A copy of a shipped cluster, as a person makes one."""
    text = (ROOT / "configs" / "clusters" / f"{name}.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    copy = home / f"{name}-{len(list(home.glob('*.yaml')))}.yaml"
    copy.write_text(text)
    return copy


def luthier(home: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = f"{home / 'bin'}:{os.environ['PATH']}" if path is None else path
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=home / "work",
        env={**inherited, "HOME": str(home), "PATH": found, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def asked(home: Path) -> list[str]:
    return (home / "asked").read_text().splitlines()


def zeros(image: str) -> tuple[str, str]:
    return f"{image}@sha256:{'0' * 64}", IMAGE


def test_up_on_kubernetes_applies_what_files_writes(home: Path) -> None:
    file = str(example(home, "kubernetes", zeros("registry.example/luthier")))
    written = luthier(home, "files", file, "--out", str(home / "read"))
    assert written.returncode == 0, written.stderr
    done = luthier(home, "up", file)
    assert done.returncode == 0, done.stderr
    applied = home / "work" / ".luthier" / "clusters" / "kubernetes"
    assert asked(home)[-1] == (
        "--namespace luthier apply -f .luthier/clusters/kubernetes/network-policy.yaml "
        "-f .luthier/clusters/kubernetes/raycluster.yaml"
    )
    assert f"kubectl {asked(home)[-1]}" in done.stdout
    for name in ("network-policy.yaml", "raycluster.yaml"):
        assert (applied / name).read_text() == (home / "read" / name).read_text()


def test_the_dashboard_of_pods_is_a_tunnel_and_its_token_a_closed_file(home: Path) -> None:
    file = str(example(home, "kubernetes", zeros("registry.example/luthier")))
    done = luthier(home, "dashboard", file, "--port", "8300")
    assert done.returncode == 0, done.stderr
    assert (
        asked(home)[-1] == "--namespace luthier port-forward --address 127.0.0.1 service/kubernetes-head-svc 8300:8265"
    )
    kept = home / ".luthier" / "clusters" / "kubernetes" / "token"
    assert kept.read_text() == TOKEN
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert f"RAY_AUTH_TOKEN_PATH={kept}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_down_and_status_on_kubernetes(home: Path) -> None:
    file = str(example(home, "kubernetes", ("namespace: luthier", "namespace: luthier\n  context: mine")))
    assert luthier(home, "status", file).returncode == 0
    assert asked(home)[-1].endswith("exec pod/kubernetes-head --container ray-head -- ray status")
    assert luthier(home, "down", file).returncode == 0
    deleted = [line.split("/")[-1] for line in asked(home) if " delete " in line]
    assert deleted == ["raycluster.yaml", "network-policy.yaml"], "pods go before the policy that guards them"
    assert all(line.startswith("--context mine --namespace luthier ") for line in asked(home))


def test_dry_run_writes_and_starts_nothing(home: Path) -> None:
    done = luthier(home, "up", str(ROOT / "configs" / "clusters" / "aws.yaml"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["cluster.yaml", "iam-head.json", "Dockerfile"]
    assert not (home / ".luthier").exists()


def test_what_is_missing_is_one_message_before_anything_costs(home: Path) -> None:
    """Each with its exit code, the place, and what to do; nothing is started."""
    (home / "resources").write_text("")
    key = home / "key"
    key.write_text("")
    own = [zeros("registry.example/luthier"), ("~/.ssh/luthier.pem", str(key))]
    no_tools = str(home / "work")
    cases = [
        (["up", "nowhere.yaml"], None, "no such file"),
        (["up", str(ROOT / "configs/clusters/cpu.yaml")], None, "provider: missing"),
        (["up", str(ROOT / "configs/clusters/aws.yaml")], None, "provider.image: still the example's"),
        (["up", str(example(home, "aws", own[0]))], None, "provider.access.private_key: no file"),
        (["up", str(example(home, "aws", *own))], no_tools, "ssh is not installed"),
        (["up", str(example(home, "kubernetes", own[0]))], None, "helm install kuberay-operator"),
        (["up", str(example(home, "kubernetes", own[0]))], no_tools, "kubectl is not installed"),
        (["files", str(example(home, "aws")), "--recipe", "r.yaml"], None, "only Kubernetes has a file for it"),
        (["status", str(example(home, "kubernetes", ("name: kubernetes", f"name: {'k' * 60}")))], None, "at most 40"),
    ]
    for arguments, path, said in cases:
        done = luthier(home, *arguments, path=path)
        assert (done.returncode, said in done.stderr) == (2, True), (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (home / ".luthier").exists()


def test_a_failing_tool_is_exit_1(home: Path) -> None:
    file = str(example(home, "kubernetes", ("namespace: luthier", "namespace: forbidden")))
    done = luthier(home, "down", file)
    assert done.returncode == 1
    assert "exit code 1" in done.stderr
    assert "no rights" in done.stderr


def test_the_token_is_made_once_and_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    environment = tmp_path / "store.env"
    environment.write_text("AWS_SECRET_ACCESS_KEY=one\n")
    environment.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        token.prepare("lab", str(environment))
    environment.chmod(0o600)
    before = os.umask(0)
    try:
        token.prepare("lab", str(environment))
        first = token.token_file("lab").read_text()
        environment.write_text("AWS_SECRET_ACCESS_KEY=two\n")
        token.prepare("lab", str(environment))
    finally:
        os.umask(before)
    assert token.token_file("lab").read_text() == first
    assert len(first) == 64
    assert (token.folder("lab") / "environment").read_text() == environment.read_text()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in token.folder("lab").iterdir()}
    assert modes == {"token": 0o600, "environment": 0o600}
    assert stat.S_IMODE(token.folder("lab").stat().st_mode) == 0o700
    token.prepare("lab", None)
    assert not (token.folder("lab") / "environment").exists()
    with pytest.raises(ConfigError, match="no file"):
        token.prepare("lab", str(tmp_path / "elsewhere"))
