"""`ray` and `kubectl`, run on the generated files. Each command is printed before it runs, as you would type it."""

import base64
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ConfigError, Fault, PlanError, RunFailed
from cluster.launch import azure, gcp, kube, token
from cluster.launch.files import CLUSTER, LAUNCHER, POLICY, provider_of
from cluster.launch.release import ROOT
from cluster.launch.spec import Aws, Azure, Gcp, Kubernetes, OnPremises, Provider
from cluster.launch.vm import environment
from cluster.logs import say
from cluster.place import ClusterConfig

_PLACEHOLDER = re.compile(r"@sha256:0{64}")
_OPERATOR = (
    "helm install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm/ "
    f"--version {kube.KUBERAY} --namespace {{namespace}} --create-namespace"
)


def up(cluster: ClusterConfig, folder: Path, yes: bool) -> None:
    """Start the cluster, or change it to what its files say now. Without `yes`, Ray asks before it starts machines.

    Raises:
        ConfigError: the image is still the example's; a file that is named is missing.
        PlanError: a tool, an SDK or KubeRay is missing.
        RunFailed: the tool failed; it has said why.
    """
    provider = provider_of(cluster)
    _check(cluster.name, provider)
    if isinstance(provider, Kubernetes):
        kubectl = _kubectl(provider)
        _check_operator(provider, kubectl)
        _run([*kubectl, "apply", "-f", str(folder / POLICY), "-f", str(folder / CLUSTER)])
        return
    token.prepare(cluster.name, provider.environment_file)
    # Ray's cache of what it looked up in the cloud outlives changes there.
    _run([_ray(), "up", *(["--yes"] if yes else []), "--no-config-cache", str(folder / LAUNCHER)])


def down(cluster: ClusterConfig, folder: Path, yes: bool) -> None:
    """End the cluster: its machines (over SSH: what runs on them), or its pods. Raises as `up` does."""
    provider = provider_of(cluster)
    if isinstance(provider, Kubernetes):
        # Pods leave before the policy that guards them.
        for file in (CLUSTER, POLICY):
            _run([*_kubectl(provider), "delete", "--ignore-not-found", "--wait", "-f", str(folder / file)])
        return
    _check(cluster.name, provider)
    if isinstance(provider, OnPremises):
        # `ray down` looks for `ray` on the head's PATH, and would leave all running. Workers end with their head.
        _run([_ray(), "exec", str(folder / LAUNCHER), f"{_ray_on(provider)} stop"])
    _run([_ray(), "down", *(["--yes"] if yes else []), str(folder / LAUNCHER)])


def status(cluster: ClusterConfig, folder: Path) -> None:
    """Nodes, what they offer, and what is asked for, as the cluster's own `ray status` says. Raises as `up` does."""
    provider = provider_of(cluster)
    if isinstance(provider, Kubernetes):
        kubectl = _kubectl(provider)
        head = f"ray.io/cluster={cluster.name},ray.io/node-type=head"
        found = _read([*kubectl, "get", "pods", "--selector", head, "--output", "name"]).split()
        if not found:
            raise PlanError(f"no head of {cluster.name} in {provider.namespace}: luthier cluster up {cluster.name}")
        _run([*kubectl, "exec", found[0], "--container", "ray-head", "--", "ray", "status"])
        return
    _check(cluster.name, provider)
    inside = f"{environment(provider.usage_stats)} {_ray_on(provider)} status"
    _run([_ray(), "exec", str(folder / LAUNCHER), inside])


