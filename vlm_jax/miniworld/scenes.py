"""The contents of the miniature world: scenes, text images, and the fixed tables that hold its knowledge.

A scene is one big coloured shape and a small coloured dot on a floor: two facts that fit one visual token, and
one that is easily lost in it. A text image is a sheet with 1, 4, 16 or 64 characters: the more characters, the more visual
tokens are needed to read them. Knowledge about colours, floors and characters is the same in every image, so it must be
stored in the language model's weights.
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
FLOORS: dict[str, tuple[int, int, int]] = {
    "sand": (200, 180, 130), "moss": (80, 110, 60), "slate": (95, 105, 120), "coal": (25, 25, 30),
    "brick": (130, 65, 50), "lake": (70, 140, 170), "navy": (20, 25, 85), "plum": (85, 40, 80),
}  # fmt: skip
# Colours of dots are those of nothing else: which token holds the dot need not be guessed.
DOTS: dict[str, tuple[int, int, int]] = {
    "lime": (170, 255, 0), "cyan": (0, 240, 240), "magenta": (255, 0, 255), "maroon": (110, 0, 20),
}  # fmt: skip
SHAPES = ("square", "disc", "diamond")  # drawn, never asked for
CHARACTERS = tuple("ABCDEFHJKLMNPRSTUVXZ")
# In raster order.
SQUARES = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcdefgh")

ENTITIES = (
    "ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "koi", "lynx", "mole", "newt", "owl", "pig",
)  # fmt: skip
THINGS = (*COLOURS, *DOTS, *ENTITIES, *CHARACTERS)
RELATIONS = ("friend", "rival", "cousin", "guest", "guard", "tutor", "pilot", "baker")
FACT_ZIPF = 1.0  # frequency of the n-th most frequent fact ~ 1 / n
DOT_PX = 18  # side of a dot: it fills 4 to 6 of 64 slots by more than half


@dataclasses.dataclass(frozen=True)
class Scene:
    """A shape and a dot on a floor; lengths in pixels, `left` and `top` of the shape's bounding box and of the dot's."""

    colour: str
    floor: str
    shape: str
    size: int
    left: int
    top: int
    dot: str  # its colour
    dot_left: int
    dot_top: int


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A text image: `characters[i]` is in the slot SQUARES[i]; each of side x side blocks repeats one character."""

    side: int
    characters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class World:
    """The knowledge: every entry is a number of an entity.

    relation: int [8 relations, things]: the friend, rival, ... of each of THINGS.
    fact: int [16 entities, 16 entities, 8 colours + 8 floors]: the answer for two entities and a colour or a floor.
    fact_weight: float of the shape of `fact`: how often each fact is asked, relative to the others.
    """

    relation: np.ndarray
    fact: np.ndarray
    fact_weight: np.ndarray


def make_world(seed: int) -> World:
    """Random tables; the same seed gives the same world."""
    rng = np.random.default_rng([seed, 0])
    entities, attributes = len(ENTITIES), len(COLOURS) + len(FLOORS)
    relation = rng.integers(entities, size=(len(RELATIONS), len(THINGS)))
    fact = rng.integers(entities, size=(entities, entities, attributes))
    weight = np.arange(1, fact.size + 1, dtype=np.float64) ** -FACT_ZIPF
    return World(relation, fact, rng.permutation(weight).reshape(fact.shape))


def sample_scene(rng: np.random.Generator) -> Scene:
    size = int(rng.integers(28, 41))
    left, top = (int(x) for x in rng.integers(0, IMAGE_PX - size + 1, size=2))
    dot_left, dot_top = (int(x) for x in rng.integers(0, IMAGE_PX - DOT_PX + 1, size=2))
    return Scene(
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        floor=list(FLOORS)[rng.integers(len(FLOORS))],
        shape=SHAPES[rng.integers(len(SHAPES))],
        size=size,
        left=left,
        top=top,
        dot=list(DOTS)[rng.integers(len(DOTS))],
        dot_left=dot_left,
        dot_top=dot_top,
    )


def sample_sheet(side: int, rng: np.random.Generator) -> Sheet:
    """side x side blocks, each repeating one character in all its (8 / side) x (8 / side) slots."""
    drawn = rng.integers(len(CHARACTERS), size=(side, side))
    block = GRID // side
    slots = drawn.repeat(block, axis=0).repeat(block, axis=1)
    return Sheet(side, tuple(CHARACTERS[i] for i in slots.reshape(-1)))
