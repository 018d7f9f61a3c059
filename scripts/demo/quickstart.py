"""The whole loop on one machine: `scripts/quickstart`.

    make a tiny model → train it in full → two LoRA adapters on two workers → serve → ask all three → table

Every stage is the real one: a Ray head with token authentication, `ray job submit`, Ray Train with DeepSpeed, an
object store (here a folder), Ray Serve, and the official `openai` client. What is made stays in .luthier/quickstart,
and a second run takes the base model from there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.table import Table

from cluster.errors import LuthierError, RunFailed
from cluster.logs import fail
from cluster.nodes import LocalCluster
from cluster.processes import free_ports
from cluster.store import open_store
from scripts.demo import tasks

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".luthier" / "quickstart"
STORE = f"file://{HOME}/store"
BASE_MODEL = "tiny-orders"
QUESTIONS = 60
"""Held-out questions asked of each task."""
CLIENTS = 16

console = Console(highlight=False)


@dataclass(frozen=True)
class Answers:
    """What one model said to the held-out questions of one task."""

    model: str
    answers: list[str]
    score: float
    tokens: int
    seconds: float


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    began = time.monotonic()
    try:
        run()
    except LuthierError as error:
        return fail(error)
    except KeyboardInterrupt:
        console.print("stopped; everything that was started has ended")
        return 130
    console.print(f"[dim]{time.monotonic() - began:.0f} s in all[/dim]")
    return 0


def run() -> None:
    """All stages. Raises LuthierError."""
    HOME.mkdir(parents=True, exist_ok=True)
    variables = {
        "LUTHIER_CACHE": str(HOME / "cache"),
        "OMP_NUM_THREADS": "1",
        # Logical CPUs: two workers train, then one replica serves. The machine's own two cores do all of it.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    stage("a Ray head with token authentication")
    with LocalCluster(head_cpus=3, variables=variables) as cluster:
        console.print(f"dashboard {cluster.dashboard_url} (its token is in {cluster.folder}/token)")
        revision = base_model(cluster)
        for task in tasks.ADAPTERS:
            stage(f"adapter {task}: LoRA on two workers")
            submit(cluster, f"quickstart-{task}", [f"model.revision={revision}"])
        stage("serving the base and both adapters")
        port = free_ports(1)[0]
        serve(cluster, revision, port)
        stage("asking")
        ask_all(f"http://127.0.0.1:{port}/v1")
        stage("shutting down")


def stage(title: str) -> None:
    console.print(f"\n[bold]● {title}[/bold]")


def base_model(cluster: LocalCluster) -> str:
    """Train the base in full, unless the store has it from an earlier run. Returns its revision."""
    from cluster.models import mirrored

    store = open_store(STORE)
    have = [manifest for manifest in mirrored(store) if manifest.name == BASE_MODEL]
    if have:
        newest = max(have, key=lambda manifest: manifest.created_at)
        stage(f"base model: {BASE_MODEL} from {newest.created_at} (remove {HOME} to train it anew)")
        return newest.revision
    stage("making text, a tokenizer, and a tiny Qwen3 with random weights")
    make_inputs()
    stage("base model: full fine-tune on two workers, until it can answer questions about orders")
    result = submit(cluster, "quickstart-base", [f"model.source={HOME}/model"])
    return str(result["adapter"]).partition("@")[2]


def make_inputs() -> None:
    """The tasks' rows, put into the store, and the untrained model, in a folder."""
    from scripts.demo.model import make_model

    store = open_store(STORE)
    tasks.write_all(HOME / "data")
    for path in sorted((HOME / "data").glob("*/*.jsonl")):
        store.upload(path, f"quickstart/{path.parent.name}/{path.name}")
    make_model(HOME / "model")
    rows = ", ".join(f"{task} {tasks.TRAIN_ROWS[task]:,}" for task in tasks.TASKS)
    console.print(f"training rows: {rows}; held out: {tasks.HELDOUT_ROWS[tasks.BASE]} and more, in new combinations")


