"""Each check of `luthier cluster doctor`: what is healthy is left alone, what is sick is named, on facts alone."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import TypeAdapter

from cluster.config import load
from cluster.doctor import devices, links, sockets
from cluster.doctor.examine import RULES, examine
from cluster.doctor.facts import Facts, Here
from cluster.doctor.finding import Check, Finding, Level
from cluster.doctor.gather import _here
from cluster.doctor.probe import _disk, _interfaces, _memory, token_file
from cluster.doctor.report import Disk, Interface, Link, Node, RdmaPort, Report, Socket, StoreReport, TokenFile, Visit
from cluster.doctor.store_probe import StoreProbe
from cluster.errors import ClusterSilent
from cluster.place import ClusterConfig
from tests.e2e.submit import ROOT

GIB = 2**30
FAULT, WARNING, NOT_CHECKED = Level.FAULT, Level.WARNING, Level.NOT_CHECKED


def smi(count: int = 1, old: str = "", new: str = "") -> str:
    """As `nvidia-smi -q -x` prints it (driver 570, H100), cut down to what is near to what is read."""
    gpu = """<gpu id="00000000:1B:00.0">
        <product_name>NVIDIA H100 80GB HBM3</product_name>
        <persistence_mode>Enabled</persistence_mode>
        <mig_mode><current_mig>Disabled</current_mig><pending_mig>Disabled</pending_mig></mig_mode>
        <gpu_reset_status><reset_required>No</reset_required></gpu_reset_status>
        <clocks_event_reasons>
            <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
            <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
            <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
        </clocks_event_reasons>
        <fb_memory_usage><total>81559 MiB</total><used>0 MiB</used></fb_memory_usage>
        <ecc_errors>
            <volatile><sram_correctable>7</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
                <dram_uncorrectable>0</dram_uncorrectable></volatile>
            <aggregate><dram_uncorrectable>3</dram_uncorrectable></aggregate>
        </ecc_errors>
        <remapped_rows><remapped_row_pending>No</remapped_row_pending>
            <remapped_row_failure>No</remapped_row_failure></remapped_rows>
        <fabric><state>Completed</state><status>Success</status></fabric>
    </gpu>"""
    assert old in gpu
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>'
        "<driver_version>570.124.06</driver_version><cuda_version>12.8</cuda_version>"
        f"{gpu.replace(old, new, 1) * min(count, 1)}{gpu * (count - 1)}</nvidia_smi_log>"
    )


HERE = Here(
    ray="2.60.0",
    python="3.11",
    luthier="0.1.0",
    locked={"torch": "2.13.0", "pyarrow": "26.0.1"},
    ranges={"torch": "<2.14,>=2.13", "pyarrow": "<27,>=26"},
    token_file=TokenFile("/home/me/token", 0o600, 1000),
    machine="laptop",
)
REPORT = Report(
    machine="first",
    user=1000,
    variables={"RAY_AUTH_MODE": "token"},
    token_file=TokenFile("/home/ray/token", 0o600, 1000),
    python="3.11.7",
    packages={"ray": "2.60.0", "torch": "2.13.0+cu128", "pyarrow": "26.0.1"},
    sockets=(Socket("raylet", "0.0.0.0", 4000, "refuses"), Socket("agent", "10.0.0.2", 4001, "metrics")),
    disks=(Disk("cache", "/cache", 100 * GIB, 50 * GIB),),
    shared_memory=60 * GIB,
    memory=128 * GIB,
    memory_free=100 * GIB,
    interfaces=(Interface("lo", 65536, True, "127.0.0.1"), Interface("eth0", 9001, True, "10.0.0.2")),
)
STORED = StoreReport({"open": 1.5, "create": 0.01, "list": 0.01})
HEAD = Node(
    "headhead",
    "10.0.0.1",
    is_head=True,
    report=replace(
        REPORT,
        machine="head",
        sockets=(Socket("dashboard", "127.0.0.1", 8265, "refuses"), Socket("gcs", "::", 6379, "refuses")),
        interfaces=(Interface("ens5", 9001, True, "10.0.0.1"),),
    ),
    clock_s=0.001,
    clock_error_s=0.001,
    store=STORED,
)
WORKER = Node(
    "workerwo",
    "10.0.0.2",
    resources={"CPU": 8, "GPU": 2, "memory": 90.0 * GIB, "object_store_memory": 30.0 * GIB},
    report=replace(REPORT, nvidia_smi=smi(2)),
    clock_s=-0.5,
    clock_error_s=0.001,
    store=STORED,
)
LINKS = (Link("headhead", "workerwo", 0.0002, 9e9), Link("workerwo", "headhead", 0.0002, 9e9))
FROM_HERE = {Check.ANSWER, Check.TOKEN, Check.TOKEN_FILE}
HEALTHY = Facts(
    "http://127.0.0.1:8265",
    HERE,
    without_token=401,
    with_wrong_token=403,
    ray="2.60.0",
    python="3.11.7",
    visit=Visit((HEAD, WORKER), LINKS),
    store="s3://bucket/prefix",
)


def of_worker(**changes: Any) -> Facts:
    """The worker says something else."""
    return replace(HEALTHY, visit=Visit((HEAD, replace(WORKER, report=replace(WORKER.said, **changes))), LINKS))


def worker(**changes: Any) -> Facts:
    return replace(HEALTHY, visit=Visit((HEAD, replace(WORKER, **changes)), LINKS))


def of_head(**changes: Any) -> Facts:
    return replace(HEALTHY, visit=Visit((replace(HEAD, report=replace(HEAD.said, **changes)), WORKER), LINKS))


def linked(link: Link) -> Facts:
    return replace(HEALTHY, visit=Visit((HEAD, WORKER), (LINKS[0], link)))


def with_variable(name: str, value: str, **changes: Any) -> Facts:
    return of_worker(variables={"RAY_AUTH_MODE": "token", name: value}, **changes)


def with_package(name: str, version: str) -> Facts:
    return of_worker(packages={**WORKER.said.packages, name: version})


PUBLIC = (Interface("eth0", 9001, True, "10.0.0.2"), Interface("eth1", 9001, True, "8.8.8.8"))
IB = (RdmaPort("mlx5_0", "ACTIVE", "400 Gb/sec (4X NDR)"), RdmaPort("mlx5_1", "ACTIVE", "400 Gb/sec (4X NDR)"))
WITH_IB = of_worker(rdma=IB, has_verbs=True)

SICK: dict[str, tuple[Facts, Check, Level, str]] = {
    "silent": (replace(HEALTHY, refused=ClusterSilent("gone")), Check.ANSWER, FAULT, "gone"),
    "open dashboard": (replace(HEALTHY, without_token=200), Check.TOKEN, FAULT, "no token (200)"),
    "any token": (replace(HEALTHY, with_wrong_token=200), Check.TOKEN, FAULT, "a wrong token (200)"),
    "no mode": (of_worker(variables={}), Check.TOKEN, FAULT, "without RAY_AUTH_MODE"),
    "open port": (
        of_head(sockets=(Socket("gcs", "::", 6379, "open"),)),
        Check.TOKEN,
        FAULT,
        "the gcs answers without a token",
    ),
    "no ports": (of_worker(sockets=()), Check.TOKEN, NOT_CHECKED, "no port of Ray's processes"),
    "readable token": (
        of_worker(token_file=TokenFile("/t", 0o644, 1000)),
        Check.TOKEN_FILE,
        FAULT,
        "/t has mode 0644",
    ),
    "somebody's token": (of_worker(token_file=TokenFile("/t", 0o600, 7)), Check.TOKEN_FILE, FAULT, "user 7"),
    "no token": (of_worker(token_file=TokenFile("/t")), Check.TOKEN_FILE, FAULT, "no token file /t"),
    "my token": (
        replace(HEALTHY, here=replace(HERE, token_file=TokenFile("/mine", 0o640, 1))),
        Check.TOKEN_FILE,
        FAULT,
        "/mine has mode 0640",
    ),
    "dashboard for all": (
        of_head(sockets=(Socket("dashboard", "0.0.0.0", 8265, "refuses"),)),
        Check.DASHBOARD,
        FAULT,
        "0.0.0.0:8265",
    ),
    "dashboard not found": (of_head(sockets=()), Check.DASHBOARD, NOT_CHECKED, "no port"),
    "open to the world": (
        replace(of_worker(interfaces=PUBLIC), reached={"8.8.8.8": (4000,)}),
        Check.PORTS,
        FAULT,
        "8.8.8.8 is a public address, and raylet 4000 can be reached",
    ),
    "public": (of_worker(interfaces=PUBLIC), Check.PORTS, WARNING, "8.8.8.8 is a public address"),
    "metrics": (replace(HEALTHY, reached={"10.0.0.2": (4001,)}), Check.PORTS, WARNING, "agent 4001"),
    "root": (of_worker(user=0, token_file=TokenFile("/t", 0o600, 0)), Check.RIGHTS, WARNING, "root"),
    "head that works": (
        replace(HEALTHY, visit=Visit((replace(HEAD, resources={"CPU": 4}), WORKER), LINKS)),
        Check.HEAD,
        WARNING,
        "offers 4 CPU",
    ),
    "statistics": (of_head(usage_stats=True), Check.USAGE, FAULT, "its makers"),
    "another Ray": (replace(HEALTHY, ray="2.59.0"), Check.RAY, FAULT, "the head has Ray 2.59.0"),
    "another Python": (of_worker(python="3.12.1"), Check.RAY, FAULT, "Python 3.12.1"),
    "old package": (with_package("pyarrow", "25.0"), Check.PACKAGES, FAULT, "pyarrow 25.0"),
    "untested package": (with_package("pyarrow", "26.1"), Check.PACKAGES, WARNING, "tested is 26.0.1"),
    "no package": (of_worker(packages={"ray": "2.60.0"}), Check.PACKAGES, FAULT, "torch is not installed"),
    "another luthier": (with_package("luthier", "0.0.9"), Check.PACKAGES, WARNING, "luthier 0.0.9"),
    "torch for CPUs": (with_package("torch", "2.13.0+cpu"), Check.PACKAGES, FAULT, "knows no GPU"),
    "old driver": (with_package("torch", "2.13.0+cu130"), Check.PACKAGES, FAULT, "takes CUDA 12.8"),
    "old driver, torch of PyPI": (
        of_worker(packages={**WORKER.said.packages, "torch": "2.13.0", "nvidia-cuda-runtime": "13.0.48"}),
        Check.PACKAGES,
        FAULT,
        "is for CUDA 13",
    ),
    "no answer": (worker(report=None, problem="no answer within 20 s"), Check.NODES, FAULT, "within 20 s"),
    "unread": (of_worker(failed=("packages: OSError",)), Check.NODES, NOT_CHECKED, "packages: OSError"),
    "clock": (worker(clock_s=-2.1, clock_error_s=0.01), Check.CLOCKS, WARNING, "2.1 s behind"),
    "wrong clock": (worker(clock_s=1000.0), Check.CLOCKS, FAULT, "1000.0 s ahead of"),
    "full disk": (of_worker(disks=(Disk("cache", "/c", 100, 4),)), Check.DISK, FAULT, "/c: 96% full"),
    "filling disk": (of_worker(disks=(Disk("cache", "/c", 100, 10),)), Check.DISK, WARNING, "90% full"),
    "small shm": (of_worker(shared_memory=2**26), Check.SHARED_MEMORY, WARNING, "0.06 GiB"),
    "no memory": (of_worker(memory_free=GIB), Check.MEMORY, FAULT, "99% of 128.0 GiB"),
    "too much promised": (of_worker(memory=64 * GIB, memory_free=60 * GIB), Check.MEMORY, FAULT, "offers 90.0"),
    "one GPU of two": (
        of_worker(nvidia_smi=smi(1)),
        Check.GPUS,
        FAULT,
        "Ray offers 2 GPU, and nvidia-smi shows 1",
    ),
    "no GPU of two": (of_worker(nvidia_smi="No devices were found"), Check.GPUS, FAULT, "No devices were found"),
    "no driver": (of_worker(nvidia_smi=None), Check.GPUS, FAULT, "there is no nvidia-smi"),
    "hidden GPU": (of_worker(nvidia_smi=smi(3)), Check.GPUS, WARNING, "Ray offers 2 of 3"),
    "broken memory": (
        of_worker(nvidia_smi=smi(2, "<dram_uncorrectable>0", "<dram_uncorrectable>2")),
        Check.GPUS,
        FAULT,
        "2 uncorrected memory error(s)",
    ),
    "unreplaced row": (
        of_worker(nvidia_smi=smi(2, "<remapped_row_failure>No", "<remapped_row_failure>Yes")),
        Check.GPUS,
        FAULT,
        "cannot be replaced",
    ),
    "reset": (
        of_worker(nvidia_smi=smi(2, "required>No", "required>Yes")),
        Check.GPUS,
        FAULT,
        "waits for a reset",
    ),
    "no fabric manager": (
        of_worker(
            nvidia_smi=smi(2, "<state>Completed</state><status>Success", "<state>In Progress</state><status>N/A")
        ),
        Check.GPUS,
        FAULT,
        "NVSwitch fabric is In Progress",
    ),
    "hot": (
        of_worker(nvidia_smi=smi(2, "thermal_slowdown>Not Active", "thermal_slowdown>Active")),
        Check.GPUS,
        WARNING,
        "slowed by hw_thermal_slowdown",
    ),
    "not persistent": (
        of_worker(nvidia_smi=smi(2, "<persistence_mode>Enabled", "<persistence_mode>Disabled")),
        Check.GPUS,
        WARNING,
        "persistence mode",
    ),
    "two drivers": (
        replace(
            HEALTHY,
            visit=Visit(
                (
                    HEAD,
                    WORKER,
                    replace(WORKER, id="third", report=replace(WORKER.said, nvidia_smi=smi(2).replace("570.", "550."))),
                ),
                LINKS,
            ),
        ),
        Check.GPUS,
        WARNING,
        "550.124.06, 570.124.06",
    ),
    "no store": (replace(HEALTHY, store=None), Check.STORE, NOT_CHECKED, "--store"),
    "unfit store": (
        worker(store=StoreReport(error="two writers", error_class="StoreUnfit")),
        Check.STORE,
        FAULT,
        "two writers",
    ),
    "slow store": (
        worker(store=StoreReport({"create": 3.0})),
        Check.STORE,
        WARNING,
        "create of a few bytes took 3.0",
    ),
    "store not tried": (worker(store=None), Check.STORE, FAULT, "did not come to try it"),
    "folder of its own": (
        worker(store=replace(STORED, unseen=("headhead",))),
        Check.SHARED,
        FAULT,
        "what head wrote to s3://bucket/prefix is not there",
    ),
    "no way": (
        linked(Link("workerwo", "headhead", error="10.0.0.1:9: refused")),
        Check.LINKS,
        FAULT,
        "connected",
    ),
    "far": (linked(Link("workerwo", "headhead", 0.03)), Check.LINKS, WARNING, "more than 5 ms"),
    "slow": (linked(Link("workerwo", "headhead", 0.001, 3e8)), Check.LINKS, WARNING, "less than 1 Gbit/s"),
    "unmeasured": (replace(HEALTHY, visit=Visit((HEAD, WORKER), LINKS[:1])), Check.LINKS, NOT_CHECKED, "1 of 2"),
    "MTU": (
        of_worker(interfaces=(Interface("eth0", 1500, True, "10.0.0.2"),)),
        Check.MTU,
        FAULT,
        "nodes have different MTUs",
    ),
    "no such interface": (
        with_variable("NCCL_SOCKET_IFNAME", "ens"),
        Check.NCCL,
        FAULT,
        "NCCL_SOCKET_IFNAME=ens",
    ),
    "all left out": (with_variable("NCCL_SOCKET_IFNAME", "^lo,eth"), Check.NCCL, FAULT, "=^lo,eth"),
    "a prefix for gloo": (
        with_variable("GLOO_SOCKET_IFNAME", "eth"),
        Check.NCCL,
        FAULT,
        "GLOO_SOCKET_IFNAME=eth",
    ),
    "no such adapter": (with_variable("NCCL_IB_HCA", "=mlx5_2:1", rdma=IB), Check.NCCL, FAULT, "=mlx5_2:1"),
    "InfiniBand off": (with_variable("NCCL_IB_DISABLE", "1", rdma=IB), Check.NCCL, WARNING, "NCCL_IB_DISABLE"),
    "a port down": (
        of_worker(rdma=(IB[0], RdmaPort("mlx5_1", "DOWN")), has_verbs=True),
        Check.RDMA,
        WARNING,
        "mlx5_1 is DOWN",
    ),
    "all ports down": (
        of_worker(rdma=(RdmaPort("mlx5_1", "DOWN"),), has_verbs=True),
        Check.RDMA,
        FAULT,
        "no port",
    ),
    "no verbs": (of_worker(rdma=IB), Check.RDMA, WARNING, "no /dev/infiniband"),
    "locked memory": (of_worker(rdma=IB, has_verbs=True, locked_memory=2**16), Check.RDMA, WARNING, "64 KiB"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_fact_is_named_with_its_fix(name: str) -> None:
    facts, check, level, seen = SICK[name]
    found = [each for each in examine(facts) if each.check is check and each.level is level and seen in each.seen]
    assert len(found) == 1, examine(facts)
    assert found[0].fix or level is NOT_CHECKED


def test_what_is_healthy_has_no_finding_but_ok_and_every_check_says_something() -> None:
    found = examine(HEALTHY)
    unwell = [each for each in found if each.level is not Level.OK]
    assert [each.check for each in unwell] == [Check.FILE], unwell  # no NAME was given
    assert {each.check for each in found} == set(Check) - {Check.IMAGE}
    assert [each for each in examine(WITH_IB) if each.level is not Level.OK] == unwell
    assert all(not each.fix for each in found)


@pytest.mark.parametrize("name", SICK)
def test_what_is_sick_in_one_way_alone_leaves_other_checks_alone(name: str) -> None:
    facts, check, _, _ = SICK[name]
    allowed = {check, Check.FILE}
    if facts.refused is None and name not in ("no answer", "no memory", "too much promised", "no package"):
        others = [each for each in examine(facts) if each.check not in allowed and each.level is FAULT]
        assert not others, others


def test_a_probe_that_did_not_come_back_leaves_no_check_out() -> None:
    found = examine(replace(HEALTHY, visit=None, no_visit="no python"))
    assert {each.check for each in found if each.level is Level.OK} == {*FROM_HERE, Check.RAY}
    assert {rule.check for rule in RULES} == {each.check for each in found}
    (lost,) = [each for each in found if each.level is FAULT]
    assert "no python" in lost.seen


def test_nodes_that_all_keep_silent_leave_no_check_out() -> None:
    late = [replace(node, report=None, problem="no answer within 1 s", store=None) for node in (HEAD, WORKER)]
    found = examine(replace(HEALTHY, visit=Visit(tuple(late))))
    assert set(Check) == {each.check for each in found}
    assert {each.check for each in found if each.level is FAULT} == {Check.NODES}
    assert {each.check for each in found if each.level is Level.OK} == {*FROM_HERE, Check.RAY}


def test_one_machine_may_work_on_its_head_and_run_as_its_user() -> None:
    alone = replace(HEAD, resources={"CPU": 4}, report=replace(HEAD.said, user=0, token_file=TokenFile("/t", 0o600, 0)))
    found = examine(replace(HEALTHY, visit=Visit((alone,))))
    assert {each.check for each in found if each.level is not Level.OK} == {Check.FILE}


# --- beside configs/clusters/NAME.yaml ---------------------------------------------------------------------------

KUBERNETES = load(ROOT / "configs/clusters/kubernetes.yaml", ClusterConfig)
assert KUBERNETES.provider
IMAGE = KUBERNETES.provider.image
POD = replace(
    WORKER,
    resources={"CPU": 24, "GPU": 1},
    labels={"ray.io/node-group": "h100"},
    report=replace(WORKER.said, nvidia_smi=smi(1), variables={"RAY_AUTH_MODE": "token", "LUTHIER_IMAGE": IMAGE}),
)


def described(pod: Node = POD, place: ClusterConfig = KUBERNETES) -> list[Finding]:
    head = replace(HEAD, report=replace(HEAD.said, variables=POD.said.variables))
    facts = replace(HEALTHY, place=place, visit=Visit((head, pod), LINKS))
    return [each for each in examine(facts) if each.check in (Check.FILE, Check.IMAGE, Check.RIGHTS)]


def test_nodes_as_their_file_says_have_no_finding() -> None:
    found = described()
    assert {each.level for each in found} == {Level.OK}, found
    assert any(IMAGE in each.seen for each in found)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"resources": {"CPU": 24, "GPU": 2}}, "group h100 has 1 GPU a node, this one 2"),
        ({"labels": {"ray.io/node-group": "a100"}}, "of group a100, which the file does not have"),
        ({"report": {"nvidia_smi": smi(1, "H100 80GB HBM3", "L4")}}, "group h100 is of H100, this node has NVIDIA L4"),
        ({"report": {"nvidia_smi": smi(1, "81559", "40960")}}, "has 40 GiB, and memory_gb_per_worker is 80"),
        ({"report": {"variables": {"LUTHIER_IMAGE": "other@sha256:1"}}}, "started from other@sha256:1"),
        ({"report": {"variables": {}}}, "LUTHIER_IMAGE is not set"),
        ({"report": {"capabilities": 0x3}}, "capabilities 0x3"),
    ],
)
def test_nodes_unlike_their_file_are_named(changes: dict[str, Any], seen: str) -> None:
    reported = {"report": replace(POD.said, **changes.pop("report"))} if "report" in changes else {}
    found = described(replace(POD, **changes, **reported))
    assert [each for each in found if each.level is not Level.OK and seen in each.seen], found


def test_machines_that_are_in_the_file_and_not_in_the_cluster() -> None:
    place = load(ROOT / "configs/clusters/on-premises.yaml", ClusterConfig)
    (gone,) = [each for each in described(POD, place) if each.level is FAULT and "not in the cluster" in each.seen]
    assert gone.nodes == ("10.0.0.10", "10.0.0.11", "10.0.0.12")


# --- reading ------------------------------------------------------------------------------------------------------


def test_what_nvidia_smi_prints() -> None:
    found = devices.parse("a warning first\n" + smi(2, "current_mig>Disabled", "current_mig>Enabled"))
    assert (found.driver, found.cuda, len(found.gpus)) == ("570.124.06", "12.8", 2)
    assert found.gpus[0].is_partitioned
    assert found.gpus[1] == devices.Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, fabric="Completed Success")
    old = smi(1, "<clocks_event_reasons>", "<clocks_throttle_reasons>").replace("clocks_event", "clocks_throttle")
    assert devices.parse(old.replace("hw_slowdown>Not Active", "hw_slowdown>Active")).gpus[0].slowed_by == (
        "hw_slowdown",
    )
    gone = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert devices.parse(gone).error == gone


def test_a_node_report_survives_its_way_as_json() -> None:
    adapter = TypeAdapter(Visit)
    visit = Visit((HEAD, WORKER, replace(WORKER, report=None, problem="no")), LINKS)
    assert adapter.validate_json(adapter.dump_json(visit)) == visit


def test_the_kernels_table_of_sockets() -> None:
    table = "  sl  local_address rem_address   st tx rx tr tm->when retrnsmt uid timeout inode\n"
    row = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000  1000        0 {} 1\n"
    table += row.format("0100007F:2049", "0A", 11) + row.format("00000000:1F90", "0A", 12)
    table += row.format("0100007F:2050", "01", 13)  # a connection
    table += row.format("0000000000000000FFFF00000200000A:0050", "0A", 14)
    table += row.format("00000000000000000000000001000000:0051", "0A", 15)
    expected = {
        "11": ("127.0.0.1", 8265), "12": ("0.0.0.0", 8080), "14": ("10.0.0.2", 80), "15": ("::1", 81),
    }  # fmt: skip
    assert sockets.listening(table) == expected


def test_a_port_is_asked_what_it_says_to_a_stranger() -> None:
    for status, body, says in ((401, b"no", "refuses"), (200, b"[]", "open"), (200, b"# HELP x", "metrics")):
        with answering(status, body) as port:
            assert sockets.ask("dashboard", "0.0.0.0", port) == says
    assert sockets.ask("dashboard", "127.0.0.1", 9) == "unknown"  # nothing listens there


@pytest.mark.parametrize(
    ("process", "asks_token", "says"), [("gcs", True, "refuses"), ("gcs", False, "open"), ("raylet", True, "unknown")]
)
def test_a_port_of_grpc_is_asked_too(process: str, asks_token: bool, says: str) -> None:
    """A real server with the GCS' method, which a raylet does not have."""

    def nodes(request: bytes, context: Any) -> bytes:
        if asks_token:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    method = grpc.unary_unary_rpc_method_handler(nodes)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"GetAllNodeInfo": method}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert sockets.ask(process, "127.0.0.1", port) == says
    server.stop(None).wait()


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class names it)
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server.server_port
        server.shutdown()


