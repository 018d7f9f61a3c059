"""Near duplicates: signatures that estimate, bands that catch, groups that keep the first row."""

import os
import random
import re
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.near import CAUGHT, CHARACTERS, THRESHOLD, WORDS, band_size, bands, groups, signatures, similarity
from scripts.benchmarks.data_planted import duplicates
from scripts.benchmarks.data_values import Language


def found(texts: list[str], threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    marks = signatures(texts)
    return groups(bands(marks, threshold), marks, threshold)


def jaccard(first: str, second: str, size: int, token: str) -> float:
    """The exact similarity, by sets."""
    sets = []
    for text in (first, second):
        tokens = re.findall(token, text.lower())
        sets.append({tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_copies_are_found_and_cousins_are_not(language: Language) -> None:
    planted = duplicates(3, 2_000, language)
    pairs = {(kept, duplicate) for kept, duplicate, _ in found(planted.texts)}
    assert len(pairs & planted.pairs) >= 0.95 * len(planted.pairs) > 300
    assert len(pairs & planted.pairs) >= 0.9 * len(pairs)


@pytest.mark.parametrize(("language", "size", "token"), [("en", WORDS, r"[^\W_]+"), ("zh", CHARACTERS, r"\w")])
def test_signatures_estimate_jaccards_similarity(language: Language, size: int, token: str) -> None:
    planted = duplicates(4, 1_000, language)
    pairs = sorted(planted.pairs)
    marks = signatures(planted.texts)
    estimates = similarity(marks, *np.array(pairs, dtype=np.int64).T)
    exact = np.array([jaccard(planted.texts[a], planted.texts[b], size, token) for a, b in pairs])
    open_ = (exact > 0) & (exact < 1)
    deviations = (estimates - exact)[open_] / np.sqrt(exact * (1 - exact) / marks.shape[1])[open_]
    assert abs(deviations.mean()) < 0.3  # of a standard deviation: no bias
    assert 0.8 < deviations.std() < 1.2  # the permutations are as good as independent
    assert np.all(estimates[exact == 1] == 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12), st.randoms())
def test_a_signature_depends_on_its_text_alone(texts: list[str], chance: random.Random) -> None:
    marks = signatures(texts)
    assert marks.shape == (len(texts), 128)
    order = list(range(len(texts)))
    chance.shuffle(order)
    assert np.array_equal(signatures([texts[place] for place in order]), marks[order])
    for first, second in combinations(range(len(texts)), 2):
        if texts[first].strip().lower() == texts[second].strip().lower():
            assert np.array_equal(marks[first], marks[second])


def test_long_texts_and_many_blocks_give_what_each_gives_alone() -> None:
    chance = random.Random(5)
    texts = [" ".join(chance.choices(["ab", "cd", "efg", "h"], k=k)) for k in (1, 90_000, 3, 0, 200_000, 50)]
    alone = np.concatenate([signatures([text]) for text in texts])
    assert np.array_equal(signatures(texts), alone)


def test_short_texts_are_duplicates_only_when_they_are_the_same() -> None:
    texts = ["2 + 2", "2 - 2", "", "Yes", " yes ", "", "你好。", "你好！", "no way", "no, way"]
    assert [(kept, duplicate) for kept, duplicate, _ in found(texts)] == [(3, 4), (2, 5)]


def test_a_chain_keeps_its_first_row() -> None:
    chance = random.Random(6)
    words = ["".join(chance.choices("abcdefgh", k=6)) for _ in range(120)]
    chain = [" ".join(words[:at] + [f"new{k}" for k in range(at)] + words[at:][at:]) for at in range(0, 24, 4)]
    texts = [chain[3], "something else altogether, not like it", chain[0], chain[5], chain[1], chain[4], chain[2]]
    pairs = [(kept, duplicate) for kept, duplicate, _ in found(texts)]
    assert similarity(signatures(texts), np.array([2]), np.array([3]))[0] < THRESHOLD  # its ends are not alike
    assert pairs == [(0, 2), (0, 3), (0, 4), (0, 5), (0, 6)]


def test_one_boilerplate_band_does_not_join_what_differs() -> None:
    """A run of one band with many rows that are no copies, and copies far apart in it."""
    marks = np.random.default_rng(0).integers(0, 2**32, (300, 128), dtype=np.uint32)
    marks[:, :8] = 7
    marks[250] = marks[40]
    marks[290, :120] = marks[40, :120]
    assert [pair[:2] for pair in groups(bands(marks), marks)] == [(40, 250), (40, 290)]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_catch_pairs_at_the_threshold(threshold: float) -> None:
    size = band_size(128, threshold)
    assert 1 - (1 - threshold**size) ** (128 // size) >= CAUGHT
    chance = np.random.default_rng(1)
    left = chance.integers(0, 2**32, (2_000, 128), dtype=np.uint32)
    right = np.where(chance.random(left.shape) < threshold, left, left ^ np.uint32(1))
    caught = (bands(left, threshold) == bands(right, threshold)).any(axis=1).mean()
    assert caught > CAUGHT - 0.02


_MEASURED = """
import resource
import numpy as np
from jobs.data.near import bands, groups
rows = 1_000_000
chance = np.random.default_rng(0)
marks = np.empty((rows, 128), dtype=np.uint32)
for start in range(0, rows, 50_000):
    marks[start : start + 50_000] = chance.integers(0, 2**32, (50_000, 128), dtype=np.uint32)
marks[rows // 2 :][:100_000] = marks[:100_000]
pairs = groups(bands(marks), marks)
assert len(pairs) == 100_000 and pairs[0] == (0, rows // 2, 1.0), (len(pairs), pairs[:1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.long
def test_a_million_rows_take_less_than_a_gigabyte() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _MEASURED], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) < 1_000
