"""VQA accuracy and its normaliser: what VQAv2, VizWiz and TextVQA share.

An answer that n of the ten humans gave scores, on average over the ten ways to leave one human out and with
min(1, matches / 3) for each: 0, .3, .6, .9 for n = 0 .. 3 and 1 from n = 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlm_jax.benchmarks.records import RawRecord

HUMANS = 10
_POINTS = (0.0, 0.3, 0.6, 0.9, 1.0)
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""


def _misspelt(words: str) -> dict[str, str]:
    """Each contraction with one apostrophe left out -> the contraction.

    The official table also has the reverse, somebody'd -> somebodyd, and I'd've, I'm and I've, which no lower-case word
    meets.
    """
    table = {"somebody'd": "somebodyd"}
    for word in words.split():
        for at, letter in enumerate(word):
            if letter == "'":
                table[word[:at] + word[at + 1 :]] = word
    return table


CONTRACTIONS = _misspelt(_CONTRACTIONS)


def strip_punctuation(text: str) -> str:
    """A mark beside a blank (or anywhere, where the text has a number like 1,000) goes; else it becomes a blank.

    Then periods go that no digit follows, 32 at most: the official code passes re.UNICODE as the count.
    """
    numbered = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or numbered else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def plain_words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, contractions with their apostrophes, single blanks."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """TextVQA's normaliser (m4c's EvalAIAnswerProcessor); LLaVA also applies it to what it uploads."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(strip_punctuation(trim(text)))


def human_answers(record: RawRecord) -> list[str]:
    """The ten gold answers, written as strings or as {"answer": string}."""
    answers = record.field("answers")
    answers = answers if isinstance(answers, list) else [answers]
    texts = [a["answer"] if isinstance(a, dict) and "answer" in a else a for a in answers]
    if len(texts) != HUMANS or not all(isinstance(text, str) for text in texts):
        raise record.fault(f"'answers' must be {HUMANS} texts, got {len(texts)}: {texts!r:.60}")
    return texts


def agreement(answer: str, golds: Sequence[str]) -> float:
    """0, .3, .6, .9 or 1: the accuracy of an answer that stands so often among the ten `golds`."""
    return _POINTS[min(golds.count(answer), len(_POINTS) - 1)]


def accuracy(text: str, row: dict[str, Any]) -> float:
    """What the VQAv2 server gives to the normalised answer: row["answer"] holds the ten golds.

    Source: the newer official evaluator: golds and answer lose punctuation and articles unless the ten golds are equal;
    then the strings are compared as they are. (In the older one the answer is always changed, and golds only lose
    punctuation.) The answer goes in as it is uploaded, through `normalise`.
    """
    golds, answer = [trim(gold) for gold in row["answer"]], normalise(text)
    if len(set(golds)) > 1:
        golds = [plain_words(strip_punctuation(gold)) for gold in golds]
        answer = plain_words(strip_punctuation(answer))
    return agreement(answer, golds)


def normalised_accuracy(text: str, row: dict[str, Any]) -> float:
    """TextVQA's: golds and answer through `normalise`. Source: m4c's TextVQAAccuracyEvaluator."""
    return agreement(normalise(text), [normalise(gold) for gold in row["answer"]])
