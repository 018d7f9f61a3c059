"""Make schemas.json from KubeRay's CRDs: one JSON schema per kind, closed, without descriptions, each part once.

    python -m tests.cluster.kuberay.compact KUBERAY_CHECKOUT/ray-operator/config/crd/bases VERSION COMMIT

The CRDs are 3.4 MB, because each holds several copies of the pod's schema. Equal parts become one `$defs` entry; an
object that names its properties takes no others (`additionalProperties: false`), as the API server's strict field
validation does; Kubernetes' `int-or-string` becomes a JSON type. Defaults, formats and rules (`x-kubernetes-…`) stay.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 53},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
SHORT = 200
"""Parts shorter than this, in characters, stay where they are."""


def compact(folder: Path, version: str, commit: str) -> dict[str, Any]:
    """All kinds in one document."""
    parts: dict[str, Any] = {}
    kinds = {}
    for kind, plural in KINDS.items():
        crd = yaml.load((folder / f"ray.io_{plural}.yaml").read_text(), yaml.CSafeLoader)
        schema = next(v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
        del schema["properties"]["status"]
        schema["properties"] |= {
            "metadata": METADATA,
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
        }
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        kinds[kind] = _share(_close(schema), parts)
        if kind == "RayCluster":
            kinds["NetworkPolicy"] = _share(_close(_network_policy(schema["properties"]["spec"])), parts)
    return {
        "source": "https://github.com/ray-project/kuberay, ray-operator/config/crd/bases",
        "version": version,
        "commit": commit,
        "licence": "Apache-2.0",
        "kinds": kinds,
        "$defs": dict(sorted(parts.items())),
    }


def _network_policy(spec: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes' own NetworkPolicy as far as ingress goes, of the parts that the CRD has of it."""
    rules = spec["properties"]["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    selector = rules["items"]["properties"]["from"]["items"]["properties"]["podSelector"]
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "networking.k8s.io/v1"},
            "kind": {"const": "NetworkPolicy"},
            "metadata": METADATA,
            "spec": {
                "type": "object",
                "required": ["podSelector"],
                "properties": {
                    "podSelector": selector,
                    "policyTypes": {"type": "array", "items": {"enum": ["Ingress"]}},
                    "ingress": rules,
                },
            },
        },
    }


def _close(schema: Any) -> Any:
    """The schema as JSON schema: closed, and without words for people."""
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("description"), str):
        schema = {key: value for key, value in schema.items() if key != "description"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {key: schema[key] for key in ("pattern",) if key in schema}
    closed = {key: _close(value) for key, value in schema.items()}
    names = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if names and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _share(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with its larger parts moved to `parts`, named by what they are."""
    if isinstance(schema, list):
        return [_share(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    shared = {key: _share(value, parts) for key, value in schema.items()}
    text = json.dumps(shared, sort_keys=True)
    if "type" not in shared or not isinstance(shared["type"], str) or len(text) < SHORT:
        return shared
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    parts[name] = shared
    return {"$ref": f"#/$defs/{name}"}


if __name__ == "__main__":
    made = compact(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    Path(__file__).with_name("schemas.json").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
