"""Alerts and dashboards by Debian's promtool: each alert fires when it should and is silent when it should be.

That every metric they name exists is held by a live scrape, in tests/e2e/test_loop.py.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster import metrics
from cluster.cli import app
from cluster.dashboards.alerts import ALERTS, rules
from cluster.dashboards.grafana import DASHBOARDS

MINUTES = 120
LONG = f"x{MINUTES}"
RUN, MODEL, NODE, KIND = '{run="r"}', '{model="m"}', '{ip="10.0.0.1"}', '{NodeType="spot"}'

Series = dict[str, str]


def active(more: Series) -> Series:
    return {f"ray_luthier_run_active{RUN}": f"1+0{LONG}", **more}


def shares(part: str, percent: int) -> Series:
    """A counter of seconds that grows by so many percent of the time in steps."""
    return {
        f"ray_luthier_step_seconds_total{RUN}": f"0+100{LONG}",
        f"ray_luthier_{part}_seconds_total{RUN}": f"0+{percent}{LONG}",
    }


def answers(code: int, percent: int) -> Series:
    name = "ray_luthier_requests_total"
    good, bad = (f'{name}{{model="m",adapter="",code="{each}"}}' for each in (200, code))
    return {good: f"0+{100 - percent}{LONG}", bad: f"0+{percent}{LONG}"}


def gpus(used: int, free: int) -> Series:
    counts = {"USED": used, "AVAILABLE": free}
    return {f'ray_resources{{Name="GPU",State="{state}"}}': f"{count}+0{LONG}" for state, count in counts.items()}


def queue(waiting: int, running: int) -> Series:
    return {
        f"ray_luthier_waiting_sequences{MODEL}": f"{waiting}+0{LONG}",
        f"ray_luthier_running_sequences{MODEL}": f"{running}+0{LONG}",
    }


def first_tokens(slow: int) -> Series:
    """Of a hundred answers a minute, so many take more than ten seconds."""
    name = "ray_luthier_first_token_seconds_bucket"
    counts = {"1.0": 100 - slow, "10.0": 100 - slow, "30.0": 100, "+Inf": 100}
    return {f'{name}{{model="m",le="{limit}"}}': f"0+{count}{LONG}" for limit, count in counts.items()}


def blocks(used: int) -> Series:
    return {
        f"ray_luthier_kv_blocks_used{MODEL}": f"{used}+0{LONG}",
        f"ray_luthier_kv_blocks{MODEL}": f"100+0{LONG}",
    }


def loads(a_minute: int) -> Series:
    return {
        f"ray_luthier_adapter_loads_total{MODEL}": f"0+{a_minute}{LONG}",
        f"ray_luthier_adapters_loaded{MODEL}": f"8+0{LONG}",
    }


def held(memory: int) -> Series:
    return {
        f"ray_luthier_worker_memory_bytes{RUN}": f"{memory}+0{LONG}",
        f"ray_luthier_worker_memory_limit_bytes{RUN}": f"100+0{LONG}",
    }


def memory(free: int) -> Series:
    return {f"ray_node_mem_available{NODE}": f"{free}+0{LONG}", f"ray_node_mem_total{NODE}": f"100+0{LONG}"}


# promtool's clock begins at 0, a sample a minute: a time stamp that stays 0 grows old, one of +60 a minute does not.
OLD, FRESH = f"0+0{LONG}", f"0+60{LONG}"
CASES: dict[str, tuple[Series, list[Series]]] = {
    "TrainingStandsStill": (
        active({f"ray_luthier_last_step_timestamp_seconds{RUN}": OLD}),
        [
            active({f"ray_luthier_last_step_timestamp_seconds{RUN}": FRESH}),
            {f"ray_luthier_last_step_timestamp_seconds{RUN}": OLD, f"ray_luthier_run_active{RUN}": f"0+0{LONG}"},
            {f"ray_luthier_last_step_timestamp_seconds{RUN}": OLD, 'ray_luthier_run_active{run="other"}': f"1+0{LONG}"},
        ],
    ),
    "CheckpointTooOld": (
        active({f"ray_luthier_last_checkpoint_timestamp_seconds{RUN}": f"-3600+0{LONG}"}),
        [active({f"ray_luthier_last_checkpoint_timestamp_seconds{RUN}": f"600+0{LONG}"})],
    ),
    "TrainingFailsAgainAndAgain": (
        active({f"ray_luthier_training_failures{RUN}": f"2+0{LONG}"}),
        [active({f"ray_luthier_training_failures{RUN}": f"1+0{LONG}"})],
    ),
    "StepsAreSkipped": (
        active({f"ray_luthier_skipped_steps{RUN}": f"0+1{LONG}"}),
        [active({f"ray_luthier_skipped_steps{RUN}": f"7+0{LONG}"})],
    ),
    "TrainingWaitsForData": (shares("data_wait", 30), [shares("data_wait", 10)]),
    "CheckpointsHoldTrainingUp": (shares("checkpoint_stall", 15), [shares("checkpoint_stall", 5)]),
    "WorkerMemoryIsLow": (active(held(98)), [active(held(90)), held(98)]),
    "NodesDoNotCome": (
        {f"autoscaler_pending_nodes{KIND}": f"1+0{LONG}"},
        [{f"autoscaler_pending_nodes{KIND}": series} for series in ("1+0x10 0+0x105 1+0x4", f"0+0{LONG}")],
    ),
    "RunNearsItsLimit": (
        active({f"ray_luthier_run_limit_ratio{RUN}": f"0.95+0{LONG}"}),
        [
            active({f"ray_luthier_run_limit_ratio{RUN}": f"0.5+0{LONG}"}),
            {f"ray_luthier_run_limit_ratio{RUN}": f"1.01+0{LONG}", f"ray_luthier_run_active{RUN}": f"0+0{LONG}"},
        ],
    ),
    "RequestsFail": (answers(503, 10), [answers(503, 2), answers(404, 50), answers(429, 50)]),
    "RequestsAreRefused": (answers(429, 20), [answers(429, 5), answers(500, 50)]),
    "FirstTokensAreSlow": (first_tokens(10), [first_tokens(2)]),
    "RequestsQueue": (queue(60, 16), [queue(30, 16), queue(8, 0)]),
    "KeyValueCacheIsFull": (blocks(98), [blocks(90)]),
    "AdaptersComeAndGo": (loads(20), [loads(4)]),
    "GpusAreIdle": (gpus(2, 6), [gpus(6, 2), gpus(0, 0)]),
    "NodeMemoryIsLow": (memory(3), [memory(10)]),
    "NodeDiskIsFilling": (
        {f"ray_node_disk_utilization_percentage{NODE}": f"93+0{LONG}"},
        [{f"ray_node_disk_utilization_percentage{NODE}": f"80+0{LONG}"}],
    ),
}
"""For each alert series that make it fire, and such that are near to it and must not."""


def promtool(*arguments: str | Path) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool; Debian's package is `prometheus`, and `scripts/test` installs it as root")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    file = tmp_path / "alerts.yaml"
    file.write_text(rules())
    return file


def test_the_rules_are_valid(rule_file: Path) -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", "--lint-fatal", rule_file)


def test_every_alert_fires_when_it_should_and_not_when_it_should_not(rule_file: Path, tmp_path: Path) -> None:
    """Firing ones are counted by the labels that their summary names, so that none of those is empty."""
    assert CASES.keys() == {alert.name for alert in ALERTS}
    tests = []
    for alert in ALERTS:
        fires, silent = CASES[alert.name]
        named = sorted(set(re.findall(r"\$labels\.(\w+)", alert.summary)))
        query = f'count by ({",".join(named)}) (ALERTS{{alertname="{alert.name}",alertstate="firing"}})'
        known = {"run": "r", "model": "m", "ip": "10.0.0.1", "NodeType": "spot"}
        labels = ",".join(f'{label}="{known[label]}"' for label in named)
        for series, expected in [(fires, [{"labels": f"{{{labels}}}", "value": 1}]), *((each, []) for each in silent)]:
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    "promql_expr_test": [{"expr": query, "eval_time": f"{MINUTES}m", "exp_samples": expected}],
                }
            )
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rule_file)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", file)


def queries() -> dict[str, str]:
    """Every query of every dashboard by where it is, with Grafana's variables filled in."""
    return {
        f"{board.name}: {panel.title}: {legend}": query.replace("$__rate_interval", "5m")
        for board in DASHBOARDS
        for panel in board.panels
        for legend, query in panel.queries
    }


