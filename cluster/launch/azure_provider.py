"""Ray's provider for Azure, without the open port that it makes.

`ray up` and the autoscaler on the head load it by name (`provider: {type: external, module: …}`). Ray's `bootstrap`
deploys a network whose security group lets SSH in from everywhere, and an identity that is Contributor of the resource
group. Network, security group, identity and key are named in our files, so nothing is left for it to do.
"""

from typing import Any

from ray.autoscaler._private._azure.node_provider import AzureNodeProvider


class Provider(AzureNodeProvider):  # type: ignore[misc]
    """AzureNodeProvider for a file that names its network, its identity and its key."""

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The file as it is."""
        return cluster_config

    def cleanup_cluster_resources(self) -> None:
        """Ray deletes network and identity after the last machine; here they are the account owner's, and stay."""
