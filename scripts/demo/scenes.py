#!/usr/bin/env python3
"""Pictures with questions for the demonstration model: coloured shapes before photographs, asked and answered in sentences.

scripts/demo/scenes.py OUT [--pictures=6000] [--seed=0]

The photographs ship inside scikit-image and scikit-learn (pip install 'vlm_jax[test]'). Written below OUT:

    images/*.png       64 x 64: none, one or two shapes before a part of a photograph
    encoder.json       for the encoder: all patches of a picture named, then every question about it
    captions.json      one caption per picture
    train.json         one question per record
    held_out.json      pictures that are not in training
    new_pairs.json     pictures with a pair of colour and shape that no training picture has
    tokenizer/         the words of encoder.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, from a checkout

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vlm_jax.files import write_whole

SIDE_PX, PATCH_PX = 64, 8
COLOURS = {
    "red": (225, 30, 40), "orange": (245, 140, 20), "yellow": (250, 235, 50), "green": (40, 190, 60),
    "blue": (35, 70, 230), "purple": (150, 40, 200), "pink": (250, 140, 190), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("square", "disc", "diamond", "triangle", "cross", "ring")
# One pair of each shape is never trained on.
NEW_PAIRS = (
    ("red", "square"), ("blue", "disc"), ("green", "diamond"), ("yellow", "triangle"), ("pink", "cross"), ("white", "ring"),
)  # fmt: skip
# What an answer calls it -> wheel and path inside it.
PHOTOS = {
    "a cat": ("skimage", "data/chelsea.png"), "coffee": ("skimage", "data/coffee.png"),
    "an astronaut": ("skimage", "data/astronaut.png"), "a rocket": ("skimage", "data/rocket.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"), "a motorcycle": ("skimage", "data/motorcycle_left.png"),
    "coins": ("skimage", "data/coins.png"), "bricks": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"), "a chessboard": ("skimage", "data/chessboard_RGB.png"),
    "a temple": ("sklearn", "datasets/images/china.jpg"), "a flower": ("sklearn", "datasets/images/flower.jpg"),
}  # fmt: skip
COUNTS = {0: "There are no shapes.", 1: "There is one shape.", 2: "There are two shapes."}
SIDES = ("left", "right")
NUMBER_CHANCES = (0.15, 0.35, 0.5)  # of no, one or two shapes
HELD_OUT, NEW = 150, 75  # pictures, two questions about each
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
TEMPLATE_WORDS = ("USER:", "ASSISTANT:", "image")

Turn = tuple[str, str, str]  # kind, question, answer


@dataclasses.dataclass(frozen=True)
class Shape:
    colour: str
    shape: str
    side: str
    x: int  # centre, pixels
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    photo: str
    shapes: tuple[Shape, ...]  # from left to right, all of different colours and kinds


def sample(rng: np.random.Generator, new: bool) -> Scene:
    """A scene; new: with a pair of NEW_PAIRS, else without any."""
    while True:
        count = int(rng.choice(3, p=NUMBER_CHANCES))
        sides = [SIDES[i] for i in sorted(rng.permutation(2)[:count])]
        colours = rng.choice(list(COLOURS), size=count, replace=False)
        kinds = rng.choice(SHAPES, size=count, replace=False)
        shapes = []
        for side, colour, kind in zip(sides, colours, kinds, strict=True):
            x = int(rng.integers(13, 21)) + (SIDE_PX // 2 - 2) * (side == "right")
            radius = int(rng.integers(9, 13))
            shapes.append(Shape(str(colour), str(kind), side, x, int(rng.integers(14, 51)), radius))
        if new == any((s.colour, s.shape) in NEW_PAIRS for s in shapes):
            return Scene(str(rng.choice(list(PHOTOS))), tuple(shapes))


def draw(scene: Scene, photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Part of the photograph, perhaps mirrored, and the shapes before it."""
    side = int(min(photo.size) * rng.uniform(0.6, 1.0))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    picture = photo.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC, (left, top, left + side, top + side))  # fmt: skip
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        paint(pen, shape)
    return picture


def paint(pen: ImageDraw.ImageDraw, s: Shape) -> None:
    fill, edge, r, t = COLOURS[s.colour], (0, 0, 0), s.radius, s.radius // 3
    box = (s.x - r, s.y - r, s.x + r, s.y + r)
    if s.shape == "square":
        pen.rectangle(box, fill, edge)
    elif s.shape == "disc":
        pen.ellipse(box, fill, edge)
    elif s.shape == "ring":
        pen.ellipse(box, None, edge, r // 2 + 2)
        pen.ellipse((s.x - r + 1, s.y - r + 1, s.x + r - 1, s.y + r - 1), None, fill, r // 2)
    else:
        corners = {
            "diamond": ((0, -r), (r, 0), (0, r), (-r, 0)),
            "triangle": ((0, -r), (r, r), (-r, r)),
            "cross": (
                (-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t),
            ),
        }[s.shape]  # fmt: skip
        pen.polygon([(s.x + x, s.y + y) for x, y in corners], fill, edge)


def turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Every kind of question that fits the scene, one of each, in random order."""
    photo, shapes = scene.photo, scene.shapes
    found: list[Turn] = [("count", "How many shapes are there?", COUNTS[len(shapes)])]
    if not shapes:
        found.append(("photo", "What is in this picture?", f"This is a photograph of {photo}."))
        return [*found, caption(scene)]
    found.append(("photo", "What is in the background?", f"In the background is {photo}."))
    one = shapes[rng.integers(len(shapes))]
    found += [
        ("colour", f"What colour is the {one.shape}?", f"The {one.shape} is {one.colour}."),
        ("shape", f"Which shape is {one.colour}?", f"The {one.shape} is {one.colour}."),
        ("where", f"Where is the {one.shape}?", f"The {one.shape} is on the {one.side}."),
        ("side", f"What is on the {one.side}?", f"On the {one.side} is {one.name}."),
        there(shapes, one, rng),
        caption(scene),
    ]
    return [found[i] for i in rng.permutation(len(found))]


def there(shapes: tuple[Shape, ...], one: Shape, rng: np.random.Generator) -> Turn:
    """Half of the time about a shape that is there, else with another colour or kind."""
    if rng.random() < 0.5:
        return "there", f"Is there {one.name}?", f"Yes, there is {one.name}."
    if rng.random() < 0.5:
        others = sorted(set(COLOURS) - {s.colour for s in shapes})
        other = dataclasses.replace(one, colour=str(rng.choice(others)))
    else:
        others = sorted(set(SHAPES) - {s.shape for s in shapes})
        other = dataclasses.replace(one, shape=str(rng.choice(others)))
    return "there", f"Is there {other.name}?", f"No, there is no {other.colour} {other.shape}."


def caption(scene: Scene) -> Turn:
    said = " and ".join(f"{s.name} on the {s.side}" for s in scene.shapes)
    said = f"{said}, before a photograph of {scene.photo}." if said else f"a photograph of {scene.photo}."  # fmt: skip
    return "describe", "Describe the picture.", f"{said[0].upper()}{said[1:]}"


def listing(scene: Scene) -> Turn:
    """The colour of the shape, or the photograph, at each patch in raster order."""
    word = "_".join(scene.photo.split())
    words = []
    for slot in range((SIDE_PX // PATCH_PX) ** 2):
        y, x = (PATCH_PX * (i + 0.5) for i in divmod(slot, SIDE_PX // PATCH_PX))
        near = [s for s in scene.shapes if max(abs(s.x - x), abs(s.y - y)) < s.radius]
        words.append(f"{near[0].colour}_{near[0].shape}" if near else word)
    return "list", "List the patches.", " ".join(words)


def record(name: str, image: str, asked: list[Turn]) -> dict:
    said = []
    for i, (_, question, answer) in enumerate(asked):
        said += [
            {"from": "human", "value": ("<image>\n" if i == 0 else "") + question},
            {"from": "gpt", "value": answer},
        ]
    return {"id": name, "image": image, "conversations": said}


def write(out: Path, pictures: int, seed: int) -> None:
    """Writes everything below `out`; the same arguments give the same bytes."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    photos = {}
    for name, (wheel, path) in PHOTOS.items():
        found = importlib.util.find_spec(wheel)
        if found is None or found.origin is None:
            sys.exit(f"scenes.py: {wheel} is not installed; pip install 'vlm_jax[test]'.")
        photos[name] = Image.open(Path(found.origin).parent / path).convert("RGB")
    files: dict[str, list] = {"encoder": [], "captions": [], "train": [], "held_out": [], "new_pairs": []}  # fmt: skip
    splits = {"train": (pictures, False), "held_out": (HELD_OUT, False), "new_pairs": (NEW, True)}
    for number, (split, (count, new)) in enumerate(splits.items()):
        rng = np.random.default_rng([seed, number])
        for i in range(count):
            scene = sample(rng, new)
            image = f"images/{split}-{i:05d}.png"
            draw(scene, photos[scene.photo], rng).save(out / image, compress_level=1)
            asked = turns(scene, rng)
            if split == "train":
                files["encoder"].append(record(f"{i:05d}", image, [listing(scene), *asked]))
                files["captions"].append(record(f"{i:05d}", image, [caption(scene)]))
            for turn in asked if split == "train" else asked[:2]:
                files[split].append(record(f"{turn[0]}-{i:05d}", image, [turn]))
    for name, records in files.items():
        write_whole(out / f"{name}.json", json.dumps(records, separators=(",", ":")))
    texts = [m["value"] for r in files["encoder"] for m in r["conversations"]]
    write_tokenizer(out / "tokenizer", texts)


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A word-level tokenizer, split at white space."""
    words = [*SPECIALS, *TEMPLATE_WORDS, *dict.fromkeys(w for text in texts for w in text.split())]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIALS))
    bos = ("<s>", SPECIALS.index("<s>"))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=6000, help="of training (default: 6000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.pictures, args.seed)


if __name__ == "__main__":
    main()
