"""An audit as a CycloneDX 1.6 ML-BOM: a component for each thing that is stored and each that it was made from.

https://cyclonedx.org/docs/1.6/json/. Licences are given by SPDX id where they have one, else by name.
"""

from collections.abc import Sequence
from typing import Any

from cluster import __version__
from cluster.licences.audit import Row
from cluster.licences.facts import Facts, is_uninformative
from cluster.records import Artefact, now

_NAMESPACE = "luthier:licence"


def bom(rows: Sequence[Row], facts: Facts) -> dict[str, Any]:
    """The document, as plain data."""
    components: dict[str, dict[str, Any]] = {}
    depends: dict[str, list[str]] = {}
    for row in rows:
        ref = f"{row.kind}:{row.name}@{row.version}"
        components[ref] = _stored(ref, row, facts)
        depends[ref] = []
        for artefact in row.artefacts:
            if artefact.name == row.name and artefact.kind == row.kind:
                continue
            origin = f"{artefact.kind}:{artefact.name}"
            components.setdefault(origin, _origin(origin, artefact, facts))
            middle = next((each for each in row.artefacts if each.name == artefact.of), None)
            is_row = middle is None or (middle.name, middle.kind) == (row.name, row.kind)
            above = depends[ref] if is_row or middle is None else depends.setdefault(f"{middle.kind}:{middle.name}", [])
            if origin not in above:
                above.append(origin)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": now(),
            "tools": {"components": [{"type": "application", "name": "luthier", "version": __version__}]},
        },
        "components": list(components.values()),
        "dependencies": [{"ref": ref, "dependsOn": found} for ref, found in depends.items()],
    }


def _stored(ref: str, row: Row, facts: Facts) -> dict[str, Any]:
    held = sorted({licence for judged in row.judgements for licence in judged.licences})
    found = _component(ref, "data" if row.kind in ("data", "run") else "machine-learning-model", row.name)
    found["version"] = row.version
    if held:
        found["licenses"] = [_licence(each, facts) for each in held]
    if len(row.digest) == 64:
        found["hashes"] = [{"alg": "SHA-256", "content": row.digest}]
    said = [(f"{_NAMESPACE}:verdict:{each.use}", str(each.level)) for each in row.judgements]
    for judged in row.judgements:
        said += [(f"{_NAMESPACE}:reason:{judged.use}", str(reason)) for reason in judged.reasons]
        said += [(f"{_NAMESPACE}:duty:{judged.use}", str(duty)) for duty in judged.duties]
    if row.problem:
        said.append((f"{_NAMESPACE}:problem", row.problem))
    found["properties"] = [{"name": name, "value": value} for name, value in said]
    return found


def _origin(ref: str, artefact: Artefact, facts: Facts) -> dict[str, Any]:
    found = _component(ref, "data" if artefact.kind == "data" else "machine-learning-model", artefact.name)
    if not is_uninformative(artefact.licence):
        found["licenses"] = [_licence(str(artefact.licence), facts)]
    found["properties"] = [{"name": f"{_NAMESPACE}:declared", "value": artefact.licence or "not stated"}]
    return found


def _component(ref: str, kind: str, name: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": ref, "name": name}


def _licence(tag: str, facts: Facts) -> dict[str, Any]:
    row = facts.find(tag)
    name = row.id if row else tag
    # SPDX ids begin with a capital; those of the Hub and our own do not, and the format refuses unknown ids.
    is_spdx = row is not None and row.id[:1].isupper()
    return {"license": {"id" if is_spdx else "name": name}}
