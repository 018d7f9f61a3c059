"""Prometheus alerts: what is worth somebody's attention, each with the line that says what to do.

Names of metrics come from `cluster/metrics.py` alone, and are those of Ray's export, which Prometheus scrapes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from cluster import metrics

GROUP = "luthier"


@dataclass(frozen=True)
class Alert:
    """Fires when `expression` has had a value for `lasting`.

    Attributes:
        summary: a sentence, with Prometheus' `{{ $labels.NAME }}` and `{{ $value }}`.
        runbook: what to look at first, and what to do.
    """

    name: str
    expression: str
    lasting: str
    severity: Literal["critical", "warning"]
    summary: str
    runbook: str

    def rule(self) -> dict[str, Any]:
        """As Prometheus wants it."""
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "runbook": self.runbook},
        }


def rules() -> str:
    """The file for Prometheus' `rule_files`."""
    return yaml.safe_dump({"groups": [{"name": GROUP, "rules": [alert.rule() for alert in ALERTS]}]}, sort_keys=False)


def _while_active(condition: str) -> str:
    """Only for runs whose driver works: what an ended run has left says nothing."""
    return f"({condition}) and on (run) {metrics.RUN_ACTIVE.exported} == 1"


def _share(part: metrics.Metric, whole: metrics.Metric, window: str) -> str:
    return f"sum by (run) (rate({part.exported}[{window}])) / sum by (run) (rate({whole.exported}[{window}]))"


def _answers(code: str) -> str:
    """The share of answers with such a status code, by model."""
    name = metrics.REQUESTS.exported
    return f'sum by (model) (rate({name}{{code=~"{code}"}}[5m])) / sum by (model) (rate({name}[5m]))'


