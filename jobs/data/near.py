"""Near duplicates: MinHash signatures, locality-sensitive bands, and groups of rows that say nearly the same.

    signatures   for each text the smallest hash of its shingles under each of P permutations
                 (Broder, On the resemblance and containment of documents, 1997)
    bands        signatures cut into bands of rows; equal bands make a candidate: a pair of Jaccard similarity s is one
                 with probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4)
    groups       candidates whose estimated similarity reaches the threshold, joined; the first row of each group stays

A shingle is three words running, or four characters in scripts that put no space between words; letters in lower case,
punctuation left out. A text with fewer than that is one shingle, its characters: short texts are duplicates only when
they are the same.

All of it works on arrays of many texts at once. Hashes are polynomials in 64 bits over characters, taken as differences
of running sums (Karp and Rabin 1987) and mixed (splitmix64); permutations are a x + b modulo 2^32 with odd a.
Everything is a function of the texts alone: no seed, no salted hash.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]
UInt32 = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.int64]

PERMUTATIONS = 128
THRESHOLD = 0.8
WORDS = 3
CHARACTERS = 4
CAUGHT = 0.98
"""The share of pairs exactly at the threshold that become candidates."""

_BLOCK_CHARACTERS = 1 << 17
"""Texts are worked on together until they have this many characters: arrays then stay in a core's cache."""

_PAIRS = 1 << 15
_ROUNDS = 64
_BASE = np.uint64(0x9E3779B97F4A7C15)

# Scripts without spaces: Thai to Myanmar and Khmer, kana, Han with its extensions.
_UNSPACED = (
    (0xE00, 0xEFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_NOTHING, _WORD, _SINGLE = 0, 1, 2


def signatures(texts: Sequence[str], permutations: int = PERMUTATIONS) -> UInt32:
    """The MinHash signature of each text: uint32 [texts, permutations]. Equal texts have equal ones."""
    result = np.empty((len(texts), permutations), dtype=np.uint32)
    multipliers, offsets = _permutations(permutations)
    for first, block in _blocks(texts):
        hashes, starts = _shingles(block)
        scratch = np.empty_like(hashes)
        rows = np.empty((permutations, len(block)), dtype=np.uint32)
        for number in range(permutations):
            np.multiply(hashes, multipliers[number], out=scratch)
            np.add(scratch, offsets[number], out=scratch)
            np.minimum.reduceat(scratch, starts, out=rows[number])
        result[first : first + len(block)] = rows.T
    return result


def bands(signatures: UInt32, threshold: float = THRESHOLD) -> UInt64:
    """A hash of each band of each signature: uint64 [rows, bands]. Two rows that share one are a candidate pair.

    Bands are as long as they may be while CAUGHT of the pairs at `threshold` still share one.
    """
    count, permutations = signatures.shape
    size = band_size(permutations, threshold)
    result = np.empty((count, permutations // size), dtype=np.uint64)
    factors = _mixed(np.arange(1, size + 1, dtype=np.uint64)) | np.uint64(1)
    for start in range(0, count, _PAIRS):
        part = signatures[start : start + _PAIRS].astype(np.uint64)
        for band in range(result.shape[1]):
            columns = part[:, band * size : (band + 1) * size] + np.uint64(1)
            result[start : start + _PAIRS, band] = _mixed((columns * factors).sum(axis=1, dtype=np.uint64))
    return result


def band_size(permutations: int, threshold: float) -> int:
    """Rows of a band."""
    for size in range(permutations, 1, -1):
        if 1 - (1 - threshold**size) ** (permutations // size) >= CAUGHT:
            return size
    return 1


def groups(bands: UInt64, signatures: UInt32, threshold: float = THRESHOLD) -> list[tuple[int, int, float]]:
    """(kept, duplicate, similarity) for each row that is to go, in order of the rows.

    Pairs join into groups, by chains too: of each group the first row stays, and is named as `kept` for all others.
    Similarity is that of these two, the share of equal places of their signatures (standard deviation at most
    0.5 / sqrt(permutations)); in a chain it may lie below the threshold.

    Memory beside the arguments: about 40 bytes a row. One band at a time is sorted.
    """
    parent: Ids = np.arange(len(signatures), dtype=np.int64)
    for band in range(bands.shape[1]):
        order = np.argsort(bands[:, band], kind="stable")
        keys = bands[order, band]
        same = keys[1:] == keys[:-1]
        if not same.any():
            continue
        within = np.zeros(len(order), dtype=np.bool_)
        within[1:] |= same
        within[:-1] |= same
        members = order[within]
        runs = np.cumsum(np.concatenate([[True], ~same])[within]) - 1
        parent = _join(parent, _alike(members, runs, parent, signatures, threshold))
    duplicates = np.flatnonzero(parent != np.arange(len(parent)))
    kept = parent[duplicates]
    found = similarity(signatures, kept, duplicates)
    return list(zip(kept.tolist(), duplicates.tolist(), found.tolist(), strict=True))


def similarity(signatures: UInt32, left: Ids, right: Ids) -> npt.NDArray[np.float64]:
    """The estimated Jaccard similarity of pairs of rows."""
    result = np.empty(len(left), dtype=np.float64)
    for start in range(0, len(left), _PAIRS):
        part = slice(start, start + _PAIRS)
        result[part] = (signatures[left[part]] == signatures[right[part]]).mean(axis=1)
    return result


def _alike(members: Ids, runs: Ids, parent: Ids, signatures: UInt32, threshold: float) -> tuple[Ids, Ids]:
    """Pairs of rows of one run that are alike: each with its run's first row; those that differ from it, with the first
    of the rest, and so on; and each with the row before it. All pairs of a long run would be too many."""
    following = np.flatnonzero(runs[1:] == runs[:-1])
    lefts, rights = [members[following]], [members[following + 1]]
    found: list[tuple[Ids, Ids]] = [_checked(lefts[0], rights[0], parent, signatures, threshold)[:2]]
    for _ in range(_ROUNDS):
        firsts = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]]))
        lengths = np.diff(np.append(firsts, len(runs)))
        leaders = np.repeat(members[firsts], lengths)
        others = np.ones(len(members), dtype=np.bool_)
        others[firsts] = False
        left, right, agreed = _checked(leaders[others], members[others], parent, signatures, threshold)
        found.append((left, right))
        members, runs = members[others][~agreed], runs[others][~agreed]
        if len(members) < 2:
            break
    return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])