def dashboard(cluster: ClusterConfig, folder: Path, port: int) -> None:
    """Hold a tunnel from this machine's loopback to the dashboard, until it is interrupted. Raises as `up` does."""
    provider = provider_of(cluster)
    name = cluster.name
    if isinstance(provider, Kubernetes):
        kubectl = _kubectl(provider)
        secret = _read([*kubectl, "get", "secret", name, "--output", "jsonpath={.data.auth_token}"])
        token.write(token.token_file(name), base64.b64decode(secret).decode())
        tunnel = [*kubectl, "port-forward", "--address", "127.0.0.1", f"service/{name}-head-svc"]
        command = [*tunnel, f"{port}:{kube.DASHBOARD_PORT}"]
    else:
        _check(name, provider)
        command = [_ray(), "dashboard", "--port", str(port), str(folder / LAUNCHER)]
    say("in another shell:")
    say(
        f"  export RAY_ADDRESS=http://127.0.0.1:{port} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token.token_file(name)}"
    )
    with contextlib.suppress(KeyboardInterrupt):  # how a tunnel ends
        _run(command)


def _check(name: str, provider: Provider) -> None:
    """Whatever can be known to fail before a machine costs anything."""
    place = f"cluster {name}"
    if not isinstance(provider, OnPremises) and _PLACEHOLDER.search(provider.image):
        message = f"still the example's; build and push your own (luthier cluster files {name}), and write its digest"
        raise ConfigError([Fault(place, "provider.image", message)])
    if isinstance(provider, Kubernetes):
        return
    key = Path(provider.access.private_key).expanduser()
    if not key.is_file():
        raise ConfigError([Fault(place, "provider.access.private_key", f"no file {key}")])
    if isinstance(provider, Gcp):
        _check_sdk("googleapiclient", gcp.SDK)
    if isinstance(provider, Azure):
        _check_sdk("azure.mgmt.compute", azure.SDK)
    for tool in ("ssh", "rsync", *(_tunnel_tools(provider))):
        if shutil.which(tool) is None:
            raise PlanError(f"{tool} is not installed; Ray's cluster launcher reaches the machines with it")


def _tunnel_tools(provider: Provider) -> Sequence[str]:
    if isinstance(provider, Aws) and provider.access.via == "cloud":
        return ("aws", "session-manager-plugin")
    if isinstance(provider, Gcp) and provider.access.via == "cloud":
        return ("gcloud",)
    return ()


def _check_sdk(module: str, packages: Sequence[str]) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package around it is missing
        found = None
    if found is None:
        raise PlanError(f"Ray's provider needs the cloud's SDK: pip install {' '.join(packages)}")


def _check_operator(provider: Kubernetes, kubectl: list[str]) -> None:
    resources = _read([*kubectl, "api-resources", "--api-group=ray.io", "--output", "name"]).split()
    if "rayclusters.ray.io" not in resources:
        install = _OPERATOR.format(namespace=provider.operator_namespace)
        raise PlanError(f"KubeRay is not installed on this Kubernetes cluster: {install}")


def _kubectl(provider: Kubernetes) -> list[str]:
    if shutil.which("kubectl") is None:
        raise PlanError("kubectl is not installed; https://kubernetes.io/docs/tasks/tools/")
    context = ["--context", provider.context] if provider.context else []
    return ["kubectl", *context, "--namespace", provider.namespace]


def _ray_on(provider: Aws | Gcp | Azure | OnPremises) -> str:
    """What `ray` is called on the cluster's machines."""
    return f"{provider.venv.rstrip('/')}/bin/ray" if isinstance(provider, OnPremises) else "ray"


def _ray() -> str:
    """The `ray` of the Python that runs, so that no other version speaks to the cluster."""
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        raise PlanError(f"no `ray` beside {sys.executable}; run luthier from the environment that scripts/setup makes")
    return found


def _environment() -> dict[str, str]:
    """For Ray's own commands: our providers can be imported, and nothing is reported to anybody."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


def _run(command: list[str]) -> None:
    say(shlex.join([Path(command[0]).name, *command[1:]]))
    code = subprocess.run(command, env=_environment()).returncode
    if code:
        raise RunFailed(f"`{Path(command[0]).name} {command[1]}` failed with exit code {code}; what it says is above")


def _read(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise PlanError(f"`{shlex.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
