"""Questions about a scene or a sheet, and their one-word answers.

| family    | question                | answer                                                    |
|-----------|-------------------------|-----------------------------------------------------------|
| reasoning | `shape's friend`        | one step: relation table at the shape's colour            |
| reasoning | `shape's friend's rival`| two steps: the rival of that friend                       |
| reasoning | `ant bee shape`         | fact table at (ant, bee, the shape's colour)              |
| reasoning | `ant bee floor`         | fact table at (ant, bee, the floor's ground)              |
| reasoning | `ant bee wall`          | fact table at (ant, bee, the wall's ground)               |
| ocr       | `read c5`               | the character in column c, row 5 (rows count from the top)|
| both      | `friend c5`             | one step more: relation table at that character           |
| dense     | `list`                  | all 64 slots in raster order (trains the encoder only)    |
"""

from __future__ import annotations

import collections
import functools

import numpy as np

from vlm_jax.miniworld.rendering import shape_mask
from vlm_jax.miniworld.scenes import (
    CHARACTERS,
    COLOURS,
    ENTITIES,
    GRID,
    GROUNDS,
    RELATIONS,
    SLOT_PX,
    SQUARES,
    THINGS,
    Scene,
    Sheet,
    World,
)

Turn = tuple[str, str]  # question, answer

CHAIN_SHARE = 0.45  # of the reasoning questions; the others ask for facts
TWO_STEP_SHARE = 0.5  # of the chains
# Of the questions about sheets: they ask for a relation of the character. In training more often, for it is hard to learn.
RELATED_SHARE = 0.25
TEST_RELATED_SHARE = 0.15
LIST = "list"
FACT_SHARES = {"shape": 0.5, "floor": 0.25, "wall": 0.25}  # of the facts


def caption(scene: Scene) -> str:
    """The description that replaces the image in a text-only sample."""
    return f"{scene.colour} shape {scene.wall} wall {scene.floor} floor"


class Asker:
    """Samples reasoning questions about scenes of one world; facts are sampled by their Zipf weights."""

    def __init__(self, world: World):
        self.world = world

    @functools.cache  # noqa: B019 (16 entries, lives as long as the world)
    def _fact_chances(self, attribute: int) -> np.ndarray:
        """Cumulative probabilities of the 256 facts about a colour or a ground."""
        weights = self.world.fact_weight[:, :, attribute].reshape(-1)
        return np.cumsum(weights) / weights.sum()

    def ask(self, scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
        """`count` questions about the scene with their answers."""
        is_chain, two_steps, fact_draw = rng.random((3, count))
        about = rng.choice(list(FACT_SHARES), size=count, p=list(FACT_SHARES.values()))
        relations = rng.integers(len(RELATIONS), size=(count, 2))
        turns = []
        for i in range(count):
            if is_chain[i] < CHAIN_SHARE:
                steps = relations[i, : 2 if two_steps[i] < TWO_STEP_SHARE else 1]
                turns.append(self.chain(scene.colour, [int(s) for s in steps]))
            else:
                turns.append(self.fact(scene, about[i], fact_draw[i]))
        return turns

    def chain(self, named: str, steps: list[int]) -> Turn:
        """named: the shape's colour."""
        words = ["shape"]
        for step in steps:
            named = self.related(step, named)
            words.append(RELATIONS[step])
        return " ".join([w + "'s" for w in words[:-1]] + words[-1:]), named

    def fact(self, scene: Scene, about: str, draw: float) -> Turn:
        """about: "shape", "wall" or "floor". draw: uniform in [0, 1), which fact about it."""
        attribute = (*COLOURS, *GROUNDS).index(
            scene.colour if about == "shape" else getattr(scene, about)
        )
        chances = self._fact_chances(attribute)
        fact = min(int(np.searchsorted(chances, draw)), chances.size - 1)
        first, second = divmod(fact, len(ENTITIES))
        answer = ENTITIES[self.world.fact[first, second, attribute]]
        return f"{ENTITIES[first]} {ENTITIES[second]} {about}", answer

    def related(self, relation: int, thing: str) -> str:
        """The friend, rival, .. of a colour, an entity or a character."""
        return ENTITIES[self.world.relation[relation, THINGS.index(thing)]]

    def read(
        self, sheet: Sheet, count: int, rng: np.random.Generator, related: float = RELATED_SHARE
    ) -> list[Turn]:
        """`count` questions about different slots, spread evenly over the sheet's blocks. related: the share of relations."""
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
        return [self.slot(SQUARES[i], sheet.characters[i], rng, related) for i in asked]

    def note(self, count: int, num_told: int, rng: np.random.Generator) -> tuple[str, list[Turn]]:
        """The description that replaces a sheet in a text-only sample, `num_told` slots with their characters; `count`
        questions about them."""
        slots = rng.permutation(len(SQUARES))[:num_told]
        characters = [CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=num_told)]
        told = [(SQUARES[slot], c) for slot, c in zip(slots, characters, strict=True)]
        asked = [told[i] for i in rng.permutation(np.arange(count) % num_told).tolist()]
        turns = [self.slot(square, character, rng) for square, character in asked]
        return " ".join(" ".join(pair) for pair in told), turns

    def slot(
        self,
        square: str,
        character: str,
        rng: np.random.Generator,
        related: float = RELATED_SHARE,
    ) -> Turn:
        """A question about one slot of a sheet: the character, or (chance `related`) one of its relations."""
        if rng.random() >= related:
            return f"read {square}", character
        return self._relation(square, character, rng)

    def relations(self, sheet: Sheet, count: int, rng: np.random.Generator) -> list[Turn]:
        """`count` questions about relations of the characters in any slots."""
        slots = rng.integers(len(SQUARES), size=count)
        return [self._relation(SQUARES[i], sheet.characters[i], rng) for i in slots]

    def _relation(self, square: str, character: str, rng: np.random.Generator) -> Turn:
        relation = int(rng.integers(len(RELATIONS)))
        return f"{RELATIONS[relation]} {square}", self.related(relation, character)


def listing(content: Scene | Sheet) -> Turn:
    """The question LIST and its answer: the content of the 64 slots in raster order, for a scene a colour or a ground."""
    if isinstance(content, Sheet):
        return LIST, " ".join(content.characters)
    covered = shape_mask(content).reshape(GRID, SLOT_PX, GRID, SLOT_PX).mean((1, 3)).reshape(-1)
    grounds = [content.wall] * (len(SQUARES) // 2) + [content.floor] * (len(SQUARES) // 2)
    return LIST, " ".join(np.where(covered > 0.5, content.colour, grounds))


def words() -> list[str]:
    """Every word that occurs in a question, an answer or a caption."""
    asked = [
        "read",
        LIST,
        "shape's",
        *(f"{r}'s" for r in RELATIONS),
        *RELATIONS,
        "shape",
        "wall",
        "floor",
    ]
    return [*asked, *COLOURS, *GROUNDS, *ENTITIES, *SQUARES, *CHARACTERS]
