"""Questions about a scene or a sheet, and their one-word answers.

| family    | question                | answer                                                    |
|-----------|-------------------------|-----------------------------------------------------------|
| reasoning | `shape's friend`        | one step: relation table at the shape's colour            |
| reasoning | `shape's friend's rival`| two steps: the rival of that friend                       |
| reasoning | `ant bee shape`         | fact table at (ant, bee, the shape's colour)              |
| reasoning | `ant bee floor`         | fact table at (ant, bee, the floor)                       |
| ocr       | `read c5`               | the character in column c, row 5 (rows count from the top)|
| dense     | `list`                  | all 64 slots in raster order (trains the encoder only)    |
"""

from __future__ import annotations

import functools

import numpy as np

from vlm_jax.miniworld.rendering import shape_mask
from vlm_jax.miniworld.scenes import (
    CHARACTERS,
    COLOURS,
    ENTITIES,
    FLOORS,
    GRID,
    RELATIONS,
    SLOT_PX,
    SQUARES,
    Scene,
    Sheet,
    World,
)

Turn = tuple[str, str]  # question, answer

CHAIN_SHARE = 0.45  # of the reasoning questions; the others ask for facts
TWO_STEP_SHARE = 0.5  # of the chains
LIST = "list"


def caption(scene: Scene) -> str:
    """The description that replaces the image in a text-only sample."""
    return f"{scene.colour} shape on {scene.floor} floor"


def note(count: int, rng: np.random.Generator) -> tuple[str, list[Turn]]:
    """The description that replaces a sheet in a text-only sample, `count` slots with their characters; one question each."""
    slots = rng.permutation(len(SQUARES))[:count]
    characters = [CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=count)]
    told = " ".join(f"{SQUARES[slot]} {c}" for slot, c in zip(slots, characters, strict=True))
    order = rng.permutation(count)
    return told, [(f"read {SQUARES[slots[i]]}", characters[i]) for i in order]


class Asker:
    """Samples reasoning questions about scenes of one world; facts are sampled by their Zipf weights."""

    def __init__(self, world: World):
        self.world = world

    @functools.cache  # noqa: B019 (64 entries, lives as long as the world)
    def _fact_chances(self, colour: int, floor: int) -> np.ndarray:
        """Cumulative probabilities of the 2 x 256 facts about a scene."""
        attributes = [colour, len(COLOURS) + floor]
        weights = self.world.fact_weight[:, :, attributes].reshape(-1)
        return np.cumsum(weights) / weights.sum()

    def ask(self, scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
        """`count` questions about the scene with their answers."""
        colour, floor = list(COLOURS).index(scene.colour), list(FLOORS).index(scene.floor)
        chances = self._fact_chances(colour, floor)
        is_chain, two_steps, fact_draw = rng.random((3, count))
        relations = rng.integers(len(RELATIONS), size=(count, 2))
        turns = []
        for i in range(count):
            if is_chain[i] < CHAIN_SHARE:
                steps = relations[i, : 2 if two_steps[i] < TWO_STEP_SHARE else 1]
                turns.append(self.chain(colour, [int(s) for s in steps]))
            else:
                fact = min(int(np.searchsorted(chances, fact_draw[i])), chances.size - 1)
                turns.append(
                    self.fact(colour, floor, *(int(x) for x in np.unravel_index(fact, (16, 16, 2))))
                )
        return turns

    def chain(self, colour: int, steps: list[int]) -> Turn:
        row, words = colour, ["shape"]
        for step in steps:
            row = len(COLOURS) + int(self.world.relation[step, row])
            words.append(RELATIONS[step])
        answer = ENTITIES[row - len(COLOURS)]
        return " ".join([w + "'s" for w in words[:-1]] + words[-1:]), answer

    def fact(self, colour: int, floor: int, first: int, second: int, about_floor: int) -> Turn:
        attribute = len(COLOURS) + floor if about_floor else colour
        answer = ENTITIES[self.world.fact[first, second, attribute]]
        return f"{ENTITIES[first]} {ENTITIES[second]} {'floor' if about_floor else 'shape'}", answer


def read(sheet: Sheet, count: int, rng: np.random.Generator) -> list[Turn]:
    """`count` questions for characters in different slots, spread evenly over the sheet's blocks."""
    block = GRID // sheet.side
    slots = np.arange(len(SQUARES))
    blocks = slots // GRID // block * sheet.side + slots % GRID // block
    shuffled = rng.permutation(slots)
    turn = np.array(
        [np.sum(blocks[shuffled[:i]] == blocks[slot]) for i, slot in enumerate(shuffled)]
    )
    asked = shuffled[np.argsort(turn, kind="stable")][:count]
    return [(f"read {SQUARES[i]}", sheet.characters[i]) for i in asked]


def listing(content: Scene | Sheet) -> Turn:
    """The question LIST and its answer: the content of the 64 slots in raster order, for a scene the colour or the floor."""
    if isinstance(content, Sheet):
        return LIST, " ".join(content.characters)
    covered = shape_mask(content).reshape(GRID, SLOT_PX, GRID, SLOT_PX).mean((1, 3)).reshape(-1)
    return LIST, " ".join(content.colour if share > 0.5 else content.floor for share in covered)


def words() -> list[str]:
    """Every word that occurs in a question, an answer or a caption."""
    asked = [
        "read",
        LIST,
        "shape's",
        *(f"{r}'s" for r in RELATIONS),
        *RELATIONS,
        "shape",
        "on",
        "floor",
    ]
    return [*asked, *COLOURS, *FLOORS, *ENTITIES, *SQUARES, *CHARACTERS]
