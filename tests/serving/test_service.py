"""What a RayService names is what `luthier serving deploy` would deploy, with its arguments checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_serve_does
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from cluster.config import load
from cluster.errors import ModelError
from cluster.launch import kube
from cluster.launch.release import Release
from cluster.launch.spec import Kubernetes
from cluster.models import ModelConfig, mirror
from cluster.place import ClusterConfig
from cluster.store import open_store

if TYPE_CHECKING:
    from tests.conftest import TinyModels

CONFIGS = Path(__file__).parents[2] / "configs"


def named(store: str) -> ServeApplicationSchema:
    """The application of a generated RayService, as Serve reads it."""
    provider = load(CONFIGS / "clusters" / "kubernetes.yaml", ClusterConfig).provider
    assert isinstance(provider, Kubernetes)
    service = kube.ray_service("k", provider, Release.read(), str(CONFIGS / "serving" / "tiny.yaml"), store)
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    return application


def test_the_generated_service_builds_our_application(tmp_path: Path, tiny_models: "TinyModels") -> None:
    store = f"file://{tmp_path / 'store'}"
    application = named(store)
    builder = import_attr(application.import_path)
    with pytest.raises(ModelError, match="holds no model tiny-orders"):
        build_as_serve_does(builder, application.args)
    mirror(load(CONFIGS / "models" / "tiny-orders.yaml", ModelConfig), tiny_models["qwen3"], open_store(store))
    built = build_as_serve_does(builder, application.args)
    assert isinstance(built, Application)
    deployment = built._bound_deployment
    config, base, _ = deployment.init_args
    assert (deployment.name, config.store, base.name) == ("ingress", store, "tiny-orders")


@pytest.mark.parametrize("arguments", [{}, {"config": "x.yaml", "store": "s3://b"}, {"config": 1}])
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build_as_serve_does(import_attr("serving.service:application"), arguments)