def test_every_query_of_a_dashboard_is_promql(tmp_path: Path) -> None:
    recorded = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries().values())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    promtool("check", "rules", "--lint-fatal", file)


def test_what_is_queried_is_named_once_and_what_is_named_is_queried() -> None:
    text = "\n".join([*queries().values(), *(alert.expression for alert in ALERTS)])
    used = set(re.findall(r"\b(?:ray|luthier|autoscaler)_\w+", text))
    assert used == {metric.exported for metric in metrics.ALL}
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)


def test_labels_in_queries_are_those_of_the_metrics() -> None:
    labels = {metric.exported: set(metric.labels) for metric in metrics.ALL}
    for where, query in [*queries().items(), *((alert.name, alert.expression) for alert in ALERTS)]:
        for name, inside in re.findall(r"\b((?:ray|luthier|autoscaler)_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)=", inside)) <= labels[name], where
        for legend in re.findall(r"\{\{(\w+)\}\}", where):
            names = re.findall(r"\b(?:ray|luthier|autoscaler)_\w+", query)
            assert any(legend in labels[name] for name in names), where


@pytest.mark.parametrize("metric", [each for each in metrics.ALL if each.is_ours], ids=lambda metric: str(metric.name))
def test_a_name_says_what_it_counts(metric: metrics.Metric) -> None:
    """Prometheus' own rules for names: counters end in _total, nothing else does."""
    assert re.fullmatch(r"[a-z][a-z0-9_]+", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.description.endswith(".")


def test_the_command_writes_what_prometheus_and_grafana_read(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["dashboards", "--out", str(tmp_path / "made")])
    assert done.exit_code == 0
    written = {file.name: file for file in (tmp_path / "made").iterdir()}
    assert set(done.output.split()) == {str(file) for file in written.values()}
    promtool("check", "rules", "--lint-fatal", written.pop("luthier-alerts.yaml"))
    assert len(written) == len(DASHBOARDS)
    for file in written.values():
        check_dashboard(json.loads(file.read_text()))


def check_dashboard(board: dict[str, Any]) -> None:
    """What Grafana needs of a dashboard: panels with ids that do not overlap, and sources that a variable names."""
    assert board["uid"].startswith("luthier-")
    assert board["templating"]["list"][0]["type"] == "datasource"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["type"] == "timeseries"
        assert panel["targets"]
        units = {"short", "s", "percentunit", "percent", "bytes", "currencyUSD"}
        assert panel["fieldConfig"]["defaults"]["unit"] in units
        grid = panel["gridPos"]
        columns = range(grid["x"], grid["x"] + grid["w"])
        cells = {(x, y) for x in columns for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & places
        assert all(x < 24 for x, _ in cells)
        places |= cells
