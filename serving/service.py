"""The application as a RayService names it: `import_path: serving.service:application`.

KubeRay gives Serve a config of its own form, with arguments as plain mappings. Serve calls this on the cluster, in an
image that holds Luthier. Without `from __future__ import annotations`, because Serve reads the argument's type at run
time and would hand over the raw mapping unchecked.
"""

from pathlib import Path

from ray.serve import Application

from cluster import models
from cluster.config import Config, load
from cluster.store import open_store
from serving.app import build
from serving.config import ServingConfig
from serving.permits import Permits


class Arguments(Config):
    """What the RayService says: a serving config in the image, and `key=value` for it."""

    config: str
    overrides: tuple[str, ...] = ()


def application(arguments: Arguments) -> Application:
    """What `luthier serving deploy` would deploy. Raises ConfigError and ModelError before anything is started."""
    config = load(Path(arguments.config), ServingConfig, arguments.overrides)
    store, permits = open_store(config.store), Permits.here(config)
    permits.check(None)
    base = models.pin(config.model, store, permits.base)
    return build(config, base, licences=permits.with_base(models.artefacts(store, base)))
