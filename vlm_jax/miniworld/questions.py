"""Questions about a scene or a sheet, and their one-word answers.

| family    | question                | answer                                                    |
|-----------|-------------------------|-----------------------------------------------------------|
| reasoning | `shape's friend`        | one step: relation table at the shape's colour            |
| reasoning | `shape's friend's rival`| two steps: the rival of that friend                       |
| reasoning | `dot's friend`          | either, from the colour of the small dot                  |
| reasoning | `ant bee shape`         | fact table at (ant, bee, the shape's colour)              |
| reasoning | `ant bee floor`         | fact table at (ant, bee, the floor)                       |
| ocr       | `read c5`               | the character in column c, row 5 (rows count from the top)|
| ocr       | `friend c5`             | one step more: relation table at that character           |
| dense     | `list`                  | all 64 slots in raster order (trains the encoder only)    |
"""

from __future__ import annotations

import collections
import functools

import numpy as np
from jaxtyping import Bool

from vlm_jax.miniworld.rendering import dot_mask, shape_mask
from vlm_jax.miniworld.scenes import (
    CHARACTERS,
    COLOURS,
    DOT_PX,
    DOTS,
    ENTITIES,
    FLOORS,
    GRID,
    IMAGE_PX,
    RELATIONS,
    SQUARES,
    THINGS,
    Scene,
    Sheet,
    World,
)

Turn = tuple[str, str]  # question, answer

CHAIN_SHARE = 0.45  # of the reasoning questions; the others ask for facts
TWO_STEP_SHARE = 0.5  # of the chains
DOT_SHARE = 1 / 3  # of the chains: they start from the dot
RELATED_SHARE = 0.25  # of the questions about sheets: they ask for a relation of the character
LIST = "list"
CAPTION_GRID = 4  # regions along a side that a caption names


def caption(scene: Scene) -> str:
    """The description that replaces the image in a text-only sample: what each of 4 x 4 regions shows, in raster order."""
    centre = (scene.dot_top + DOT_PX // 2, scene.dot_left + DOT_PX // 2)
    shown = np.where(_filled(shape_mask(scene), CAPTION_GRID), scene.colour, scene.floor)
    span = IMAGE_PX // CAPTION_GRID
    shown[centre[0] // span * CAPTION_GRID + centre[1] // span] = scene.dot
    return " ".join(shown)


def _filled(mask: Bool[np.ndarray, "H W"], grid: int) -> Bool[np.ndarray, "P"]:
    """Which of grid x grid regions the mask fills by more than half."""
    return mask.reshape(grid, IMAGE_PX // grid, grid, IMAGE_PX // grid).mean((1, 3)).ravel() > 0.5


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
        is_chain, two_steps, about_dot, fact_draw = rng.random((4, count))
        relations = rng.integers(len(RELATIONS), size=(count, 2))
        turns = []
        for i in range(count):
            if is_chain[i] < CHAIN_SHARE:
                steps = relations[i, : 2 if two_steps[i] < TWO_STEP_SHARE else 1]
                of_dot = about_dot[i] < DOT_SHARE
                start = ("dot", scene.dot) if of_dot else ("shape", scene.colour)
                turns.append(self.chain(*start, [int(s) for s in steps]))
            else:
                fact = min(int(np.searchsorted(chances, fact_draw[i])), chances.size - 1)
                turns.append(
                    self.fact(colour, floor, *(int(x) for x in np.unravel_index(fact, (16, 16, 2))))
                )
        return turns

    def chain(self, subject: str, named: str, steps: list[int]) -> Turn:
        """subject: "shape" or "dot", of the colour `named`."""
        words = [subject]
        for step in steps:
            named = self.related(step, named)
            words.append(RELATIONS[step])
        return " ".join([w + "'s" for w in words[:-1]] + words[-1:]), named

    def related(self, relation: int, thing: str) -> str:
        """The friend, rival, .. of a colour, an entity or a character."""
        return ENTITIES[self.world.relation[relation, THINGS.index(thing)]]

    def read(self, sheet: Sheet, count: int, rng: np.random.Generator) -> list[Turn]:
        """`count` questions about different slots, spread evenly over the sheet's blocks."""
        span = GRID // sheet.side
        slots = np.arange(len(SQUARES))
        blocks = slots // GRID // span * sheet.side + slots % GRID // span
        shuffled = rng.permutation(slots)
        seen: collections.Counter[int] = collections.Counter()
        turn = []  # how often the slot's block has come before
        for block in blocks[shuffled].tolist():
            turn.append(seen[block])
            seen[block] += 1
        asked = shuffled[np.argsort(turn, kind="stable")][:count]
        return [self.slot(SQUARES[i], sheet.characters[i], rng) for i in asked]

    def note(self, count: int, num_told: int, rng: np.random.Generator) -> tuple[str, list[Turn]]:
        """The description that replaces a sheet in a text-only sample, `num_told` slots with their characters; `count`
        questions about them."""
        slots = rng.permutation(len(SQUARES))[:num_told]
        characters = [CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=num_told)]
        told = [(SQUARES[slot], c) for slot, c in zip(slots, characters, strict=True)]
        asked = rng.permutation(np.arange(count) % num_told)
        return " ".join(" ".join(pair) for pair in told), [self.slot(*told[i], rng) for i in asked]

    def slot(self, square: str, character: str, rng: np.random.Generator) -> Turn:
        """A question about one slot of a sheet: the character, or one of its relations."""
        if rng.random() >= RELATED_SHARE:
            return f"read {square}", character
        relation = int(rng.integers(len(RELATIONS)))
        return f"{RELATIONS[relation]} {square}", self.related(relation, character)

    def fact(self, colour: int, floor: int, first: int, second: int, about_floor: int) -> Turn:
        attribute = len(COLOURS) + floor if about_floor else colour
        answer = ENTITIES[self.world.fact[first, second, attribute]]
        return f"{ENTITIES[first]} {ENTITIES[second]} {'floor' if about_floor else 'shape'}", answer


def listing(content: Scene | Sheet) -> Turn:
    """The question LIST and its answer: the content of the 64 slots in raster order, for a scene the dot's or the shape's
    colour or the floor."""
    if isinstance(content, Sheet):
        return LIST, " ".join(content.characters)
    named = np.where(_filled(shape_mask(content), GRID), content.colour, content.floor)
    return LIST, " ".join(np.where(_filled(dot_mask(content), GRID), content.dot, named))


def words() -> list[str]:
    """Every word that occurs in a question, an answer or a caption."""
    asked = [
        "read",
        LIST,
        "shape's",
        "dot's",
        *(f"{r}'s" for r in RELATIONS),
        *RELATIONS,
        "shape",
        "dot",
        "floor",
    ]
    return [*asked, *COLOURS, *DOTS, *FLOORS, *ENTITIES, *SQUARES, *CHARACTERS]