ALERTS = (
    Alert(
        "TrainingStandsStill",
        _while_active(f"time() - {metrics.LAST_STEP_AT.exported} > 900"),
        "1m",
        "critical",
        "Run {{ $labels.run }} has done no step for {{ $value | humanizeDuration }}.",
        "`luthier jobs logs RUN` says whether it waits for room or its turn, evaluates, or hangs, and on which rank. "
        "`luthier jobs stop RUN` saves and gives its workers back; `jobs resume` goes on.",
    ),
    Alert(
        "CheckpointTooOld",
        _while_active(f"time() - {metrics.LAST_CHECKPOINT_AT.exported} > 7200"),
        "1m",
        "warning",
        "Run {{ $labels.run }} would lose {{ $value | humanizeDuration }} of work now.",
        "`luthier jobs logs RUN` tells of a store that is out of reach; else lower checkpoint.every_steps next time.",
    ),
    Alert(
        "TrainingFailsAgainAndAgain",
        _while_active(f"{metrics.TRAINING_FAILURES.exported} >= 2"),
        "0m",
        "warning",
        "Run {{ $labels.run }} has recovered from {{ $value }} failures, and train.max_failures ends it.",
        "`luthier jobs logs RUN` names each cause. The same rank or node each time is a bad node: drain it by "
        "`ray drain-node`, and the run moves.",
    ),
    Alert(
        "StepsAreSkipped",
        _while_active(f"delta({metrics.SKIPPED_STEPS.exported}[30m]) >= 2"),
        "0m",
        "warning",
        "Run {{ $labels.run }} has skipped {{ $value }} steps within half an hour, whose loss was not finite.",
        "Stop it, and go on `from=RUN@STEP` of a checkpoint before that, with a lower optimizer.learning_rate or "
        "optimizer.clip_norm, or a longer schedule.warmup_steps.",
    ),
    Alert(
        "TrainingWaitsForData",
        _share(metrics.DATA_WAIT_SECONDS, metrics.STEP_SECONDS, "10m") + " > 0.2",
        "10m",
        "warning",
        "Run {{ $labels.run }} spends {{ $value | humanizePercentage }} of its time waiting for data.",
        "The workers' disks or cores are busy with something else: look at the node's disk and CPU in the dashboard, "
        "and raise cluster.cpus_per_worker.",
    ),
    Alert(
        "CheckpointsHoldTrainingUp",
        _share(metrics.CHECKPOINT_STALL_SECONDS, metrics.STEP_SECONDS, "30m") + " > 0.1",
        "15m",
        "warning",
        "Run {{ $labels.run }} stands still for checkpoints {{ $value | humanizePercentage }} of its time.",
        "The store takes longer than the steps between two checkpoints: raise checkpoint.every_steps, or look at the "
        "store's throughput.",
    ),
    Alert(
        "WorkerMemoryIsLow",
        _while_active(f"{metrics.WORKER_MEMORY.exported} / {metrics.WORKER_MEMORY_LIMIT.exported} > 0.97"),
        "5m",
        "warning",
        "A worker of run {{ $labels.run }} holds {{ $value | humanizePercentage }} of the memory that it may have.",
        "If it runs out, the run halves train.micro_batch and goes on. `luthier jobs plan` says what takes less: "
        "train.activation_checkpointing, more workers with train.zero, a shorter data.sequence_length.",
    ),
    Alert(
        "RunNearsItsLimit",
        _while_active(f"{metrics.RUN_LIMIT.exported} > 0.9"),
        "0m",
        "warning",
        "Run {{ $labels.run }} has used {{ $value | humanizePercentage }} of a limit, and saves and stops at 100 %.",
        "`luthier jobs plan` and the report say how many steps are left. Where they are worth it, let it stop, and go "
        "on by `luthier jobs resume RUN limits.hours=…` (or limits.usd).",
    ),
    Alert(
        "RequestsFail",
        _answers("5..") + " > 0.05",
        "5m",
        "critical",
        "{{ $value | humanizePercentage }} of the requests for {{ $labels.model }} fail.",
        "`luthier serving status` says which replica is not alive; its log, in Ray's dashboard under Serve, says why. "
        "If a release began it, `luthier cluster alias NAME@stable --version N` goes back.",
    ),
    Alert(
        "RequestsAreRefused",
        _answers("429") + " > 0.1",
        "10m",
        "warning",
        "{{ $value | humanizePercentage }} of the requests for {{ $labels.model }} get a 429.",
        "All replicas are full: raise replicas.max, or add nodes if Serve waits for them.",
    ),
    Alert(
        "FirstTokensAreSlow",
        f"histogram_quantile(0.95, sum by (model, le) (rate({metrics.FIRST_TOKEN_SECONDS.exported}[5m]))) > 10",
        "10m",
        "warning",
        "One of twenty answers of {{ $labels.model }} waits {{ $value | humanizeDuration }} for its first token.",
        "Lower replicas.target_ttft_s or raise replicas.max where sequences queue; where adapters are loaded all the "
        "time, raise engine.max_adapters.",
    ),
    Alert(
        "RequestsQueue",
        f"sum by (model) ({metrics.WAITING_SEQUENCES.exported}) > "
        f"2 * sum by (model) ({metrics.RUNNING_SEQUENCES.exported}) + 8",
        "5m",
        "warning",
        "{{ $value }} sequences wait for {{ $labels.model }}, more than twice as many as run.",
        "Where replicas.max is reached, raise it; else see by `ray status` which resources a new replica waits for.",
    ),
    Alert(
        "KeyValueCacheIsFull",
        f"sum by (model) ({metrics.KV_BLOCKS_USED.exported}) / sum by (model) ({metrics.KV_BLOCKS.exported}) > 0.95",
        "10m",
        "warning",
        "The key-value cache of {{ $labels.model }} is {{ $value | humanizePercentage }} full: new requests wait.",
        "Raise engine.kv_tokens (engine.kv_bytes with vLLM) where memory is left, else replicas.max.",
    ),
    Alert(
        "AdaptersComeAndGo",
        f"sum by (model) (rate({metrics.ADAPTER_LOADS.exported}[10m])) > "
        f"sum by (model) ({metrics.ADAPTERS_LOADED.exported}) / 60",
        "10m",
        "warning",
        "{{ $labels.model }} loads {{ $value | humanize }} adapters a second: each stays for less than a minute.",
        "More adapters are in use than have a place: raise engine.max_adapters or replicas.min, and pin the hot "
        "ones by adapters.pinned.",
    ),
    Alert(
        "GpusAreIdle",
        f'sum({metrics.RAY_RESOURCES.exported}{{Name="GPU",State="AVAILABLE"}}) / '
        f'sum({metrics.RAY_RESOURCES.exported}{{Name="GPU"}}) > 0.5',
        "1h",
        "warning",
        "{{ $value | humanizePercentage }} of the cluster's GPUs have done nothing for an hour.",
        "`ray status` shows what holds their nodes: an actor, an object, or min_workers of the cluster's file. End it, "
        "or lower min_workers, and the nodes go.",
    ),
    Alert(
        "NodesDoNotCome",
        f"{metrics.RAY_PENDING_NODES.exported} > 0",
        "15m",
        "warning",
        "{{ $value }} node(s) of {{ $labels.NodeType }} were asked for, and have not come for a quarter of an hour.",
        "`luthier why` has the cloud's words: no capacity, a quota, a limit of the group, a node that does not join.",
    ),
    Alert(
        "NodeMemoryIsLow",
        f"{metrics.RAY_MEMORY_AVAILABLE.exported} / {metrics.RAY_MEMORY_TOTAL.exported} < 0.05",
        "2m",
        "critical",
        "Node {{ $labels.ip }} has {{ $value | humanizePercentage }} of its memory left; Ray kills workers soon.",
        "Ray's dashboard shows the processes of the node. Fewer workers a node, a smaller train.micro_batch or "
        "engine.kv_tokens need less.",
    ),
    Alert(
        "NodeDiskIsFilling",
        f"{metrics.RAY_DISK_USED.exported} > 90",
        "5m",
        "warning",
        "The disk of node {{ $labels.ip }} is {{ $value | humanize }} % full; at 95 % Ray spills nothing to it, "
        "and what is saved there fails soon after.",
        "Old Ray sessions under its temporary folder and models in LUTHIER_CACHE are what grows; both may be removed "
        "while nothing uses them.",
    ),
)