def _checked(
    left: Ids, right: Ids, parent: Ids, signatures: UInt32, threshold: float
) -> tuple[Ids, Ids, npt.NDArray[np.bool_]]:
    """The pairs that are alike and not joined yet; and for all pairs, whether they are alike or joined."""
    agreed = parent[left] == parent[right]
    open_ = np.flatnonzero(~agreed)
    alike = open_[similarity(signatures, left[open_], right[open_]) >= threshold]
    agreed[alike] = True
    return left[alike], right[alike], agreed


def _join(parent: Ids, pairs: tuple[Ids, Ids]) -> Ids:
    """Each row's group, named by its smallest row, with these pairs joined. `parent` names groups so already."""
    left, right = pairs
    while True:
        first, second = parent[left], parent[right]
        apart = first != second
        if not apart.any():
            return parent
        left, right, first, second = left[apart], right[apart], first[apart], second[apart]
        np.minimum.at(parent, np.maximum(first, second), np.minimum(first, second))
        while True:
            shorter = parent[parent]
            if np.array_equal(shorter, parent):
                break
            parent = shorter


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(index of the first, texts in lower case and without outer white space) of each block."""
    first, size = 0, 0
    block: list[str] = []
    for index, text in enumerate(texts):
        plain = text.strip().lower()
        if block and size + len(plain) >= _BLOCK_CHARACTERS:
            yield first, block
            first, block, size = index, [], 0
        block.append(plain)
        size += len(plain) + 1
    if block:
        yield first, block


def _shingles(texts: list[str]) -> tuple[UInt32, Ids]:
    """Hashes of the shingles of all texts, one text behind the other, and where each text's begin: it has at least
    one."""
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    text_ends = np.cumsum(lengths + 1) - 1
    powers, inverses = _powers(len(codes))
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(_mixed(codes.astype(np.uint64)) * powers[: len(codes)], out=sums[1:])

    kinds = _kinds()[codes]
    words = kinds == _WORD
    singles = kinds == _SINGLE
    starts = singles | words
    starts[1:] &= ~(words[1:] & words[:-1])
    ends = singles | words
    ends[:-1] &= ~(words[1:] & words[:-1])
    token_starts, token_ends = np.flatnonzero(starts), np.flatnonzero(ends) + 1
    tokens = _mixed((sums[token_ends] - sums[token_starts]) * inverses[token_starts])

    last = np.searchsorted(token_starts, text_ends)
    counts = np.diff(last, prepend=0)
    single = np.concatenate([[0], np.cumsum(singles[token_starts])])
    unspaced = 2 * (single[last] - single[last - counts]) > counts
    sizes = np.where(unspaced, CHARACTERS, WORDS)
    short = counts < sizes

    of_words, of_characters = _windows(tokens, WORDS), _windows(tokens, CHARACTERS)
    owner = np.repeat(np.arange(len(texts)), counts)
    whole = np.arange(len(tokens)) + sizes[owner] <= last[owner]
    hashes = np.where(unspaced[owner], of_characters, of_words)[whole]
    amounts = np.where(short, 1, counts - sizes + 1)
    begins = np.cumsum(amounts) - amounts
    result = np.empty(int(amounts.sum()), dtype=np.uint64)
    long_places = np.repeat(~short, amounts)
    result[long_places] = hashes
    from_ = (text_ends - lengths)[short]
    result[begins[short]] = (sums[text_ends[short]] - sums[from_]) * inverses[from_]
    return (_mixed(result) >> np.uint64(32)).astype(np.uint32), begins


def _windows(tokens: UInt64, size: int) -> UInt64:
    """A hash of each token with the size - 1 that follow; the last size - 1 are of no use."""
    factors = _mixed(np.arange(size, dtype=np.uint64) + np.uint64(16 * size)) | np.uint64(1)
    result: UInt64 = tokens * factors[0]
    for number in range(1, size):
        result[: max(0, len(tokens) - number)] += tokens[number:] * factors[number]
    return result


def _mixed(values: UInt64) -> UInt64:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection that spreads every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64 = values ^ (values >> np.uint64(31))
    return mixed


@cache
def _permutations(count: int) -> tuple[UInt32, UInt32]:
    draws = _mixed(np.arange(2 * count, dtype=np.uint64) + np.uint64(1 << 40))
    high = (draws >> np.uint64(32)).astype(np.uint32)
    return high[:count] | np.uint32(1), high[count:]


_power_tables: dict[int, tuple[UInt64, UInt64]] = {}


def _powers(count: int) -> tuple[UInt64, UInt64]:
    """Powers 0, 1, 2, … of _BASE and of its inverse, modulo 2^64."""
    size = max(_BLOCK_CHARACTERS * 2, 1 << (count - 1).bit_length())
    if size not in _power_tables:
        _power_tables.clear()
        inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
        both = [np.full(size, base, dtype=np.uint64) for base in (_BASE, inverse)]
        for powers in both:
            powers[0] = 1
        _power_tables[size] = (np.cumprod(both[0], dtype=np.uint64), np.cumprod(both[1], dtype=np.uint64))
    return _power_tables[size]


@cache
def _kinds() -> npt.NDArray[np.uint8]:
    """For each code point: part of a word, a word by itself, or neither."""
    letters = np.arange(0x110000, dtype=np.uint32).view("U1")
    kinds: npt.NDArray[np.uint8] = np.strings.isalnum(letters).astype(np.uint8)
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= _SINGLE
    return kinds