def submit(cluster: LocalCluster, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """`ray job submit` a recipe and follow it. Returns the job's last line. Raises RunFailed."""
    job = ["python", "-m", "jobs.train", f"configs/recipes/{recipe}.yaml", f"store={STORE}", *overrides]
    result: dict[str, Any] = json.loads(submit_command(cluster, job, recipe)[-1])
    return result


def submit_command(cluster: LocalCluster, job: Sequence[str], name: str) -> list[str]:
    """Submit, print our own lines as they come (Ray's go to the log file alone), and return them."""
    command = ["ray", "job", "submit", "--no-wait", "--working-dir", ".", "--submission-id", f"{name}-{os.getpid()}"]
    console.print(f"[dim]$ ray job submit --working-dir . -- {' '.join(job)}[/dim]", soft_wrap=True)
    log = HOME / f"{name}.log"
    environment = cluster.environment()
    with log.open("w") as file:
        submitted = subprocess.run([*command, "--", *job], cwd=ROOT, env=environment, stdout=file, stderr=file)
        if submitted.returncode:
            raise RunFailed(f"ray job submit failed; see {log}")
    follow = subprocess.Popen(
        ["ray", "job", "logs", "--follow", f"{name}-{os.getpid()}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert follow.stdout
    lines = []
    with log.open("a") as file:
        for line in follow.stdout:
            file.write(line)
            if is_ours(line):
                lines.append(line.rstrip())
                console.print(f"  {line.rstrip()}", soft_wrap=True, markup=False)
    if follow.wait() or not lines or lines[-1].startswith("error:"):
        raise RunFailed(f"the job {name} failed; see {log}")
    return lines


def is_ours(line: str) -> bool:
    """Whether a line of a job's log is Luthier's: Ray's begin with a time, a colour or a process in brackets."""
    starts = (
        "plan:",
        "data:",
        "run ",
        "step ",
        "published ",
        "alias ",
        "warning:",
        "error:",
        "{",
        "http://",
        "serving",
    )
    return line.startswith(starts)


def serve(cluster: LocalCluster, revision: str, port: int) -> None:
    """Deploy as a job of its own: the application outlives it."""
    job = ["python", "-m", "serving", "deploy", "configs/serving/tiny.yaml", f"store={STORE}", f"http.port={port}"]
    submit_command(cluster, [*job, f"model.revision={revision}"], "serve")


def ask_all(url: str) -> None:
    """Ask base and adapters the held-out questions of both adapter tasks; print the table and the scores."""
    models = [BASE_MODEL, *tasks.ADAPTERS]
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        results = {
            (task, model): ask(client, pool, model, task) for task in tasks.ADAPTERS for model in (BASE_MODEL, task)
        }
        skill = ask(client, pool, BASE_MODEL, tasks.BASE)
        shown = [prompt(row)[-1]["content"] for row in heldout(tasks.ADAPTERS[0])[:3]]
        table = Table(title="the same request, three behaviours", show_lines=True)
        for heading in ("question", *models):
            table.add_column(heading, overflow="fold")
        for question in shown:
            turns = [{"role": "user", "content": question}]
            table.add_row(question, *pool.map(lambda model, turns=turns: say(client, model, turns)[0], models))
    console.print(table)
    scores = Table("held-out exact match", "base", "adapter")
    for task in tasks.ADAPTERS:
        scores.add_row(task, f"{results[task, BASE_MODEL].score:.2f}", f"{results[task, task].score:.2f}")
    console.print(scores)
    console.print(f"the base on its own questions: {skill.score:.2f}")
    every = [*results.values(), skill]
    tokens, seconds = sum(one.tokens for one in every), sum(one.seconds for one in every)
    console.print(
        f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s with {CLIENTS} clients at once"
    )
    console.print(
        f"\nWhere to look next: README.md (your own recipe), {HOME.relative_to(ROOT)}/*.log (the jobs' logs),\n"
        f"  .venv/bin/luthier jobs list --store {STORE}\n"
        f"  .venv/bin/luthier cluster adapters --store {STORE}",
        soft_wrap=True,
    )
    for task in tasks.ADAPTERS:
        if results[task, task].score <= 0.9 or results[task, BASE_MODEL].score >= 0.2:
            raise RunFailed(f"{task}: the adapter should score above 0.9 and the base below 0.2 on its questions")


def ask(client: openai.OpenAI, pool: ThreadPoolExecutor, model: str, task: str) -> Answers:
    """All held-out questions of a task, many at once."""
    rows = heldout(task)
    began = time.monotonic()
    said = list(pool.map(lambda row: say(client, model, prompt(row)), rows))
    seconds = time.monotonic() - began
    answers = [text for text, _ in said]
    score = tasks.exact_match(answers, [row["messages"][-1]["content"] for row in rows])
    return Answers(model, answers, score, sum(tokens for _, tokens in said), seconds)


def heldout(task: str) -> list[tasks.Row]:
    return list(tasks.rows(task, "heldout"))[:QUESTIONS]


def prompt(row: tasks.Row) -> list[Any]:
    """All turns but the last, which is the answer to give."""
    return list(row["messages"][:-1])


def say(client: openai.OpenAI, model: str, turns: Sequence[Any]) -> tuple[str, int]:
    """The greedy answer, and how many tokens it took."""
    answer = client.chat.completions.create(model=model, messages=list(turns), temperature=0, max_tokens=96)
    assert answer.usage
    return answer.choices[0].message.content or "", answer.usage.completion_tokens


if __name__ == "__main__":
    sys.exit(main())
