"""The clusters that ship, and the files that are made of them, as documents."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import load
from cluster.launch.files import LAUNCHER, make_files
from cluster.launch.release import Release
from cluster.launch.spec import Kubernetes
from cluster.place import ClusterConfig

ROOT = Path(__file__).parents[2]
RECIPE = "configs/recipes/support.yaml"
SERVING = "configs/serving/qwen3-8b.yaml"
STORE = "s3://bucket/prefix"


def shipped(*kinds: str) -> list[str]:
    """Names of the clusters that are made with one of these providers, or any."""
    found = []
    for path in sorted((ROOT / "configs" / "clusters").glob("*.yaml")):
        provider = yaml.safe_load(path.read_text()).get("provider")
        if provider and provider["kind"] in (kinds or (provider["kind"],)):
            found.append(path.stem)
    return found


CLOUDS = shipped("aws", "gcp", "azure")
LAUNCHED = [*CLOUDS, *shipped("ssh")]
PODS = shipped("kubernetes")


def cluster(name: str, *overrides: str) -> ClusterConfig:
    return load(ROOT / "configs" / "clusters" / f"{name}.yaml", ClusterConfig, overrides)


def made(name: str, *overrides: str) -> dict[str, str]:
    config = cluster(name, *overrides)
    if isinstance(config.provider, Kubernetes):
        return make_files(config, Release.read(), recipe=RECIPE, serving=SERVING, store=STORE)
    return make_files(config, Release.read())


def launcher(name: str, *overrides: str) -> dict[str, Any]:
    return yaml.safe_load(made(name, *overrides)[LAUNCHER])


def manifests(name: str, *overrides: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for file, text in made(name, *overrides).items() if file.endswith(".yaml")]


def nodes(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value in a document, with its path."""
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from nodes(item, (*path, key))


def put(document: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at a path."""
    changed = copy.deepcopy(document)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed
