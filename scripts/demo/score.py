#!/usr/bin/env python3
"""How often the demonstration model's sentences are right: by kind of question, with 95 % Wilson intervals.

scripts/demo/score.py DATA EVAL ..

DATA: what scenes.py wrote. EVAL: workdirs of evaluations of its held_out.json or new_pairs.json. An answer is right when it is
the sentence, but for case and white space. "blind" is what the most frequent training answer to the same question gets, which
needs no picture.
"""

from __future__ import annotations

import collections
import json
import math
import sys
from pathlib import Path

FILES = ("held_out", "new_pairs")


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z2 = 1.96**2
    middle = (right + z2 / 2) / (count + z2)
    half = 1.96 * math.sqrt(right * (count - right) / count + z2 / 4) / (count + z2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def asked(path: Path) -> dict[str, tuple[str, str, str]]:
    """Id of each record -> (kind, question, answer)."""
    found = {}
    for record in json.loads(path.read_text()):
        question, answer = (message["value"] for message in record["conversations"])
        found[record["id"]] = (record["id"].rpartition("-")[0], question, answer)
    return found


def plain(text: str) -> str:
    return " ".join(text.lower().split())


def blind_answers(data: Path) -> dict[str, str]:
    """Question -> its most frequent answer in training."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for _, question, answer in asked(data / "train.json").values():
        counts[question][answer] += 1
    return {question: found.most_common(1)[0][0] for question, found in counts.items()}


def table(data: Path, workdir: Path) -> str:
    """A Markdown table of one evaluation."""
    lines = (workdir / "llava" / "predictions.jsonl").read_text().splitlines()
    texts = {p["id"].rpartition("/")[0]: p["text"] for p in map(json.loads, lines)}
    name = next(n for n in FILES if asked(data / f"{n}.json").keys() >= texts.keys())
    gold, blind = asked(data / f"{name}.json"), blind_answers(data)
    tally: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for record, text in texts.items():
        kind, question, answer = gold[record]
        for key in (kind, "all"):
            tally[key][0] += plain(text) == plain(answer)
            tally[key][1] += plain(blind.get(question, "")) == plain(answer)
            tally[key][2] += 1
    rows = [f"| {workdir.name}, {name} | right | n | 95 % | blind |", "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for key in sorted(tally, key=lambda k: (k == "all", k)):
        right, guessed, count = tally[key]
        low, high = wilson(right, count)
        rows.append(f"| {key} | {right / count:.2f} | {count} | {low:.2f} to {high:.2f} | {guessed / count:.2f} |")  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        sys.exit("usage: scripts/demo/score.py DATA EVAL ..")
    data, *workdirs = map(Path, sys.argv[1:])
    for workdir in workdirs:
        sys.stdout.write(table(data, workdir) + "\n\n")


if __name__ == "__main__":
    main()
