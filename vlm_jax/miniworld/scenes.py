"""The contents of the miniature world: scenes, text images, and the fixed tables that hold its knowledge.

A scene is one big coloured shape before a wall and a floor: the shape fits one visual token, while wall and floor, of the
same colours, must be told apart by where they are. A text image is a sheet with 1, 4, 16 or 64 characters: the more
characters, the more visual tokens are needed to read them. Knowledge about colours, grounds and characters is the same in
every image, so it must be stored in the language model's weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np

IMAGE_PX = 64
SLOT_PX = 8  # one character fills one slot; the encoder's patches are as large
GRID = IMAGE_PX // SLOT_PX

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 40), "orange": (245, 140, 20), "yellow": (250, 235, 50), "green": (40, 190, 60),
    "blue": (35, 70, 230), "purple": (150, 40, 200), "pink": (250, 140, 190), "white": (250, 250, 250),
}  # fmt: skip
GROUNDS: dict[str, tuple[int, int, int]] = {
    "sand": (200, 180, 130), "moss": (80, 110, 60), "slate": (95, 105, 120), "coal": (25, 25, 30),
    "brick": (130, 65, 50), "lake": (70, 140, 170), "navy": (20, 25, 85), "plum": (85, 40, 80),
}  # fmt: skip
SHAPES = ("square", "disc", "diamond")  # drawn, never asked for
CHARACTERS = tuple("ABCDEFHJKLMNPRSTUVXZ")
# In raster order.
SQUARES = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcdefgh")

ENTITIES = (
    "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "koi", "lynx", "mole", "newt", "owl", "pig",
)  # fmt: skip
THINGS = (*COLOURS, *ENTITIES, *CHARACTERS)
RELATIONS = ("friend", "rival", "cousin", "guest", "guard", "tutor", "pilot", "baker")
FACT_ZIPF = 1.0  # frequency of the n-th most frequent fact ~ 1 / n


@dataclasses.dataclass(frozen=True)
class Scene:
    """A shape before a wall (the upper half) and a floor; pixels: `left` and `top` of the shape's bounding box."""

    colour: str
    wall: str
    floor: str
    shape: str
    size: int
    left: int
    top: int


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A text image: `characters[i]` is in the slot SQUARES[i]; each of side x side blocks repeats one character."""

    side: int
    characters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """The knowledge: every entry is a number of an entity.

    relation: int [8 relations, things]: the friend, rival, ... of each of THINGS.
    fact: int [16 entities, 16 entities, 8 colours + 8 grounds]: the answer for two entities and a colour or a ground.
    fact_weight: float of the shape of `fact`: how often each fact is asked, relative to the others.
    """

    relation: np.ndarray
    fact: np.ndarray
    fact_weight: np.ndarray


def make_world(seed: int) -> World:
    """Random tables; the same seed gives the same world."""
    rng = np.random.default_rng([seed, 0])
    entities, attributes = len(ENTITIES), len(COLOURS) + len(GROUNDS)
    relation = rng.integers(entities, size=(len(RELATIONS), len(THINGS)))
    fact = rng.integers(entities, size=(entities, entities, attributes))
    weight = np.arange(1, fact.size + 1, dtype=np.float64) ** -FACT_ZIPF
    return World(relation, fact, rng.permutation(weight).reshape(fact.shape))


def sample_scene(rng: np.random.Generator) -> Scene:
    size = int(rng.integers(28, 41))
    left, top = (int(x) for x in rng.integers(0, IMAGE_PX - size + 1, size=2))
    wall, floor = (list(GROUNDS)[i] for i in rng.permutation(len(GROUNDS))[:2])
    return Scene(
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        wall=wall,
        floor=floor,
        shape=SHAPES[rng.integers(len(SHAPES))],
        size=size,
        left=left,
        top=top,
    )


def sample_sheet(side: int, rng: np.random.Generator) -> Sheet:
    """side x side blocks, each repeating one character in all its (8 / side) x (8 / side) slots."""
    drawn = rng.integers(len(CHARACTERS), size=(side, side))
    block = GRID // side
    slots = drawn.repeat(block, axis=0).repeat(block, axis=1)
    return Sheet(side, tuple(CHARACTERS[i] for i in slots.reshape(-1)))
