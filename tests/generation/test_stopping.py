"""Growing answers against the text of all their tokens, decoded at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra.errors import ConfigError
from cobra.generation.stopping import CONTEXT, AnswerText, stop_strings
from cobra.text.tokenizer import Tokenizer

SKIPPED = 256  # and above: tokens without text


def decode(ids: Sequence[int]) -> str:
    """A vocabulary of all bytes."""
    return bytes(token for token in ids if token < SKIPPED).decode("utf-8", errors="replace")


def grow(ids: Sequence[int], stops: Sequence[str] = (), decode: Any = decode) -> tuple[list[str], int]:
    """Pieces of an answer, and how many tokens it took."""
    answer, pieces, used = AnswerText(decode, stops), [], 0
    for token in ids:
        answer.add(token)
        used += 1
        pieces.append(answer.take())
        if answer.is_over:
            break
    return [*pieces, answer.finish()], used


def expected(ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int]:
    """The definition, with a full decode for every token."""
    for used in range(1, len(ids) + 1):
        text = decode(ids[:used]).removesuffix("\N{REPLACEMENT CHARACTER}")
        if used == len(ids):
            text = decode(ids)
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)].strip(), used
    return decode(ids).strip(), len(ids)


# Few different bytes, so that stop strings appear; characters of one to four bytes, whole, cut and invalid.
BYTES = st.sampled_from([*"ab \n€é".encode(), 0xE2, 0x82, 0xF0, 0x9F, 0x98, 0x80, 0xFF, SKIPPED])
STOPS = st.lists(st.text("ab €é\ufffd", min_size=1, max_size=4), max_size=3)


@settings(max_examples=1500, deadline=None)
@given(st.lists(BYTES, max_size=120), STOPS)
def test_any_answer_equals_its_definition(ids: list[int], stops: list[str]) -> None:
    pieces, used = grow(ids, stops)
    assert ("".join(pieces), used) == expected(ids, stops)


@settings(max_examples=300, deadline=None)
@given(st.lists(BYTES, max_size=120), STOPS)
def test_pieces_do_not_depend_on_when_they_are_taken(ids: list[int], stops: list[str]) -> None:
    answer = AnswerText(decode, stops)
    for token in ids:
        answer.add(token)
        if answer.is_over:
            break
    assert answer.finish() == "".join(grow(ids, stops)[0])


@pytest.mark.parametrize(
    ("text", "stops", "answer", "unread"),
    [
        ("one two three", ["two"], "one", 6),  # over several tokens
        ("one two three", ["o t", "wo"], "one tw", None),  # neither appears... until it does
        ("aab", ["ab"], "a", 0),  # its beginning begins twice
        ("ababac", ["abac"], "ab", 0),
        ("xabcy", ["abcd", "bc"], "xa", 1),  # one dies, the other has begun inside it
        ("xabcdy", ["abcd", "bcx"], "x", 1),
        ("stop", ["stop", "s"], "", 3),  # at the very start
        ("\nanswer", ["\n"], "", 6),
        ("a€b", ["€"], "a", 1),
        ("aéb", ["é", "b"], "a", 1),
        ("1€2€3", ["€3"], "1€2", 0),
        ("naïve ab", ["abc"], "naïve ab", 0),  # held back until the end
    ],
)
def test_stop_strings_end_answers(text: str, stops: list[str], answer: str, unread: int | None) -> None:
    ids = list(text.encode())
    pieces, used = grow(ids, stops)
    if unread is None:
        assert ("".join(pieces), used) == expected(ids, stops)
    else:
        assert ("".join(pieces), len(decode(ids[used:]))) == (answer, unread)


def test_earliest_of_several_in_one_token_counts() -> None:
    def words(ids: Sequence[int]) -> str:
        return "".join(["red ", "one two three four", " blue"][token] for token in ids)

    assert grow([0, 1, 2], ["three", "two"], words) == (["red", " one", ""], 2)


def test_text_waits_only_while_it_may_be_a_stop_string() -> None:
    pieces, _ = grow(list(b"ab<e<en> c"), ["<end>"])
    assert pieces == ["a", "b", "", "", "<e", "", "", "<en>", "", " c", ""]


def test_characters_are_never_cut() -> None:
    pieces, _ = grow("aé€😀b".encode())
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀", "b"]


def test_white_space_around_is_dropped() -> None:
    assert [piece for piece in grow(list(b" \n a  b \n "))[0] if piece] == ["a", "  b"]
    assert grow(list(b"  "))[0] == ["", "", ""]


def test_long_answers_are_decoded_in_a_window() -> None:
    sizes = []

    def counting(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    for text in ("a question of time, " * 40, "€" * 300, "😀" * 200):
        ids = list(text.encode())
        assert "".join(grow(ids, ["?"], counting)[0]) == text.strip()
    ids = [0xFF] * 500  # never valid
    assert "".join(grow(ids, (), counting)[0]) == decode(ids)
    assert max(sizes) <= 2 * CONTEXT + 1


def test_tokens_without_text_do_no_harm() -> None:
    """An unfinished character must wait, however many tokens that say nothing follow it."""
    euro = list("€".encode())
    ids = [*b"a" * 40, *euro[:2], *[SKIPPED] * 100, euro[2], *b"b" * 40]
    assert "".join(grow(ids)[0]) == "a" * 40 + "€" + "b" * 40


def test_the_real_tokenizer_gives_the_same(tokenizer: Tokenizer) -> None:
    text = "The circle is blue: naïve 😀 triangle, no?\n" * 6
    pieces, _ = grow(tokenizer.encode(text), (), tokenizer.decode)
    assert "".join(pieces) == text.strip()
    pieces, _ = grow(tokenizer.encode(text), ["e 😀 t"], tokenizer.decode)
    assert "".join(pieces) == "The circle is blue: naïv"


def test_stop_is_a_string_or_several() -> None:
    assert stop_strings("ab") == ("ab",)
    assert stop_strings(["a", "b"]) == stop_strings(("a", "b")) == ("a", "b")
    assert stop_strings([]) == ()


@pytest.mark.parametrize("stop", ["", ["a", ""], [3], None, 3])
def test_bad_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match=r"stop=.*not empty"):
        stop_strings(stop)
