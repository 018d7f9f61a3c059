"""Every key in the store, each made by one function. Nothing else spells a key.

Keys are relative to the store's prefix. Steps and alias numbers are zero-padded so that the order
of keys is the order of events; adapter versions are counted by people and are not padded.
"""

import re

NAME_PATTERN = r"[a-z0-9]([a-z0-9._-]{0,94}[a-z0-9])?"
"""Names of models, runs, adapters and aliases: lower case, safe in a key, a URL and a shell."""


def is_name(text: str) -> bool:
    """Whether `text` may name a model, run, adapter or alias."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def model_prefix(model: str, revision: str) -> str:
    return f"models/{model}/{revision}/"


def model_manifest(model: str, revision: str) -> str:
    return f"{model_prefix(model, revision)}model.json"


def models_prefix() -> str:
    return "models/"


def datasets_prefix() -> str:
    return "datasets/"


def dataset_prefix(digest: str) -> str:
    return f"{datasets_prefix()}{digest}/"


def dataset_shard(digest: str, index: int) -> str:
    return f"{dataset_prefix(digest)}shard-{index:05d}.arrow"


def dataset_manifest(digest: str) -> str:
    return f"{dataset_prefix(digest)}dataset.json"


def prepared_sets_prefix() -> str:
    return "prepared/"


def prepared_prefix(digest: str) -> str:
    """A set of rows that was checked and cleaned."""
    return f"{prepared_sets_prefix()}{digest}/"


def prepared_card(digest: str) -> str:
    return f"{prepared_prefix(digest)}card.json"


def prepared_check(digest: str) -> str:
    """What a check found, where no rows were asked for."""
    return f"{prepared_prefix(digest)}check.json"


def prepared_rows(digest: str, split: str, index: int) -> str:
    """Rows that stayed; `split` is rows, or evaluation."""
    return f"{prepared_prefix(digest)}{split}-{index:05d}.jsonl"


def prepared_parts_prefix(digest: str) -> str:
    return f"{prepared_prefix(digest)}parts/"


def prepared_part(digest: str, index: int) -> str:
    """What was found in a part; written after its rows, and says that they are there."""
    return f"{prepared_parts_prefix(digest)}{index:05d}.arrow"


def prepared_part_rows(digest: str, index: int) -> str:
    return f"{prepared_parts_prefix(digest)}{index:05d}.jsonl.zst"


def runs_prefix() -> str:
    return "runs/"


def run_prefix(run_id: str) -> str:
    return f"runs/{run_id}/"


def run_record(run_id: str) -> str:
    return f"{run_prefix(run_id)}run.json"


def metrics_part(run_id: str, attempt: int, first_step: int) -> str:
    """One part of `metrics.jsonl`: the store has no append, so parts are listed and joined in order."""
    return f"{metrics_prefix(run_id)}{attempt:04d}-{first_step:08d}.jsonl"


def metrics_prefix(run_id: str) -> str:
    return f"{run_prefix(run_id)}metrics.jsonl/"


def attempt(run_id: str, number: int) -> str:
    return f"{attempts_prefix(run_id)}{number:04d}.json"


def attempts_prefix(run_id: str) -> str:
    return f"{run_prefix(run_id)}attempts/"


def event(run_id: str, number: int) -> str:
    return f"{events_prefix(run_id)}{number:08d}.json"


def events_prefix(run_id: str) -> str:
    return f"{run_prefix(run_id)}events.jsonl/"


def heartbeat(run_id: str) -> str:
    return f"{run_prefix(run_id)}heartbeat.json"


def stop_request(run_id: str, number: int) -> str:
    return f"{stop_requests_prefix(run_id)}{number:04d}.json"


def stop_requests_prefix(run_id: str) -> str:
    return f"{run_prefix(run_id)}stop/"


def checkpoints_prefix(run_id: str) -> str:
    return f"{run_prefix(run_id)}checkpoints/"


def checkpoint_prefix(run_id: str, step: int) -> str:
    return f"{checkpoints_prefix(run_id)}{step:08d}/"


def checkpoint_manifest(run_id: str, step: int) -> str:
    return f"{checkpoint_prefix(run_id, step)}manifest.json"


def adapters_prefix() -> str:
    return "adapters/"


def adapter_prefix(name: str) -> str:
    return f"adapters/{name}/"


def adapter_version_prefix(name: str, version: int) -> str:
    return f"{adapter_prefix(name)}{version}/"


def adapter_file(name: str, version: int, file: str) -> str:
    return f"{adapter_version_prefix(name, version)}{file}"


def adapter_record(name: str, version: int) -> str:
    return adapter_file(name, version, "record.json")


def evaluations_prefix(name: str, version: int) -> str:
    return f"{adapter_version_prefix(name, version)}evaluations/"


def evaluation(name: str, version: int, number: int) -> str:
    """A report on a version; the highest number is the newest."""
    return f"{evaluations_prefix(name, version)}{number:08d}.json"


def suites_prefix() -> str:
    return "suites/"


def suite_file(sha256: str, suffix: str) -> str:
    """A file of prompts that versions are evaluated by, under what it holds; `suffix` says how to read it."""
    return f"{suites_prefix()}{sha256}{suffix}"


def aliases_prefix(name: str) -> str:
    return f"aliases/{name}/"


def alias_entry(name: str, number: int) -> str:
    return f"{aliases_prefix(name)}{number:08d}.json"


def usage_prefix() -> str:
    return "usage/"


def day_usage_prefix(day: str) -> str:
    """All that was used on a day (2026-11-26, UTC)."""
    return f"{usage_prefix()}{day}/"


def run_usage_prefix(day: str, run_id: str) -> str:
    """What a run has held on a day."""
    return f"{day_usage_prefix(day)}runs/{run_id}/"


def run_usage(day: str, run_id: str, driver: str, number: int) -> str:
    """One entry of a driver, which numbers its own: no two drivers ever want the same key."""
    return f"{run_usage_prefix(day, run_id)}{driver}-{number:06d}.json"


def run_of_usage(key: str) -> tuple[str, str] | None:
    """The day and the run that a key below `usage/` belongs to; None for what is none of a run."""
    match key.split("/"):
        case ["usage", day, "runs", run_id, _]:
            return day, run_id
    return None


def probe_key(unique: str) -> str:
    """An object that proves what the store does, and is deleted at once."""
    return f"{probes_prefix()}{unique}"


def probes_prefix() -> str:
    return ".probe/"
