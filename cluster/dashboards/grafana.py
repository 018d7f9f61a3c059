"""Grafana dashboards: training, serving, cluster. Each panel says its unit, each query asks for metrics named once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster import metrics
from cluster.metrics import Metric

WIDTH, HEIGHT = 12, 8
"""A panel's size in Grafana's grid of 24 columns: two beside each other."""


@dataclass(frozen=True)
class Panel:
    """Curves over time.

    Attributes:
        unit: one of Grafana's ids: short, s, percentunit, bytes, percent, currencyUSD.
        queries: (legend with Grafana's `{{label}}`, PromQL).
    """

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Dashboard:
    """One page. `variable` is the label that it can be narrowed by, of `metric`; None without one."""

    name: str
    title: str
    variable: str | None
    metric: Metric | None
    panels: Sequence[Panel]

    def to_dict(self) -> dict[str, Any]:
        """As Grafana imports it."""
        source = {"type": "prometheus", "uid": "${source}"}
        variables: list[dict[str, Any]] = [
            {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
        ]
        if self.variable and self.metric:
            query = f"label_values({self.metric.exported}, {self.variable})"
            variables.append(
                {
                    "name": self.variable,
                    "type": "query",
                    "datasource": source,
                    "query": {"query": query, "refId": self.variable},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "current": {"text": "All", "value": "$__all"},
                }
            )
        panels = [_panel(number, panel, source) for number, panel in enumerate(self.panels)]
        return {
            "uid": f"luthier-{self.name}",
            "title": f"Luthier: {self.title}",
            "tags": ["luthier"],
            "schemaVersion": 39,
            "editable": True,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {"list": variables},
            "panels": panels,
        }


def _panel(number: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
        for index, (legend, query) in enumerate(panel.queries)
    ]
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _of(metric: Metric, label: str) -> str:
    return f'{metric.exported}{{{label}=~"${label}"}}'


def _sum(metric: Metric, by: str) -> str:
    return f"sum by ({by}) ({_of(metric, 'model')})"


def _rate(metric: Metric, by: str, label: str) -> str:
    return f"sum by ({by}) (rate({_of(metric, label)}[$__rate_interval]))"


def _quantiles(metric: Metric) -> Sequence[tuple[str, str]]:
    return [
        (f"{{{{model}}}}: {name}", f"histogram_quantile({share}, {_rate(metric, 'model, le', 'model')})")
        for name, share in (("median", 0.5), ("95th percentile", 0.95))
    ]


def _of_steps(metric: Metric) -> str:
    return f"{_rate(metric, 'run', 'run')} / {_rate(metrics.STEP_SECONDS, 'run', 'run')}"


def _run(metric: Metric) -> Sequence[tuple[str, str]]:
    return [("{{run}}", _of(metric, "run"))]


def _age(metric: Metric) -> str:
    return f"(time() - {_of(metric, 'run')}) and on (run) {metrics.RUN_ACTIVE.exported} == 1"


TRAINING = Dashboard(
    "training",
    "training",
    "run",
    metrics.RUN_ACTIVE,
    (
        Panel("Loss, nats per supervised token", "short", _run(metrics.TRAINING_LOSS)),
        Panel("Gradient norm", "short", _run(metrics.GRADIENT_NORM)),
        Panel("Learning rate", "short", _run(metrics.LEARNING_RATE)),
        Panel("Tokens a second, last step", "short", _run(metrics.TOKENS_PER_S)),
        Panel(
            "Tokens a second, with all that is between steps",
            "short",
            [
                ("{{run}}", _rate(metrics.TRAINED_TOKENS, "run", "run")),
                ("{{run}}, supervised", _rate(metrics.SUPERVISED_TOKENS, "run", "run")),
            ],
        ),
        Panel("Steps a second", "short", [("{{run}}", _rate(metrics.TRAINING_STEPS, "run", "run"))]),
        Panel(
            "Share of the time in steps",
            "percentunit",
            [
                ("{{run}}: waiting for data", _of_steps(metrics.DATA_WAIT_SECONDS)),
                ("{{run}}: standing still for checkpoints", _of_steps(metrics.CHECKPOINT_STALL_SECONDS)),
            ],
        ),
        Panel("Padding", "percentunit", _run(metrics.PADDING)),
        Panel(
            "Since the last step, and the last checkpoint",
            "s",
            [
                ("{{run}}: step", _age(metrics.LAST_STEP_AT)),
                ("{{run}}: checkpoint", _age(metrics.LAST_CHECKPOINT_AT)),
            ],
        ),
        Panel("Workers", "short", _run(metrics.TRAINING_WORKERS)),
        Panel("Cost so far", "currencyUSD", _run(metrics.RUN_COST)),
        Panel("Cost of an hour", "currencyUSD", _run(metrics.RUN_SPENDING)),
        Panel("Share of the nearest limit that is used", "percentunit", _run(metrics.RUN_LIMIT)),
        Panel(
            "Memory of the fullest worker",
            "bytes",
            [
                ("{{run}}", _of(metrics.WORKER_MEMORY, "run")),
                ("{{run}}: what it may have", _of(metrics.WORKER_MEMORY_LIMIT, "run")),
            ],
        ),
        Panel("Share of the GPUs' peak that the model needs (MFU)", "percentunit", _run(metrics.MFU)),
        Panel(
            "Failures and skipped steps so far",
            "short",
            [
                ("{{run}}: failures", _of(metrics.TRAINING_FAILURES, "run")),
                ("{{run}}: skipped steps", _of(metrics.SKIPPED_STEPS, "run")),
            ],
        ),
    ),
)

SERVING = Dashboard(
    "serving",
    "serving",
    "model",
    metrics.KV_BLOCKS,
    (
        Panel("Requests a second, by status", "short", [("{{code}}", _rate(metrics.REQUESTS, "code", "model"))]),
        Panel("Requests a second, by adapter", "short", [("{{adapter}}", _rate(metrics.REQUESTS, "adapter", "model"))]),
        Panel(
            "Tokens a second",
            "short",
            [
                ("{{model}}: generated", _rate(metrics.GENERATED_TOKENS, "model", "model")),
                ("{{model}}: of prompts", _rate(metrics.PROMPT_TOKENS, "model", "model")),
                ("{{model}}: of prompts, from the cache", _rate(metrics.SHARED_TOKENS, "model", "model")),
            ],
        ),
        Panel(
            "Tokens a second, by adapter",
            "short",
            [("{{adapter}} {{kind}}", _rate(metrics.ADAPTER_TOKENS, "adapter, kind", "model"))],
        ),
        Panel("Time to the first token", "s", _quantiles(metrics.FIRST_TOKEN_SECONDS)),
        Panel("Time of each further token", "s", _quantiles(metrics.TOKEN_SECONDS)),
        Panel(
            "Sequences",
            "short",
            [
                ("{{model}}: running", _sum(metrics.RUNNING_SEQUENCES, "model")),
                ("{{model}}: waiting", _sum(metrics.WAITING_SEQUENCES, "model")),
            ],
        ),
        Panel(
            "Key-value cache in use",
            "percentunit",
            [("{{model}}", f"{_sum(metrics.KV_BLOCKS_USED, 'model')} / {_sum(metrics.KV_BLOCKS, 'model')}")],
        ),
        Panel(
            "Adapters",
            "short",
            [
                ("{{model}}: in engines", _sum(metrics.ADAPTERS_LOADED, "model")),
                ("{{model}}: most in one forward pass", f"max by (model) ({_of(metrics.BATCH_ADAPTERS_MAX, 'model')})"),
            ],
        ),
        Panel(
            "Memory of engines",
            "bytes",
            [
                ("{{model}}: weights of the base", _sum(metrics.WEIGHT_BYTES, "model")),
                ("{{model}}: key-value cache", _sum(metrics.KV_BYTES, "model")),
                ("{{model}}: adapters", _sum(metrics.ADAPTER_BYTES, "model")),
                ("{{model}}: what adapters may take", _sum(metrics.ADAPTER_BYTES_BUDGET, "model")),
            ],
        ),
        Panel("Adapter loads a second", "short", [("{{model}}", _rate(metrics.ADAPTER_LOADS, "model", "model"))]),
        Panel(
            "Forward passes a second",
            "short",
            [
                ("{{model}}: all", _rate(metrics.ENGINE_STEPS, "model", "model")),
                ("{{model}}: with several adapters", _rate(metrics.MIXED_STEPS, "model", "model")),
            ],
        ),
    ),
)

CLUSTER = Dashboard(
    "cluster",
    "cluster",
    None,
    None,
    (
        Panel(
            "GPUs",
            "short",
            [("{{State}}", f'sum by (State) ({metrics.RAY_RESOURCES.exported}{{Name="GPU"}})')],
        ),
        Panel(
            "CPUs",
            "short",
            [("{{State}}", f'sum by (State) ({metrics.RAY_RESOURCES.exported}{{Name="CPU"}})')],
        ),
        Panel("Nodes", "short", [("{{node_type}}", f"sum by (node_type) ({metrics.RAY_NODES.exported})")]),
        Panel("Nodes asked for and not there", "short", [("{{NodeType}}", metrics.RAY_PENDING_NODES.exported)]),
        Panel(
            "Memory in use",
            "percentunit",
            [("{{ip}}", f"1 - {metrics.RAY_MEMORY_AVAILABLE.exported} / {metrics.RAY_MEMORY_TOTAL.exported}")],
        ),
        Panel("Disk in use", "percent", [("{{ip}}", metrics.RAY_DISK_USED.exported)]),
        Panel("Runs that are active", "short", [("runs", f"sum({metrics.RUN_ACTIVE.exported})")]),
    ),
)

DASHBOARDS = (TRAINING, SERVING, CLUSTER)
