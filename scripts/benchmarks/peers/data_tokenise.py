"""The peer: chat rows to packed tokens by Hugging Face's datasets. Run by .venv-data; imports nothing of Luthier.

    .venv-data/bin/python scripts/benchmarks/peers/data_tokenise.py --rows FILE --tokenizer FOLDER --settings JSON
                                                                    --out FILE

As trainers do it: `datasets.map` in batches, the chat template with {% generation %} marks, so that apply_chat_template
itself says which tokens are the assistant's; longer rows left out by `filter`; then a `map` that packs, by joining rows
and cutting them, which is less work than fitting whole rows. Reading the file does not count, for anybody.
"""

import argparse
import json
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-not-found]
from transformers import AutoTokenizer

Columns = dict[str, list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("rows", "tokenizer", "settings", "out"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    settings = json.loads(given.settings)
    length = settings["sequence_length"]
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    tokenizer.chat_template = settings["template"]
    datasets.disable_progress_bars()
    datasets.disable_caching()

    def tokenise(batch: Columns) -> Columns:
        encoded = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True, padding=False
        )
        return {"input_ids": encoded["input_ids"], "supervised": encoded["assistant_masks"]}

    def pack(batch: Columns) -> Columns:
        joined = {name: list(chain.from_iterable(column)) for name, column in batch.items()}
        total = len(joined["input_ids"])
        return {
            name: [values[start : start + length] for start in range(0, total, length)]
            for name, values in joined.items()
        }

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=given.rows, split="train", cache_dir=cache)
        started = time.process_time()
        samples = rows.map(tokenise, batched=True, remove_columns=rows.column_names)
        samples = samples.filter(
            lambda batch: [len(ids) <= length for ids in batch], input_columns="input_ids", batched=True
        )
        packed = samples.map(pack, batched=True)
        cpu_s = time.process_time() - started
        figures = {
            "cpu_s": cpu_s,
            "samples": len(samples),
            "tokens": sum(map(len, packed["input_ids"])),
            "supervised": sum(map(sum, packed["supervised"])),
        }
    Path(given.out).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
