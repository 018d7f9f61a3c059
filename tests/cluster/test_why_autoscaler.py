"""What Ray's autoscaler does, as its log, the log of the GCS and the cluster's status tell it."""

from cluster.why import autoscaler
from cluster.why.facts import NodeGroup

CONFIG = """2026-11-26 01:41:17,338	INFO autoscaler.py:73 -- Using Autoscaling Config:\x20
available_node_types:
  ray.head.default:
    max_workers: 0
    resources: {CPU: 0}
  spot:
    labels: {market: spot}
    max_workers: 3
    resources: {CPU: 1}
head_node_type: ray.head.default
max_workers: 3

2026-11-26 01:41:17,339 INFO 53 -- more
"""


def test_the_autoscalers_log_is_read() -> None:
    assert autoscaler.groups(CONFIG) == {"spot": NodeGroup({"CPU": 1.0}, 3, {"market": "spot"})}
    assert autoscaler.groups("2026-11-26 01:41:17,338	INFO monitor.py:94 -- session_name: x\n") is None
    tail = (
        "2026-11-26 01:42:00,338 INFO 492 -- Failed to launch 1 nodes of type old: quota\n"
        "2026-11-26 01:43:50,338 INFO 492 -- Failed to launch 2 nodes of type spot: none in zone 1.\n"
        "2026-11-26 01:43:50,339 INFO 492 -- Failed to launch 1 nodes of type on-demand: quota\n"
        "2026-11-26 01:43:55,339 INFO 489 -- Launched 2 nodes of type on-demand.\n"
    )
    status = "======== Autoscaler status: 2026-11-26 01:44:00.123456 ========\nNode status\n"
    assert autoscaler.failed(tail, status) == {"spot": "none in zone 1."}
    assert autoscaler.failed(tail, "") == {"old": "quota", "spot": "none in zone 1."}  # without a clock all is new


def test_an_autoscaler_that_no_longer_reports_is_dead() -> None:
    def counted(number: int) -> str:
        return (
            "[2026] gcs_server.cc:1322: Main service Event stats:\n\n"
            f"\tAutoscalerStateService.grpc_server.ReportAutoscalingState - {number} total (0 active), Execution time\n"
            "\tAutoscalerStateService.grpc_server.ReportAutoscalingState.success_callback - 99 total (0 active)\n"
        )

    assert autoscaler.is_alive(counted(3)) is None
    assert autoscaler.is_alive("Main service Event stats:\n" * 3) is None  # the older autoscaler
    assert autoscaler.is_alive(counted(3) + counted(15)) is True
    assert autoscaler.is_alive(counted(3) + counted(15) + counted(15)) is False


def test_nodes_that_are_starting_are_counted_by_group() -> None:
    status = (
        "Node status\n---\nActive:\n 1 ray.head.default\nIdle:\n (no idle nodes)\nPending:\n spot, 2 launching\n"
        " 10.0.0.3: on-demand, waiting for ssh\n 10.0.0.4: on-demand, starting ray\nRecent failures:\n (no failures)\n"
    )
    assert autoscaler.starting(status) == {"spot": 2, "on-demand": 2}
    assert autoscaler.starting(status.replace(" spot, 2 launching\n", " (no pending nodes)\n")) == {"on-demand": 2}
