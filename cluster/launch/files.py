"""All files of a cluster, from its `configs/clusters/NAME.yaml`, and where they are written."""

import json
from pathlib import Path
from typing import Any, assert_never

import yaml

from cluster.errors import ConfigError, Fault
from cluster.launch import aws, azure, gcp, kube, ssh
from cluster.launch.container import container_file
from cluster.launch.release import Release
from cluster.launch.spec import Aws, Azure, Gcp, Kubernetes, OnPremises, Provider
from cluster.place import ClusterConfig

LAUNCHER = "cluster.yaml"
"""What `ray up` reads."""

POLICY = "network-policy.yaml"
CLUSTER = "raycluster.yaml"
JOB = "rayjob.yaml"
SERVICE = "rayservice.yaml"
CONTAINER = "Dockerfile"

_FIRST_LINE = "# Made by `luthier cluster files {name}` from configs/clusters/{name}.yaml: change that one.\n"


def provider_of(cluster: ClusterConfig) -> Provider:
    """The provider section. Raises ConfigError when there is none."""
    if cluster.provider is None:
        message = "missing; this cluster is there already, or only on this machine. configs/clusters/ has examples"
        raise ConfigError([Fault(f"cluster {cluster.name}", "provider", message)])
    return cluster.provider


def make_files(
    cluster: ClusterConfig,
    release: Release,
    here: str = ".",
    recipe: str | None = None,
    serving: str | None = None,
    store: str | None = None,
) -> dict[str, str]:
    """File names and their texts.

    Args:
        here: the folder that they will lie in, for the commands in their comments.
        recipe: a recipe's path below the checkout: on Kubernetes also a RayJob that trains it.
        serving: a serving config's path below the checkout: on Kubernetes also a RayService.
        store: what the two are told to use.

    Raises:
        ConfigError: no provider, or something that this provider has no file for.
    """
    provider = provider_of(cluster)
    name = cluster.name
    if (recipe or serving) and not isinstance(provider, Kubernetes):
        message = f"{recipe or serving}: only Kubernetes has a file for it; submit to this cluster with `luthier jobs`"
        raise ConfigError([Fault(f"cluster {name}", "provider.kind", message)])
    documents: dict[str, Any]
    match provider:
        case Aws():
            documents = {
                LAUNCHER: aws.launcher_file(name, provider, release),
                "iam-head.json": aws.head_policy(name, provider),
            }
        case Gcp():
            documents = {
                LAUNCHER: gcp.launcher_file(name, provider, release),
                "gcp-head-role.yaml": gcp.head_role(name),
            }
        case Azure():
            documents = {
                LAUNCHER: azure.launcher_file(name, provider, release),
                "azure-role.json": azure.head_role(name, provider),
            }
        case OnPremises():
            documents = {LAUNCHER: ssh.launcher_file(name, provider, release)}
        case Kubernetes():
            documents = {
                POLICY: kube.network_policy(name, provider),
                CLUSTER: kube.ray_cluster(name, provider, release),
                **({JOB: kube.ray_job(name, provider, release, recipe, store)} if recipe else {}),
                **({SERVICE: kube.ray_service(name, provider, release, serving, store)} if serving else {}),
            }
        case _:
            assert_never(provider)
    texts = {file: _text(name, file, document) for file, document in documents.items()}
    container = container_file(name, provider, release, here)
    return texts | ({CONTAINER: container} if container else {})


def write_files(texts: dict[str, str], folder: Path) -> list[Path]:
    """Write them, and return their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            (folder / file).write_text(text)
    except OSError as error:
        raise ConfigError([Fault("command line", "--out", f"cannot write to {folder}: {error.strerror}")]) from None
    return [folder / file for file in texts]


def _text(name: str, file: str, document: Any) -> str:
    if file.endswith(".json"):
        return json.dumps(document, indent=2) + "\n"
    return _FIRST_LINE.format(name=name) + yaml.dump(document, Dumper=_Plain, sort_keys=False, width=120)


class _Plain(yaml.SafeDumper):
    """YAML without anchors: what stands twice is written twice, for whoever reads or changes it."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True
