"""Rules: whether a job finds on every node what it was made on."""

import re
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cluster import env
from cluster.doctor import devices
from cluster.doctor.facts import Facts
from cluster.doctor.finding import Check, Finding, Level, Problem, fault, judged, warning
from cluster.doctor.report import Node
from cluster.launch.spec import OnPremises

_INSTALL = "pip install --constraint requirements.lock . on the node, or build its image anew"
_CUDA_PACKAGES = re.compile(r"nvidia-cuda-runtime(-cu\d+)?")


def ray_and_python(facts: Facts) -> Iterator[Finding]:
    """What one pickles, the other must be able to read."""
    ours = (facts.here.ray, facts.here.python)
    fix = "install the cluster's version here, or the one of here there; `luthier jobs submit` refuses to go on"
    if (facts.ray, _minor(facts.python)) != ours:
        seen = f"the head has Ray {facts.ray} and Python {facts.python}, this is Ray {ours[0]} and Python {ours[1]}"
        yield Finding(Check.RAY, Level.FAULT, seen, fix)

    elif not facts.answered:
        yield Finding(Check.RAY, Level.OK, f"the head has Ray {facts.ray} and Python {facts.python}, as this has")

    def judge(node: Node) -> Iterator[Problem]:
        if (node.said.packages.get("ray"), node.said.python) != (facts.ray, facts.python):
            seen = f"Ray {node.said.packages.get('ray')} and Python {node.said.python}, unlike its head"
            yield fault(seen, f"one image, or one environment, for all nodes; {_INSTALL}")

    yield from judged(Check.RAY, facts.answered, judge, f"Ray {facts.ray}, Python {facts.python}")


def packages(facts: Facts) -> Iterator[Finding]:
    """Beside what requirements.lock pins: another version that pyproject.toml takes is worth a warning."""
    here = facts.here

    def judge(node: Node) -> Iterator[Problem]:
        there = node.said.packages
        if "luthier" in there and there["luthier"] != here.luthier:
            seen = f"luthier {there['luthier']} is installed, this is {here.luthier}"
            yield warning(
                seen, "build the image anew; what a submitted job ships comes first, what runs beside does not"
            )
        for name, accepted in here.ranges.items():
            if name not in there:
                yield fault(f"{name} is not installed", _INSTALL)
            elif Version(there[name]) not in SpecifierSet(accepted):
                yield fault(f"{name} {there[name]}, and {accepted} is needed", _INSTALL)
            elif Version(there[name]).public != here.locked.get(name):
                yield warning(f"{name} {there[name]}, tested is {here.locked.get(name)}", _INSTALL)
        yield from _cuda(node)

    yield from judged(Check.PACKAGES, facts.answered, judge, "as requirements.lock pins them")


def image(facts: Facts) -> Iterator[Finding]:
    """What nodes were started from: a cluster that was changed, or a tag that has moved, leaves old ones behind."""
    provider = facts.place.provider if facts.place else None
    if provider is None or isinstance(provider, OnPremises):
        return
    wanted = provider.image
    unknown = [str(node) for node in facts.answered if env.LUTHIER_IMAGE not in node.said.variables]
    if unknown:
        seen = f"a container does not know its image, and {env.LUTHIER_IMAGE} is not set: it was started by other files"
        yield Finding(Check.IMAGE, Level.NOT_CHECKED, seen, nodes=tuple(unknown))

    def judge(node: Node) -> Iterator[Problem]:
        if (there := node.said.variables[env.LUTHIER_IMAGE]) != wanted:
            yield fault(f"it was started from {there}, and the file says {wanted}", "luthier cluster up NAME")

    known = [node for node in facts.answered if env.LUTHIER_IMAGE in node.said.variables]
    yield from judged(Check.IMAGE, known, judge, wanted)


def _cuda(node: Node) -> Iterator[Problem]:
    """Whether torch was built for the GPUs' driver. CUDA keeps to what it was within a major version."""
    gpus = devices.parse(node.said.nvidia_smi) if node.said.nvidia_smi else devices.Gpus()
    torch = node.said.packages.get("torch", "")
    if not gpus.gpus or not torch:
        return
    if torch.endswith("+cpu"):
        yield fault(f"torch {torch} knows no GPU, and the node has {len(gpus.gpus)}", "install the build for CUDA")
        return
    built = re.search(r"\+cu(\d+)\d$", torch)
    runtimes = [version for name, version in node.said.packages.items() if _CUDA_PACKAGES.fullmatch(name)]
    needs = built[1] if built else max((version.split(".")[0] for version in runtimes), default="")
    takes = gpus.cuda.split(".")[0]
    if needs and takes and int(needs) > int(takes):
        seen = f"torch {torch} is for CUDA {needs}, driver {gpus.driver} takes CUDA {gpus.cuda}"
        yield fault(seen, f"a driver for CUDA {needs}, or torch's build for CUDA {takes}")


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])
