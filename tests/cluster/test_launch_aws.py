"""Ray's real AWS provider on our file, an emulator in place of EC2 and IAM: what it makes, and what it does not."""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3.session
import pytest
import yaml
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import (
    STATUS_UNINITIALIZED,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.config import load
from cluster.launch.files import LAUNCHER, make_files
from cluster.launch.release import Release
from cluster.place import ClusterConfig
from tests.cluster.conftest import UseEnv
from tests.servers import free_ports, running

AWS = Path(__file__).parents[2] / "configs" / "clusters" / "aws.yaml"
REGION = "eu-central-1"


@dataclass(frozen=True)
class Account:
    """An AWS account with a subnet, a security group, a key and two instance profiles, and clients for it."""

    ec2: Any
    iam: Any
    subnet: str
    group: str

    def holds(self) -> str:
        """All that Ray could have made."""
        groups = [
            (each["GroupName"], each["IpPermissions"]) for each in self.ec2.describe_security_groups()["SecurityGroups"]
        ]
        roles = [each["RoleName"] for each in self.iam.list_roles()["Roles"]]
        profiles = [each["InstanceProfileName"] for each in self.iam.list_instance_profiles()["InstanceProfiles"]]
        keys = [each["KeyName"] for each in self.ec2.describe_key_pairs()["KeyPairs"]]
        return json.dumps([groups, roles, profiles, keys])


@pytest.fixture
def account(tmp_path: Path, use_env: UseEnv) -> Iterator[Account]:
    port = free_ports(1)
    settings = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "IOT_MTLS_ENABLED": "false",
        "SERVICES": "ec2,iam,sts",
        "TMPDIR": str(tmp_path),
    }
    use_env(
        {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
        }
    )
    with running([sys.executable, "-m", "ministack"], settings, tmp_path, port):
        session = boto3.session.Session()
        ec2, iam = session.client("ec2"), session.client("iam")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="172.31.200.0/24", AvailabilityZone=f"{REGION}a")
        group = ec2.create_security_group(GroupName="only-itself", Description="for the test", VpcId=vpc)
        ec2.create_key_pair(KeyName="luthier")
        for profile in ("luthier-head", "luthier-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        yield Account(ec2, iam, subnet["Subnet"]["SubnetId"], group["GroupId"])


def test_ray_makes_machines_of_our_file_and_nothing_else(account: Account, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("")
    overrides = [
        f"provider.subnets=[{account.subnet}]",
        f"provider.security_groups=[{account.group}]",
        f"provider.access.private_key={key}",
    ]
    file = yaml.safe_load(make_files(load(AWS, ClusterConfig, overrides), Release.read())[LAUNCHER])
    before = account.holds()
    config = AWSNodeProvider.bootstrap_config(prepare_config(copy.deepcopy(file)))
    assert account.holds() == before

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for node_type, kind in (("head", "head"), ("h100", "worker"), ("h100-spot", "worker")):
        tags = {
            TAG_RAY_NODE_KIND: kind,
            TAG_RAY_USER_NODE_TYPE: node_type,
            TAG_RAY_NODE_NAME: node_type,
            TAG_RAY_LAUNCH_CONFIG: "",
            TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
        }
        assert len(provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)) == 1
    machines = [each for found in account.ec2.describe_instances()["Reservations"] for each in found["Instances"]]
    profiles = {machine["InstanceType"]: machine["IamInstanceProfile"]["Arn"].split("/")[1] for machine in machines}
    assert profiles == {"m7i.xlarge": "luthier-head", "p5.48xlarge": "luthier-worker"}
    assert {group["GroupId"] for machine in machines for group in machine["SecurityGroups"]} == {account.group}
    assert account.holds() == before
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []

    # What the file protects from: without the group's name, Ray makes one that lets SSH in from anywhere.
    for machine in file["available_node_types"].values():
        del machine["node_config"]["SecurityGroupIds"]
    AWSNodeProvider.bootstrap_config(prepare_config(file))
    assert '"CidrIp": "0.0.0.0/0"' in account.holds()
