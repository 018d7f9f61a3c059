"""The peer: near duplicates by datasketch. Run by .venv-data; imports nothing of Luthier.

    .venv-data/bin/python scripts/benchmarks/peers/data_near.py --texts FILE --settings JSON --out FILE

As its documentation has it: a MinHash a text, an LSH index, each text looked up before it is put in, candidates
verified by the estimated similarity. Shingles are what ours are: words in lower case, or characters of Chinese.
`update_batch` and a set of shingles are its fast way.
"""

import argparse
import json
import re
import time
from pathlib import Path

from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")
HAN = re.compile(r"[\u3400-\u9fff]")


def shingles(text: str, words: int, characters: int) -> set[bytes]:
    plain = text.strip().lower()
    tokens = WORD.findall(plain)
    size = characters if 2 * len(HAN.findall(plain)) > len(tokens) else words
    if len(tokens) < size:
        return {plain.encode()}
    return {" ".join(tokens[start : start + size]).encode() for start in range(len(tokens) - size + 1)}


def pairs(texts: list[str], permutations: int, threshold: float, words: int, characters: int) -> list[tuple[int, int]]:
    index = MinHashLSH(threshold=threshold, num_perm=permutations)
    sketches: list[MinHash] = []
    found: list[tuple[int, int]] = []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=permutations)
        sketch.update_batch(shingles(text, words, characters))
        alike = [other for other in index.query(sketch) if sketch.jaccard(sketches[other]) >= threshold]
        if alike:
            found.append((min(alike), number))
        index.insert(number, sketch)
        sketches.append(sketch)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("texts", "settings", "out"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    texts, settings = json.loads(Path(given.texts).read_text()), json.loads(given.settings)
    pairs(texts[:100], **settings)
    started = time.process_time()
    found = pairs(texts, **settings)
    Path(given.out).write_text(json.dumps({"cpu_s": time.process_time() - started, "pairs": found}))


if __name__ == "__main__":
    main()
