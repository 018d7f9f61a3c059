"""Data: tokenising beside datasets.map, near duplicates beside datasketch, and what is found of planted personal data.

    scripts/bench data [--json] [--rounds 3] [--alpaca ROWS.json] [--quick]

    tokenise                   chat rows to packed samples in the store, as a task of a job does it, beside datasets.map
                               with the same tokenizer, template and rows: tokens per CPU-second
    near_duplicates            signatures, bands and groups beside datasketch: rows per CPU-second; same shingles,
                               permutations and threshold
    near_duplicate_recall      of copies planted with small changes; cousins that share half of their text are no copies
    near_duplicate_precision
    pii_recall                 of planted values, all kinds and secrets; found means: all its characters, as its kind
    pii_precision              of what is found, the share that was planted. Look-alikes stand in the same texts, and
                               whatever else is found in texts that hold none counts as wrong

Planted sets (data_planted.py) come from a seed: English and Chinese texts of our own, and, with --alpaca or beside a
checkout that has it, an Alpaca file. The measures are those of all sets together; the table has each set and kind.
Presidio's pattern recognisers are the peer for personal data: on the English sets, and for the kinds that they know,
which secrets are not; `ours_same_kinds` is our figure for the same.

Peers run in .venv-data, made at the first use (--quick leaves them out rather than make it). One process, one thread.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cluster import logs
from cluster.errors import LuthierError, RunFailed
from cluster.store import open_store
from jobs.data import near
from jobs.data.numbers import REGIONS
from jobs.data.personal import find
from jobs.packing import order, packs
from jobs.rows import read_rows
from scripts.benchmarks import data_planted, workload
from scripts.benchmarks.report import REPOSITORY, Measure, show

SEED = 20261126
SEQUENCE_LENGTH = 512
THRESHOLD = 0.8
PERMUTATIONS = 128
PRESIDIO_SCORE = 0.4
ALPACA = REPOSITORY.parent / "shared" / "data" / "alpaca_en_demo.json"

ENVIRONMENT = REPOSITORY / ".venv-data"
REQUIREMENTS = REPOSITORY / "scripts" / "benchmarks" / "requirements-data.txt"
PEERS = REPOSITORY / "scripts" / "benchmarks" / "peers"
TIMEOUT_S = 1_800


@dataclass(frozen=True)
class Sizes:
    chats: int
    duplicates: int
    personal: int


FULL = Sizes(chats=6_000, duplicates=4_000, personal=2_000)
QUICK = Sizes(chats=300, duplicates=400, personal=300)


class Bench:
    """The contestants, in a folder of their own. `peers`: whether the others take part."""

    def __init__(self, folder: Path, sizes: Sizes, rounds: int, peers: bool) -> None:
        self._folder = folder
        self._sizes = sizes
        self._rounds = rounds
        self._peers = peers
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}

    def tokenise(self) -> Measure:
        """Raises RunFailed when the two did not make the same samples."""
        from jobs import dataset  # Ray: not needed for the rest

        rows_path, tokenizer_path = self._folder / "rows.jsonl", self._folder / "tokenizer"
        workload.write_rows(rows_path, self._sizes.chats)
        workload.make_tokenizer().save_pretrained(tokenizer_path)
        files = {name: (tokenizer_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
        files |= {path.name: path.read_bytes() for path in tokenizer_path.glob("chat_template.*")}
        rows = list(read_rows(rows_path, "rows"))
        store = open_store(f"file://{self._folder}/store")
        settings = {"sequence_length": SEQUENCE_LENGTH, "template": workload.MARKED_TEMPLATE}
        given = {"rows": rows_path, "tokenizer": tokenizer_path}
        ours, peer = [], []
        for number in range(self._rounds):
            digest = f"bench{number}"
            folder = self._folder / "store" / "datasets" / digest
            started = time.process_time()
            shards = [
                dataset.tokenise_shard(
                    files, rows[first : first + dataset.ROWS_PER_SHARD], first, digest, SEQUENCE_LENGTH, "drop", store
                )
                for first in range(0, len(rows), dataset.ROWS_PER_SHARD)
            ]
            tables = [dataset.read_shard(folder / shard.file.file) for shard in shards if shard.file]
            lengths = np.concatenate([table["input_ids"].combine_chunks().value_lengths() for table in tables])
            packs(lengths, order(len(lengths), 0, 0), SEQUENCE_LENGTH, packing=True)
            seconds = time.process_time() - started
            tokens = sum(shard.tokens for shard in shards)
            ours.append(tokens / seconds)
            if self._peers:
                made = self._peer("tokenise", given, settings)
                peer.append(tokens / made["cpu_s"])
                samples, supervised = len(lengths), sum(shard.supervised_tokens for shard in shards)
                if made["samples"] != samples or abs(made["supervised"] / supervised - 1) > 1e-3:
                    raise RunFailed(f"the peer made other samples: {made}, ours {samples} with {supervised} supervised")
        return Measure("tokenise", "tokens per CPU-second", ours, peer)

    def near_duplicates(self) -> list[Measure]:
        sets = [data_planted.duplicates(SEED, self._sizes.duplicates // 2, language) for language in ("en", "zh")]
        texts = [text for planted in sets for text in planted.texts]
        shift = len(sets[0].texts)
        truth = sets[0].pairs | {(first + shift, second + shift) for first, second in sets[1].pairs}
        settings = {"permutations": PERMUTATIONS, "threshold": THRESHOLD}
        settings |= {"words": near.WORDS, "characters": near.CHARACTERS}
        given = {"texts": self._written("texts.json", texts)}
        ours, peer = [], []
        found: set[tuple[int, int]] = set()
        theirs: set[tuple[int, int]] = set()
        near.signatures(texts[:10], PERMUTATIONS)  # tables that are made once
        for _ in range(self._rounds):
            started = time.process_time()
            signatures = near.signatures(texts, PERMUTATIONS)
            groups = near.groups(near.bands(signatures, THRESHOLD), signatures, THRESHOLD)
            ours.append(len(texts) / (time.process_time() - started))
            found = {(kept, duplicate) for kept, duplicate, _ in groups}
            if self._peers:
                made = self._peer("near", given, settings)
                peer.append(len(texts) / made["cpu_s"])
                theirs = {(first, second) for first, second in made["pairs"]}
        sides = [found, theirs] if self._peers else [found]
        recall, *peer_recall = [len(side & truth) / len(truth) for side in sides]
        precision, *peer_precision = [len(side & truth) / max(len(side), 1) for side in sides]
        return [
            Measure("near_duplicates", "rows per CPU-second", ours, peer, {"rows": len(texts)}),
            Measure("near_duplicate_recall", "share of planted", [recall], peer_recall, {"planted": len(truth)}),
            Measure("near_duplicate_precision", "share of found", [precision], peer_precision),
        ]

    def personal(self, alpaca: Path | None) -> tuple[list[Measure], dict[str, data_planted.Score]]:
        """The measures, and the score of each set."""
        size = self._sizes.personal
        sets = {
            "English": data_planted.personal(SEED, size, "en"),
            "Chinese": data_planted.personal(SEED, size, "zh"),
        }
        if alpaca:
            sets["Alpaca"] = data_planted.personal(SEED, size, "en", _texts(alpaca))
        nothing = {
            "English, none": data_planted.harmless(SEED, size, "en"),
            "Chinese, none": data_planted.harmless(SEED, size, "zh"),
        }
        sets |= {name: [data_planted.Planted(text, ()) for text in texts] for name, texts in nothing.items()}
        started, scores = time.process_time(), {}
        for name, rows in sets.items():
            hits = [[(hit.start, hit.end, hit.kind) for hit in find(row.text)] for row in rows]
            scores[name] = data_planted.judge(rows, hits)
        seconds = time.process_time() - started
        total = data_planted.Score()
        for score in scores.values():
            total.add(score)
        notes = {"rows_per_cpu_s": sum(map(len, sets.values())) / seconds}
        peer_recall, peer_precision = [], []
        if self._peers:
            english = [name for name in sets if not name.startswith("Chinese")]
            rows = [row for name in english for row in sets[name]]
            made = self._peer(
                "personal",
                {"texts": self._written("texts.json", [row.text for row in rows])},
                {"regions": REGIONS, "score": PRESIDIO_SCORE},
            )
            theirs = data_planted.judge(rows, made["hits"])
            kinds = [kind for kind in sorted(theirs.planted) if kind != "secret"]
            same = data_planted.Score()
            for name in english:
                same.add(scores[name].of(kinds))
            theirs = theirs.of(kinds)
            peer_recall, peer_precision = [theirs.recall], [theirs.precision]
            scores["Presidio, English sets"] = theirs
            notes |= {"peer_rows_per_cpu_s": len(rows) / made["cpu_s"], "ours_same_kinds": same.recall}
        measures = [
            Measure("pii_recall", "share of planted", [total.recall], peer_recall, notes),
            Measure("pii_precision", "share of found", [total.precision], peer_precision),
        ]
        return measures, scores

    def _written(self, name: str, content: object) -> Path:
        path = self._folder / name
        path.write_text(json.dumps(content))
        return path

    def _peer(self, name: str, given: dict[str, Path], settings: dict[str, Any]) -> Any:
        out = self._folder / "out.json"
        arguments = {**given, "settings": json.dumps(settings), "out": out}
        command = [str(ENVIRONMENT / "bin" / "python"), str(PEERS / f"data_{name}.py")]
        command += [f"--{key}={value}" for key, value in arguments.items()]
        finished = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if finished.returncode:
            raise RunFailed(f"peer data_{name} ended with {finished.returncode}:\n{finished.stderr[-4_000:]}")
        return json.loads(out.read_text())


def _texts(path: Path) -> list[str]:
    rows = json.loads(path.read_text())
    return [" ".join(filter(None, (row["instruction"], row.get("input"), row["output"]))) for row in rows]


def _show_scores(scores: dict[str, data_planted.Score]) -> None:
    kinds = sorted({kind for score in scores.values() for kind in score.planted})
    table = Table(title="Planted personal data: recall by kind", title_justify="left")
    table.add_column("set", no_wrap=True)
    for heading in (*kinds, "planted", "recall", "wrong", "precision"):
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        shares = [f"{score.right[kind] / score.planted[kind]:.3f}" if score.planted[kind] else "" for kind in kinds]
        planted = score.planted.total()
        recall, precision = (f"{score.recall:.3f}", f"{score.precision:.3f}") if planted else ("", "")
        table.add_row(name, *shares, str(planted), recall, str(score.wrong.total()), precision)
    logs.console().print(table)


def peers_are_installed() -> bool:
    """Whether .venv-data was made, to its end, from today's requirements."""
    made_from = ENVIRONMENT / REQUIREMENTS.name
    return made_from.exists() and made_from.read_bytes() == REQUIREMENTS.read_bytes()


