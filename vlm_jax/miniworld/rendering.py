"""Draws scenes and text images as 64 x 64 RGB arrays."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8

from vlm_jax.miniworld.scenes import (
    CHARACTERS,
    COLOURS,
    GRID,
    GROUNDS,
    IMAGE_PX,
    SLOT_PX,
    Scene,
    Sheet,
)

SCENE_NOISE = 0.04  # standard deviation, of the full range
SHEET_NOISE = 0.12
FONT_PX = (7, 5)  # height, width

# One 7 x 5 bitmap per character: seven rows of five bits, the leftmost column is the highest bit.
FONT: dict[str, tuple[int, ...]] = {
    "A": (0b01110, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "B": (0b11110, 0b10001, 0b10001, 0b11110, 0b10001, 0b10001, 0b11110),
    "C": (0b01111, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b01111),
    "D": (0b11100, 0b10010, 0b10001, 0b10001, 0b10001, 0b10010, 0b11100),
    "E": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b11111),
    "F": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b10000),
    "H": (0b10001, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "J": (0b00111, 0b00010, 0b00010, 0b00010, 0b00010, 0b10010, 0b01100),
    "K": (0b10001, 0b10010, 0b10100, 0b11000, 0b10100, 0b10010, 0b10001),
    "L": (0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b11111),
    "M": (0b10001, 0b11011, 0b10101, 0b10101, 0b10001, 0b10001, 0b10001),
    "N": (0b10001, 0b11001, 0b11001, 0b10101, 0b10011, 0b10011, 0b10001),
    "P": (0b11110, 0b10001, 0b10001, 0b11110, 0b10000, 0b10000, 0b10000),
    "R": (0b11110, 0b10001, 0b10001, 0b11110, 0b10100, 0b10010, 0b10001),
    "S": (0b01111, 0b10000, 0b10000, 0b01110, 0b00001, 0b00001, 0b11110),
    "T": (0b11111, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100),
    "U": (0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "V": (0b10001, 0b10001, 0b10001, 0b10001, 0b01010, 0b01010, 0b00100),
    "X": (0b10001, 0b10001, 0b01010, 0b00100, 0b01010, 0b10001, 0b10001),
    "Z": (0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b10000, 0b11111),
}  # fmt: skip
GLYPHS: np.ndarray = np.array(
    [
        [[row >> (FONT_PX[1] - 1 - i) & 1 for i in range(FONT_PX[1])] for row in FONT[c]]
        for c in CHARACTERS
    ],
    dtype=bool,
)


def draw(content: Scene | Sheet, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """The image of a scene or a sheet; `rng` draws the noise, and a sheet's contrast and the shifts of its characters."""
    if isinstance(content, Scene):
        wall, floor = (np.array(GROUNDS[ground]) for ground in (content.wall, content.floor))
        upper = np.arange(IMAGE_PX)[:, None, None] < IMAGE_PX // 2
        colour = np.array(COLOURS[content.colour])
        shown = np.where(shape_mask(content)[:, :, None], colour, np.where(upper, wall, floor))
        image = shown / 255.0
        noise = SCENE_NOISE * rng.standard_normal(image.shape)
    else:
        contrast = rng.uniform(0.5, 1.0)
        paper = rng.uniform(0.0, 1.0 - contrast)
        grey = paper + contrast * ink_mask(content, rng)
        image = np.repeat(grey[:, :, None], 3, axis=2)
        noise = SHEET_NOISE * rng.standard_normal(grey.shape)[:, :, None]
    return np.rint(255.0 * np.clip(image + noise, 0.0, 1.0)).astype(np.uint8)


def shape_mask(scene: Scene) -> Bool[np.ndarray, "H W"]:
    """True where the shape covers wall and floor."""
    half = scene.size / 2
    y, x = np.mgrid[:IMAGE_PX, :IMAGE_PX] + 0.5
    y, x = np.abs(y - scene.top - half), np.abs(x - scene.left - half)
    if scene.shape == "square":
        return (x <= half) & (y <= half)
    if scene.shape == "disc":
        return x**2 + y**2 <= half**2
    return x + y <= half


def ink_mask(sheet: Sheet, rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """True where a character is inked; each is shifted by up to 2 pixels across and 1 down inside its slot."""
    ink = np.zeros((IMAGE_PX, IMAGE_PX), dtype=bool)
    height, width = FONT_PX
    for slot, character in enumerate(sheet.characters):
        row, column = divmod(slot, GRID)
        top = row * SLOT_PX + int(rng.integers(0, 2))
        left = column * SLOT_PX + int(rng.integers(0, 3))
        ink[top : top + height, left : left + width] = GLYPHS[CHARACTERS.index(character)]
    return ink
