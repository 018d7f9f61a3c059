"""Prometheus over a Ray cluster of this machine: it finds the nodes by the file that Ray's head writes.

with Prometheus(discovery, folder) as prometheus:
    prometheus.query("ray_luthier_run_active")
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from cluster import metrics
from cluster.dashboards.alerts import rules
from cluster.errors import InputError, LuthierError
from cluster.logs import fail, show
from cluster.processes import HOST, free_ports

DISCOVERY = "prom_metrics_service_discovery.json"
SCRAPE_S = 2
START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


class Prometheus:
    """A server with Luthier's alerts that scrapes what `discovery` names; ended with the block, its data in `folder`.

    Raises InputError where Prometheus is not installed; LuthierError when it does not start.
    """

    def __init__(self, discovery: Path, folder: Path) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise InputError("prometheus is not installed; Debian: apt-get install prometheus")
        (folder / "alerts.yaml").write_text(rules())
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(folder / "alerts.yaml")],
            "scrape_configs": [
                {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "2s"}]}
            ],
        }
        (folder / "prometheus.yaml").write_text(json.dumps(config))  # JSON is YAML
        (port,) = free_ports(1)
        self.url = f"http://{HOST}:{port}"
        command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
        self._log = folder / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={HOST}:{port}"], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise LuthierError(f"Prometheus did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression now: each with `metric`, its labels, and `value`, (time, text)."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def names(self) -> set[str]:
        """Every metric that was seen so far."""
        return set(self.get("label/__name__/values"))

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of Prometheus' HTTP API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10, trust_env=False)
        return answer.raise_for_status().json()["data"]

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5, trust_env=False).is_success
        except httpx.TransportError:
            return False


def newest_discovery() -> Path:
    """The file of the Ray cluster of this machine that began last. Raises InputError without any."""
    temporary = Path(tempfile.gettempdir())
    found = [*temporary.glob(f"ray/{DISCOVERY}"), *temporary.glob(f"luthier-*/0/{DISCOVERY}")]
    if not found:
        raise InputError(f"no Ray cluster here: no {DISCOVERY} below {temporary}; start one, or name the file")
    return max(found, key=lambda file: file.stat().st_mtime)


def main(arguments: Sequence[str]) -> int:
    """Start Prometheus, show the scrape, and go on until Ctrl-C. Returns the exit code."""
    parser = argparse.ArgumentParser("scripts/monitor", description="Prometheus over the Ray cluster of this machine.")
    parser.add_argument("file", nargs="?", type=Path, help=f"the cluster's {DISCOVERY}")
    parser.add_argument("--once", action="store_true", help="show the scrape, and end")
    given = parser.parse_args(arguments)
    try:
        discovery = given.file or newest_discovery()
        if not discovery.is_file():
            raise InputError(f"{discovery} is no file; name the {DISCOVERY} in the temporary folder of Ray's head")
        with (
            tempfile.TemporaryDirectory(prefix="luthier-monitor-") as folder,
            Prometheus(discovery.resolve(), Path(folder)) as prometheus,
        ):
            show_scrape(prometheus)
            if not given.once:
                wait(prometheus)
    except LuthierError as error:
        return fail(error)
    return 0


def show_scrape(prometheus: Prometheus) -> None:
    """Print the targets with their state, and the samples of our metrics."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (targets := prometheus.get("targets")["activeTargets"]) or any(t["health"] == "unknown" for t in targets):
        if time.monotonic() > deadline:
            raise LuthierError("Prometheus finds nothing to scrape; is the Ray cluster up?")
        time.sleep(0.2)
    time.sleep(SCRAPE_S)
    show([{"target": t["scrapeUrl"], "health": t["health"], "error": t["lastError"]} for t in targets], COLUMNS)
    rows = []
    for metric in sorted(metrics.ALL, key=lambda each: each.exported):
        name = metric.exported.removesuffix("_bucket") + ("_count" if metric.kind == "histogram" else "")
        for sample in prometheus.query(name):
            labels = " ".join(f"{label}={sample['metric'].get(label, '')}" for label in metric.labels)
            rows.append({"metric": name, "labels": labels, "value": sample["value"][1]})
    show(rows, ("metric", "labels", "value"))


COLUMNS = ("target", "health", "error")


def wait(prometheus: Prometheus) -> None:
    """Until Ctrl-C."""
    print(f"Prometheus: {prometheus.url}, alerts: {prometheus.url}/alerts; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
