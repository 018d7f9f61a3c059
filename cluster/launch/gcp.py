"""Google Cloud: a cluster-launcher file, and the head's rights.

Ray's own provider makes a service account with `compute.admin` over the whole project at each `ray up`, and gives
machines a public address. `gcp_provider` is Ray's without that; so everything is named here.
"""

from typing import Any

from cluster.launch.release import Release
from cluster.launch.spec import Gcp
from cluster.launch.vm import HEAD_TYPE, Launcher, auth, head_type, launcher, worker_type

PROVIDER = "cluster.launch.gcp_provider.Provider"
SDK = ("google-api-python-client==2.202.0", "google-auth-httplib2==0.4.4")
"""What Ray's provider needs on this machine and in the image, and Luthier's own requirements don't have."""

_TUNNEL = "gcloud compute start-iap-tunnel %h %p --listen-on-stdin --project={project} --zone={zone}"


def launcher_file(name: str, provider: Gcp, release: Release) -> Launcher:
    """What `ray up` reads."""
    where = {
        "type": "external",
        "module": PROVIDER,
        "region": provider.zone.rpartition("-")[0],
        "availability_zone": provider.zone,
        "project_id": provider.project,
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    head = provider.head
    types = {HEAD_TYPE: head_type(_machine(provider, head.type, head.disk_gb, provider.head_account))}
    for group_name, group in provider.groups.items():
        machine = _machine(provider, group.type, group.disk_gb, provider.worker_account)
        if group.market == "spot":
            machine["scheduling"] |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        types[group_name] = worker_type(group, machine)
    tunnel = _TUNNEL.format(project=provider.project, zone=provider.zone)
    nodes = {"auth": auth(provider.access, tunnel), "available_node_types": types}
    return launcher(name, provider, where, nodes, release)


def _machine(provider: Gcp, machine_type: str, disk_gb: int, account: str) -> dict[str, Any]:
    """Compute Engine's `instances.insert`. Without accessConfigs there is no public address."""
    return {
        "machineType": machine_type,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {"diskSizeGb": str(disk_gb), "sourceImage": provider.disk_image},
            }
        ],
        "networkInterfaces": [{"subnetwork": provider.subnetwork}],
        "serviceAccounts": [{"email": account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}],
        # Machines with GPUs cannot be moved while they run, and Ray replaces what is gone.
        "scheduling": {"onHostMaintenance": "TERMINATE", "automaticRestart": False},
        "metadata": {
            "items": [
                {"key": "ssh-keys", "value": f"{provider.access.user}:{provider.public_key}"},
                {"key": "block-project-ssh-keys", "value": "true"},
            ]
        },
    }


def head_role(name: str) -> dict[str, Any]:
    """A custom role for the head's account: what Ray's provider calls, and nothing else.

    `gcloud iam roles create` takes it. The head's account also needs `roles/iam.serviceAccountUser` on the workers'.
    """
    instances = "create delete get list setLabels setMetadata setServiceAccount setTags"
    return {
        "title": f"Luthier cluster {name}: head",
        "stage": "GA",
        "includedPermissions": [
            *(f"compute.instances.{verb}" for verb in instances.split()),
            "compute.disks.create",
            "compute.images.useReadOnly",
            "compute.subnetworks.use",
            "compute.zoneOperations.get",
        ],
    }
