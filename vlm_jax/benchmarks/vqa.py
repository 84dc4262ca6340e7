"""VQA accuracy and its normaliser: what VQAv2, VizWiz and TextVQA share.

The accuracy of an answer is the mean of min(1, matches / 3) over the ten subsets of nine human answers. For an answer that n of
the ten humans gave it is 0, .3, .6, .9 for n = 0, 1, 2, 3, and 1 for n >= 4.
"""

from __future__ import annotations

import json
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

    The official table also has the reverse for somebody'd -> somebodyd, and entries for I'd've, I'm and I've, which no
    lower-case word matches.
    """
    table = {"somebody'd": "somebodyd"}
    for word in words.split():
        for at, letter in enumerate(word):
            if letter == "'":
                table[word[:at] + word[at + 1 :]] = word
    return table


CONTRACTIONS = _misspelt(_CONTRACTIONS)


def strip_punctuation(text: str) -> str:
    """Removes a mark if the text has it beside a blank or contains a number like 1,000; else replaces it by a blank.

    Then removes the first 32 periods that no digit follows: the official code passes re.UNICODE (32) as the count.
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


def upload(field: str, rows: Sequence[dict[str, Any]], key: str, texts: Sequence[str]) -> str:
    """The servers' JSON list [{field: row[key], "answer"}], with the answers through `normalise`, as LLaVA uploads them."""
    pairs = zip(rows, texts, strict=True)
    return json.dumps([{field: row[key], "answer": normalise(text)} for row, text in pairs])


def agreement(answer: str, golds: Sequence[str]) -> float:
    """The accuracy 0, .3, .6, .9 or 1 of an answer, by how often it occurs in the ten `golds`."""
    return _POINTS[min(golds.count(answer), len(_POINTS) - 1)]


def accuracy(text: str, row: dict[str, Any]) -> float:
    """The accuracy that the VQAv2 server gives to the answer as we upload it, after `normalise`.

    row["answer"] holds the ten golds. Source: the newer official evaluator. If the ten golds are equal, the strings are compared
    as they are; else punctuation and articles are removed from golds and answer first. (The older evaluator always changes the
    answer, and removes only punctuation from the golds.)
    """
    golds, answer = [trim(gold) for gold in row["answer"]], normalise(text)
    if len(set(golds)) > 1:
        golds = [plain_words(strip_punctuation(gold)) for gold in golds]
        answer = plain_words(strip_punctuation(answer))
    return agreement(answer, golds)


def normalised_accuracy(text: str, row: dict[str, Any]) -> float:
    """TextVQA's: golds and answer through `normalise`. Source: m4c's TextVQAAccuracyEvaluator."""
    return agreement(normalise(text), [normalise(gold) for gold in row["answer"]])
