"""How the VQA scripts rewrite words: contractions, number words, articles, punctuation.

Four official scripts share this rewriting, quirks included: VQA-v2 (GT-Vision-Lab/VQA, vqaEval.py), the paper's
harness (TRI-ML/vlm-evaluation, taken from LAVIS), VizWiz (its VQA evaluation script) and TextVQA (the M4C answer
processor of facebookresearch/mmf). The scores are defined by what these scripts do, not by what they meant to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The scripts list misspelt forms; each of them is one of these words with exactly one apostrophe left out. (Their
# forms with a capital, such as "Im", never match: the text is lower-cased first.)
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
_VIZWIZ_APOSTROPHES = "ain't aren't can't could've couldn't we've where's who've"


def _misspelt(word: str) -> Iterator[str]:
    return (word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'")


CONTRACTIONS: Mapping[str, str] = {
    wrong: word for word in (_ONE_APOSTROPHE + _MORE_APOSTROPHES).split() for wrong in _misspelt(word)
} | {"somebody'd": "somebodyd"}  # the wrong way round in all scripts

# VizWiz writes back-ticks, but for eight words. Its misspelt forms that contain a back-tick never match, because
# back-ticks are deleted as punctuation: of those with two apostrophes, two are left.
VIZWIZ_CONTRACTIONS: Mapping[str, str] = (
    {word.replace("'", ""): word.replace("'", "`") for word in _ONE_APOSTROPHE.split()}
    | {word.replace("'", ""): word for word in _VIZWIZ_APOSTROPHES.split()}
    | {"couldn'tve": "couldn`t`ve", "hadn'tve": "hadn`t`ve"}
)

# Meant to spare decimal points, but the look-behind is misspelt as a look-ahead that always holds: a period goes
# unless a digit follows it.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the scripts pass the flag re.UNICODE (32) where `count` is expected
_DIGITS_COMMA = re.compile(r"\d,\d")


def strip_punctuation(text: str) -> str:
    """Delete punctuation that touches a space, turn the rest of it into spaces, and delete most periods.

    Where two digits have a comma between them, anywhere, all punctuation is deleted. The tests look at the text as it
    came in, so that the order of the signs does not matter.
    """
    stripped = text
    always = _DIGITS_COMMA.search(text) is not None
    for sign in PUNCTUATION:
        if sign in text:
            delete = always or f"{sign} " in text or f" {sign}" in text
            stripped = stripped.replace(sign, "" if delete else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)


def rewrite_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower-case, turn number words into digits, drop articles, put apostrophes in; one space between words."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def flatten(text: str) -> str:
    """Turn line breaks and tabs into spaces and strip the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()
