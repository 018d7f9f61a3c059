"""Amazon Web Services: a cluster-launcher file, and the head's rights.

Whatever Ray would make by itself is named instead. Ray's own security group lets SSH in from anywhere, its own role
may do everything with EC2 and S3, and its own image is of 2023; none of them is made when these are given.
"""

from typing import Any

from cluster.launch.release import Release
from cluster.launch.spec import Aws
from cluster.launch.vm import HEAD_TYPE, Launcher, auth, head_type, launcher, worker_type

_TUNNEL = (
    "aws ssm start-session --region {region} --target %h --document-name AWS-StartSSHSession --parameters portNumber=%p"
)
_RAYS_TAG = "ray-cluster-name"


def launcher_file(name: str, provider: Aws, release: Release) -> Launcher:
    """What `ray up` reads."""
    where = {
        "type": "aws",
        "region": provider.region,
        "use_internal_ips": True,
        # A stopped node still costs its disk, and a spot node cannot be stopped.
        "cache_stopped_nodes": False,
    }
    head = provider.head
    types = {HEAD_TYPE: head_type(_machine(provider, head.type, head.disk_gb, provider.head_profile))}
    for group_name, group in provider.groups.items():
        machine = _machine(provider, group.type, group.disk_gb, provider.worker_profile)
        if group.market == "spot":
            machine["InstanceMarketOptions"] = {"MarketType": "spot"}
        types[group_name] = worker_type(group, machine)
    tunnel = _TUNNEL.format(region=provider.region)
    nodes = {"auth": auth(provider.access, tunnel), "available_node_types": types}
    return launcher(name, provider, where, nodes, release)


def _machine(provider: Aws, machine_type: str, disk_gb: int, profile: str) -> dict[str, Any]:
    """EC2's RunInstances, in Ray's spelling (SubnetIds is Ray's: each subnet is tried in turn)."""
    return {
        "InstanceType": machine_type,
        "ImageId": provider.ami,
        "KeyName": provider.key_name,
        "SubnetIds": list(provider.subnets),
        "SecurityGroupIds": list(provider.security_groups),
        "IamInstanceProfile": {"Name": profile},
        "InstanceInitiatedShutdownBehavior": "terminate",
        # A container on the host's network is one hop away; without a session token nobody gets the role's keys.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": disk_gb, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True},
            }
        ],
    }


def head_policy(name: str, provider: Aws, account: str = "ACCOUNT", worker_role: str = "WORKER_ROLE") -> dict[str, Any]:
    """The IAM policy of the head's role: start and end this cluster's machines, and nothing else.

    `account` and `worker_role` (the role in `worker_profile`) are what only the account's owner knows.
    """
    region = provider.region
    arn = f"arn:aws:ec2:{region}:{account}"
    own = {"StringEquals": {f"aws:ResourceTag/{_RAYS_TAG}": name}}
    tagged = {"StringEquals": {f"aws:RequestTag/{_RAYS_TAG}": name}}
    types = sorted({group.type for group in provider.groups.values()})
    reached = {
        "Sid": "BeReachedThroughSessionManager",
        "Effect": "Allow",
        "Action": [
            "ssm:UpdateInstanceInformation",
            *(f"ssmmessages:{verb}{kind}Channel" for verb in ("Create", "Open") for kind in ("Control", "Data")),
        ],
        "Resource": "*",  # Session Manager knows no narrower resource for these
    }
    return {
        "Version": "2012-10-17",
        "Statement": [
            *([reached] if provider.access.via == "cloud" else []),
            {
                "Sid": "Look",
                "Effect": "Allow",
                "Action": ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeSubnets"],
                "Resource": "*",  # EC2 knows no narrower resource for these
                "Condition": {"StringEquals": {"aws:RequestedRegion": region}},
            },
            {
                "Sid": "StartWorkers",
                "Effect": "Allow",
                "Action": "ec2:RunInstances",
                "Resource": f"{arn}:instance/*",
                "Condition": {"StringEquals": tagged["StringEquals"] | {"ec2:InstanceType": types}},
            },
            {
                "Sid": "WithTheseParts",
                "Effect": "Allow",
                "Action": "ec2:RunInstances",
                "Resource": [
                    f"arn:aws:ec2:{region}::image/{provider.ami}",
                    f"{arn}:key-pair/{provider.key_name}",
                    f"{arn}:network-interface/*",
                    f"{arn}:volume/*",
                    *(f"{arn}:subnet/{subnet}" for subnet in provider.subnets),
                    *(f"{arn}:security-group/{group}" for group in provider.security_groups),
                ],
            },
            {
                "Sid": "NameThemAtTheirStart",
                "Effect": "Allow",
                "Action": "ec2:CreateTags",
                "Resource": f"{arn}:instance/*",
                "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
            },
            {
                "Sid": "KeepOwn",
                "Effect": "Allow",
                "Action": ["ec2:CreateTags", "ec2:TerminateInstances"],
                "Resource": f"{arn}:instance/*",
                "Condition": own,
            },
            {
                "Sid": "GiveWorkersTheirRole",
                "Effect": "Allow",
                "Action": "iam:PassRole",
                "Resource": f"arn:aws:iam::{account}:role/{worker_role}",
                "Condition": {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
            },
        ],
    }
