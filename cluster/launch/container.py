"""The container file that every node runs: the packages of the checkout, with what `requirements.lock` pins.

It holds Luthier too, so that a RayJob and a RayService need nothing else; what a submitted job ships comes first. It is
installed as the source that it is, because a wheel would leave out what is no Python (`serving/engine/kernels.c`).
"""

from cluster.launch import azure, gcp
from cluster.launch.release import Release
from cluster.launch.spec import Azure, Gcp, OnPremises, Provider

_FILE = """\
# Made by `luthier cluster files {name}`, for Ray {ray} and Python {python}. From a checkout of Luthier:
#   docker build --tag REGISTRY/luthier:TAG --file {here}/Dockerfile . && docker push REGISTRY/luthier:TAG
#   docker inspect --format '{{{{index .RepoDigests 0}}}}' REGISTRY/luthier:TAG    (the cluster's `image`)
FROM {base}

# g++ for Luthier's and DeepSpeed's operations; ssh and rsync for Ray's autoscaler; wget for KubeRay's probes;
# procps for what starts our watchers again.
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends g++ openssh-client procps rsync wget \\
 && rm -rf /var/lib/apt/lists/* \\
 && useradd --create-home --uid 1000 ray

WORKDIR /opt/luthier
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY cluster cluster
COPY jobs jobs
COPY serving serving
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements.lock --editable {packages} \\
 && python -c '{check}'

# What the NVIDIA runtime gives to the container; RAY_* is said again by whatever starts Ray.
ENV HOME=/home/ray NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \\
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
USER 1000
"""


def container_file(name: str, provider: Provider, release: Release, here: str) -> str | None:
    """The Dockerfile, or None where nodes run no container or no base is given. `here` is the folder it will be in."""
    if isinstance(provider, OnPremises) or provider.base_image is None:
        return None
    sdk = gcp.SDK if isinstance(provider, Gcp) else azure.SDK if isinstance(provider, Azure) else ()
    return _FILE.format(
        name=name,
        ray=release.ray,
        python=release.python,
        here=here,
        base=provider.base_image,
        packages=" ".join([".", *sdk]),
        check=release.check,
    )
