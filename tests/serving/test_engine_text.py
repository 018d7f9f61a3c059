"""Streaming text: whatever the tokens, the pieces joined are the whole text, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serving.engine.text import Decoder, TextStream


def byte_decoder() -> Decoder:
    """Token n is the byte n; 256 and up are special. The hardest tokenizer: every character may be cut anywhere."""

    def decode(token_ids: Iterable[int]) -> str:
        return bytes(each for each in token_ids if each < 256).decode("utf-8", errors="replace")

    return decode


def metaspace_decoder() -> Decoder:
    """As Llama 2 and Gemma have it: ▁ for a space, the first one of a text dropped, bytes as a fallback."""
    words = ["▁a", "b", "▁", "▁the", "é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lambda token_ids: tokenizer.decode(list(token_ids))


def stream(decode: Decoder, token_ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    text = TextStream(decode, stop)
    pieces = []
    for token_id in token_ids:
        pieces.append(text.push(token_id))
        if text.is_stopped:
            return pieces, True
    pieces.append(text.flush())
    return pieces, text.is_stopped


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    found = [at for at in (text.find(each) for each in stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


texts = st.text(alphabet="ab é東😀\n", max_size=30)


@given(text=texts, stop=st.lists(st.text(alphabet="ab é東😀", min_size=1, max_size=4), max_size=3).map(tuple))
def test_pieces_join_to_the_text_before_the_first_stop(text: str, stop: tuple[str, ...]) -> None:
    pieces, is_stopped = stream(byte_decoder(), list(text.encode()), stop)
    # Bytes come one by one, so the stop string that is complete first is the one that ends first.
    ends = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    expected = text[: min(at for end, at in ends if end == min(ends)[0])] if ends else text
    assert ("".join(pieces), is_stopped) == (expected, bool(ends))


@given(
    text=texts,
    stop=st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple),
    early=st.integers(0, 30),
)
def test_no_stop_string_is_complete_within_the_tokens_that_may_not_stop(
    text: str, stop: tuple[str, ...], early: int
) -> None:
    ours, pieces = TextStream(byte_decoder(), stop), []
    for index, token_id in enumerate(text.encode()):
        pieces.append(ours.push(token_id, may_stop=index >= early))
        if ours.is_stopped:
            break
    pieces.append(ours.flush())
    heads = (text[:end] for end in range(len(text) + 1) if len(text[:end].encode()) > early)
    cuts = ([head.removesuffix(each) for each in stop if head.endswith(each)] for head in heads)
    expected = next((min(cut, key=len) for cut in cuts if cut), text)
    assert "".join(pieces) == expected


@given(token_ids=st.lists(st.integers(0, 300), max_size=40))
def test_any_bytes_at_all_join_to_what_the_decoder_says(token_ids: list[int]) -> None:
    pieces, _ = stream(byte_decoder(), token_ids, ())
    assert "".join(pieces) == byte_decoder()(token_ids)


@given(token_ids=st.lists(st.sampled_from([[0], [1], [2], [3], [4], [5, 6, 7, 8]]), max_size=20))
def test_leading_spaces_and_fallback_bytes(token_ids: list[list[int]]) -> None:
    flat = [each for group in token_ids for each in group]
    pieces, _ = stream(metaspace_decoder(), flat, ())
    assert "".join(pieces) == metaspace_decoder()(flat)


def test_half_a_character_is_never_shown() -> None:
    pieces, _ = stream(byte_decoder(), list("a😀b".encode()), ())
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_at_the_end_is_given_out_as_the_decoder_has_it() -> None:
    assert stream(byte_decoder(), list("a😀".encode())[:-1], ())[0][-1] == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abcab", ("abd",), ["", "", "abc", "", "", "ab"]),  # a beginning that comes to nothing
        ("aab", ("ab",), ["", "a", ""]),  # a beginning inside a beginning
        ("xENDy", ("END",), ["x", "", "", ""]),
    ],
)
def test_what_may_begin_a_stop_string_waits(text: str, stop: tuple[str, ...], pieces: list[str]) -> None:
    assert stream(byte_decoder(), list(text.encode()), stop)[0] == pieces


@given(texts, st.text(alphabet="ab", min_size=1, max_size=3))
def test_several_characters_in_a_token_change_nothing(text: str, stop: str) -> None:
    words = [text[at : at + 3] for at in range(0, len(text), 3)]
    pieces, is_stopped = stream(lambda ids: "".join(words[each] for each in ids), list(range(len(words))), (stop,))
    assert ("".join(pieces), is_stopped) == cut(text, (stop,))
