"""Between a published version and its alias: evaluate, then move it or leave it. No torch.

release    at the end of a run: measured by what the recipe requires, and the alias moves only when that passed
evaluate   at any time, of any version: the report alone
"""

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from cluster import registry, secret
from cluster.config import load
from cluster.errors import ConfigError, Fault, LuthierError, ReleaseRefused, StoreError
from cluster.evaluation import ROW_COLUMNS, EvaluationReport
from cluster.logs import say, show
from cluster.records import RunRecord
from cluster.session import joined
from cluster.store import Store, open_existing
from cluster.who import submitter
from jobs import evaluation, runs
from jobs.config import Recipe

_SHOWN = 120  # characters of a text of an example


def release(run: RunRecord, recipe: Recipe, name: str, version: int, store: Store, plain_store: Store) -> bool | None:
    """Evaluate what a run has published, where its recipe asks for it, and move the alias if that passed.

    Returns whether the alias moved; None where the recipe names none. What keeps it from moving is told to the run's
    log and raises nothing: the version is published, and can be evaluated and promoted later.

    Args:
        store: the run's; outlasts outages.
        plain_store: the same without that, to be sent to a worker.
    """
    assert recipe.publish
    alias, reference = recipe.publish.alias, f"{name}@{version}"
    record = registry.record(store, name, version)
    if record.gate:
        _tell(store, run, f"evaluating {reference}: {', '.join(record.gate.suites)}")
        try:
            with _alive(plain_store, run.run_id):
                report = evaluation.evaluate(store, record, recipe, record.gate, plain_store)
        except LuthierError as error:
            again = f"`luthier jobs evaluate {reference} --store {store.url}` tries it again"
            _tell(store, run, f"{reference} could not be evaluated: {error}; {again}")
        else:
            _tell_report(store, run, report)
    if alias is None:
        return None
    try:
        registry.set_alias(store, name, alias, version, by=submitter(), why=f"published by run {run.run_id}")
    except ReleaseRefused as refused:
        _tell(store, run, f"the alias did not move: {refused}")
        return False
    say(f"alias {name}@{alias} is version {version}")
    return True


def evaluate(reference: str, url: str, recipe_path: str | None, overrides: Sequence[str]) -> EvaluationReport:
    """Evaluate a version from here, on its recipe's cluster, by what it must show or by what another recipe asks for.

    Raises LuthierError: InputError for what cannot be evaluated as it stands; then no report is written.
    """
    given = (override.partition("=") for override in overrides if override.startswith("secrets."))
    secret.load({name.removeprefix("secrets."): value for name, _, value in given})  # the store's own, perhaps
    store = open_existing(url)
    record = evaluation.find(store, reference)
    if recipe_path:
        recipe = load(Path(recipe_path), Recipe, overrides)
        if recipe.evaluation is None:
            raise ConfigError([Fault(recipe_path, "evaluation", "is not there; say what shall be measured")])
    else:
        evaluation.requirement_of(record)
        recipe = evaluation.recipe_of(store, record, overrides)
    secret.load(recipe.secrets)
    with joined(recipe.cluster, 1, secrets=recipe.secrets):
        by_recipe = evaluation.require(recipe, record, store) if recipe_path else evaluation.requirement_of(record)
        report = evaluation.evaluate(store, record, recipe, by_recipe)
    if record.gate and record.gate.digest != report.requirement.digest:
        say("warning: no alias moves by this report: the version must pass what its own recipe asks for")
    return report


def reported(report: EvaluationReport) -> int:
    """Print a report: its table, what went wrong, and one JSON object. Returns the exit code: 0 when it passed."""
    show(report.rows(), ROW_COLUMNS)
    failed = {measure.suite for measure in report.measures if not measure.passed}
    for example in report.examples:
        if example.suite in failed and example.score < 1:
            stable = "" if example.stable is None else f"; stable: {_line(example.stable)}"
            wanted = "" if example.expected is None else f"; expected: {_line(example.expected)}"
            say(f"{example.suite}: {example.place}: {_line(example.prompt)} -> {_line(example.answer)}{wanted}{stable}")
    line = {
        "adapter": f"{report.name}@{report.version}",
        "evaluation": report.number,
        "passed": report.passed,
        "measures": [measure.model_dump(mode="json") for measure in report.measures],
    }
    sys.stderr.flush()
    print(json.dumps(line), flush=True)
    return 0 if report.passed else 1


def _line(text: str) -> str:
    """A text in one line, shortened."""
    return json.dumps(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…", ensure_ascii=False)


def _tell(store: Store, run: RunRecord, text: str) -> None:
    say(text)
    runs.tell(store, run.run_id, "; ".join(line.strip().rstrip(":;") for line in text.splitlines()))


def _tell_report(store: Store, run: RunRecord, report: EvaluationReport) -> None:
    for measure in report.measures:
        say(f"{'passed' if measure.passed else 'FAILED'}: {measure}")
    failed = [str(measure) for measure in report.measures if not measure.passed]
    said = f"failed: {'; '.join(failed)}" if failed else f"passed: {len(report.measures)} measure(s)"
    runs.tell(store, run.run_id, f"evaluation {report.number} of {report.name}@{report.version} {said}")


@contextmanager
def _alive(store: Store, run_id: str) -> Iterator[None]:
    """A run whose version is evaluated is not lost; a stop request or SIGTERM ends it, as a second ends training."""
    ended, me = threading.Event(), uuid4().hex
    is_main = threading.current_thread() is threading.main_thread()

    def beat() -> None:
        while True:
            try:
                runs.beat(store, run_id, me)
                if is_main and runs.stop_requests(store, run_id):
                    say("a stop request: the evaluation is given up, and the version stays published")
                    # To the thread that waits, which a signal to this one would not wake. Not SIGINT: whoever was
                    # started in the background of a shell ignores that.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                    return
            except StoreError as error:
                say(f"warning: the store does not answer, so nobody sees that this run lives: {error}")
            if ended.wait(runs.HEARTBEAT_S):
                return

    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    thread = threading.Thread(target=beat, name="luthier-evaluating", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            ended.set()
            thread.join()
    finally:  # only when no signal of that thread can come any more: the earlier handler would end the process
        if is_main:
            signal.signal(signal.SIGTERM, earlier)