def test_the_way_between_two_nodes_is_measured() -> None:
    port = links.listen("127.0.0.1")
    (there, not_there) = links.reach("a", [("b", "127.0.0.1", port), ("c", "127.0.0.1", 9)])
    assert there.round_trip_s
    assert 0 < there.round_trip_s < 1
    assert "127.0.0.1:9: Connection refused" in not_there.error
    speed = links.stream("127.0.0.1", port)
    assert speed
    assert speed > 1e8
    assert links.stream("127.0.0.1", 9) is None


def test_two_nodes_with_a_folder_each_do_not_see_each_other(tmp_path: Path) -> None:
    probes = [StoreProbe(f"file://{tmp_path}/{name}", {}, f".probe/{name}") for name in ("one", "two")]
    assert [probe.write().error for probe in probes] == ["", ""]
    seen = [probe.look({"one": ".probe/one", "two": ".probe/two"}).unseen for probe in probes]
    assert seen == [("two",), ("one",)]
    done = [probe.delete() for probe in probes]
    assert [list(each.done) for each in done] == [
        ["open", "create", "create if absent", "read", "write", "list", "delete"]
    ] * 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "a probe was left behind"


def test_what_is_read_of_this_machine(tmp_path: Path) -> None:
    here = _here()
    assert {"torch", "pyarrow", "transformers", "boto3"} <= set(here.ranges) <= set(here.locked)
    memory, free = _memory()
    assert 0 < free <= memory
    assert any(each.name == "lo" and each.address == "127.0.0.1" and each.is_up for each in _interfaces())
    assert 0 < _disk("cache", tmp_path / "not" / "there").free <= _disk("cache", tmp_path).total
    (tmp_path / "token").touch(0o640)
    assert token_file(str(tmp_path / "token")) == TokenFile(f"{tmp_path}/token", 0o640, os.getuid())
    assert token_file(str(tmp_path / "none")).mode is None
