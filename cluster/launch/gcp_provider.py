"""Ray's provider for Google Cloud, without the wide rights that it gives itself.

`ray up` and the autoscaler on the head load it by name (`provider: {type: external, module: …}`). Ray's `bootstrap`
makes a service account, binds `compute.admin` and `storage.objectAdmin` to it for the whole project, and picks a
subnet and a key. All of these are named in our files, so nothing is left for it to do.
"""

from typing import Any

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider


class Provider(GCPNodeProvider):  # type: ignore[misc]
    """GCPNodeProvider for a file in which every machine names its account, its subnet and its key."""

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The file as it is."""
        return cluster_config