def install_peers() -> None:
    """Make .venv-data. Raises RunFailed."""
    print(f"making {ENVIRONMENT.name} for the peers; this happens once", file=sys.stderr, flush=True)
    python = ENVIRONMENT / "bin" / "python"
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", "--clear", ENVIRONMENT],
        [python, "-m", "pip", "install", "--quiet", "--requirement", REQUIREMENTS],
    ]
    for command in commands:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RunFailed(f"cannot make {ENVIRONMENT}: {finished.stderr[-2_000:]}")
    shutil.copy(REQUIREMENTS, ENVIRONMENT)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench data", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default: 3)")
    parser.add_argument("--alpaca", type=Path, help=f"Alpaca rows to plant in (default: {ALPACA.name}, where it is)")
    parser.add_argument("--quick", action="store_true", help="one round on small sets: does it work at all?")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("at least 1 round")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    alpaca = given.alpaca or (ALPACA if ALPACA.exists() else None)
    try:
        if not given.quick and not peers_are_installed():
            install_peers()
        with tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            sizes, rounds = (QUICK, 1) if given.quick else (FULL, given.rounds)
            bench = Bench(Path(name), sizes, rounds, peers_are_installed())
            found, scores = bench.personal(alpaca)
            measures = [bench.tokenise(), *bench.near_duplicates(), *found]
    except LuthierError as error:
        return logs.fail(error)
    if not given.json:
        _show_scores(scores)
    show("Data checks", measures, given.json, seed=f"seed {SEED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
