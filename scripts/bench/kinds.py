#!/usr/bin/env python3
"""What the reasoning error of a finished miniature is made of: error by kind of question, after the text stage and in the cells.

scripts/bench/kinds.py WORKDIR/seed0 [--visual-tokens 64]

After the text stage each LM is asked 4,000 questions of the same kinds about scenes that are told in words; the cells' answers are
those of their evaluation. The kinds are chains by their steps, facts by how frequent they are, and relations of a sheet's
characters.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs import mini
from vlm_jax.inference import evaluation
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.miniworld import questions, scenes
from vlm_jax.settings import presets
from vlm_jax.settings.run import MeshConfig

RANKS = (16, 64, 256, 1024, 4096)  # upper ends of the classes of facts, the most frequent first
TOLD_SCENES, TURNS = 500, 8


class Kinds:
    """Names the kind of a question of one world."""

    def __init__(self, world: scenes.World):
        order = np.argsort(-world.fact_weight, axis=None, kind="stable")
        self.rank = np.empty(order.size, int)
        self.rank[order] = np.arange(1, order.size + 1)
        self.rank = self.rank.reshape(world.fact_weight.shape)

    def of(self, question: str, content: dict[str, Any]) -> str:
        """content: the fields of the scene; of a sheet none is read."""
        words = question.split()
        if words[0].endswith("'s"):
            return f"chain of {len(words) - 1}"
        if len(words) == 2:
            return "relation on a sheet"
        first, second, about = words
        named = content["colour" if about == "shape" else about]
        attribute = (*scenes.COLOURS, *scenes.GROUNDS).index(named)
        rank = self.rank[scenes.ENTITIES.index(first), scenes.ENTITIES.index(second), attribute]
        return f"fact up to {next(end for end in RANKS if rank <= end)}"


def asked(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(id of the question alone, question, answer, record)."""
    for record in records:
        said = [turn["value"] for turn in record["conversations"] if turn["from"] != "system"]
        for i, (question, answer) in enumerate(zip(said[::2], said[1::2], strict=True)):
            yield f"{record['id']}/{i}", question.removeprefix("<image>\n"), answer, record


def told(seed: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Records about scenes in words, and the fields of each scene by record id."""
    rng, asker = np.random.default_rng([seed, 77]), questions.Asker(scenes.make_world(seed))
    records, contents = [], {}
    for i in range(TOLD_SCENES):
        scene = scenes.sample_scene(rng)
        said = [{"from": "system", "value": questions.caption(scene)}]
        for question, answer in asker.ask(scene, TURNS, rng):
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"told-{i}", "conversations": said})
        contents[f"told-{i}"] = vars(scene)
    return records, contents


def errors(predictions: Path, kinds: dict[str, tuple[str, str]]) -> dict[str, list[bool]]:
    """kind -> whether each answer is wrong. kinds: question id -> (kind, answer)."""
    found = defaultdict(list)
    for line in predictions.read_text().splitlines():
        record = json.loads(line)
        kind, answer = kinds[record["id"]]
        found[kind].append(record["text"].strip() != answer)
    return found


def answer_told(run: Path, folder: Path, out: Path) -> Path:
    """Lets a text-trained LM answer; returns its predictions."""
    block = mini.get_config().eval.to_dict() | {
        "benchmarks": ("mini_reasoning",), "annotations": (str(folder),), "image_roots": (str(folder),), "checkpoint": str(run),
    }  # fmt: skip
    out.mkdir(parents=True)
    evaluation.evaluate(EvalConfig.from_block(block), MeshConfig(), str(out))
    return out / "mini_reasoning" / "predictions.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("seed_folder", type=Path)
    parser.add_argument("--visual-tokens", type=int, default=64)
    args = parser.parse_args()
    seed = int(args.seed_folder.name.removeprefix("seed"))
    kinds = Kinds(scenes.make_world(seed))
    shown = json.loads((args.seed_folder / "data" / "contents.json").read_text())
    test = json.loads((args.seed_folder / "data" / "reasoning_test.json").read_text())
    of_cells = {i: (kinds.of(q, shown[record["image"]]), answer) for i, q, answer, record in asked(test)}  # fmt: skip
    records, contents = told(seed)
    of_told = {i: (kinds.of(q, contents[record["id"]]), answer) for i, q, answer, record in asked(records)}  # fmt: skip
    names = [path.name for path in (args.seed_folder / "text").iterdir()]
    lms = sorted(names, key=lambda name: presets.lm(name).total_params)
    columns: dict[str, dict[str, list[bool]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "reasoning_test.json").write_text(json.dumps(records))
        for lm in lms:
            run = args.seed_folder / "text" / lm
            columns[f"{lm}, text"] = errors(answer_told(run, folder, folder / lm), of_told)
            cell = args.seed_folder / "cells" / f"tokenpacker-{lm}-v{args.visual_tokens}"
            columns[f"{lm}, cell"] = errors(cell / "eval" / "mini_reasoning" / "predictions.jsonl", of_cells)  # fmt: skip
    counts = {kind: len(wrong) for kind, wrong in columns[f"{lms[0]}, cell"].items()}
    print("| kind | share | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for kind in sorted(counts, key=lambda kind: (kind[:4], len(kind), kind)):
        cells = [f"{np.mean(found[kind]):.2f}" if kind in found else "" for found in columns.values()]  # fmt: skip
        print(f"| {kind} | {counts[kind] / sum(counts.values()):.0%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
