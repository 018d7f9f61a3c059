"""Microsoft Azure: a cluster-launcher file, and the head's rights.

Ray's own provider makes a network whose security group lets SSH in from anywhere, and an identity that is Contributor
of the whole resource group. `azure_provider` is Ray's without that; so everything is named here.
"""

import hashlib
from typing import Any

from cluster.launch.release import Release
from cluster.launch.spec import Azure
from cluster.launch.vm import HEAD_TYPE, Launcher, auth, head_type, launcher, worker_type

PROVIDER = "cluster.launch.azure_provider.Provider"
SDK = (
    "azure-common==1.1.28",
    "azure-identity==1.23.1",
    "azure-mgmt-compute==35.0.0",
    "azure-mgmt-network==29.0.0",
    "azure-mgmt-resource==24.0.0",
    "msrestazure==0.6.4.post1",
)
"""What Ray's provider needs on this machine and in the image, and Luthier's own requirements don't have."""


def launcher_file(name: str, provider: Azure, release: Release) -> Launcher:
    """What `ray up` reads."""
    where = {
        "type": "external",
        "module": PROVIDER,
        "location": provider.location,
        "resource_group": provider.resource_group,
        "subscription_id": provider.subscription,
        # Ray names machines by it; four characters, as its own bootstrap makes them.
        "unique_id": hashlib.sha256(f"{provider.resource_group}/{name}".encode()).hexdigest()[:4],
        "msi": provider.identity,
        "nsg": provider.network_security_group,
        "subnet": provider.subnet,
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
        "availability_zone": "auto",
    }
    head = provider.head
    types = {HEAD_TYPE: head_type(_machine(provider, head.type, head.disk_gb))}
    for group_name, group in provider.groups.items():
        machine = _machine(provider, group.type, group.disk_gb)
        if group.market == "spot":
            machine["azure_arm_parameters"] |= {"priority": "Spot", "billingProfile": {"maxPrice": -1}}
        types[group_name] = worker_type(group, machine)
    nodes = {"auth": auth(provider.access), "available_node_types": types}
    return launcher(name, provider, where, nodes, release)


def _machine(provider: Azure, machine_type: str, disk_gb: int) -> dict[str, Any]:
    """Parameters of Ray's ARM template for machines."""
    return {
        "azure_arm_parameters": {
            "vmSize": machine_type,
            "imageId": provider.disk_image,
            "osDiskSize": disk_gb,
            "adminUsername": provider.access.user,
            "publicKey": provider.public_key,
        }
    }


def head_role(name: str, provider: Azure) -> dict[str, Any]:
    """A custom role for the identity: `az role definition create` takes it."""
    group = f"/subscriptions/{provider.subscription}/resourceGroups/{provider.resource_group}"
    return {
        "Name": f"Luthier cluster {name}: head",
        "IsCustom": True,
        "Description": "Start and end the machines of one cluster.",
        "Actions": [
            "Microsoft.Resources/subscriptions/resourceGroups/read",
            "Microsoft.Resources/deployments/read",
            "Microsoft.Resources/deployments/write",
            "Microsoft.Resources/deployments/operationstatuses/read",
            "Microsoft.Compute/skus/read",
            *(f"Microsoft.Compute/virtualMachines/{verb}" for verb in ("read", "write", "delete")),
            *(f"Microsoft.Compute/disks/{verb}" for verb in ("read", "write", "delete")),
            "Microsoft.Compute/images/read",
            "Microsoft.Compute/galleries/images/versions/read",
            *(f"Microsoft.Network/networkInterfaces/{verb}" for verb in ("read", "write", "delete", "join/action")),
            "Microsoft.Network/virtualNetworks/subnets/join/action",
            "Microsoft.Network/networkSecurityGroups/join/action",
            "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action",
        ],
        "AssignableScopes": [group],
    }
