"""Writes the miniature world to disk: images, LLaVA-format conversations and a word-level tokenizer.

DIRECTORY/
  images/*.png            64 x 64
  encoder_train.json      images; dense listings and ordinary questions, for the encoder's training
  vlm_train.json          images and, one record in nine, a scene told in words; `questions` turns per record
  vlm_single_train.json   the questions about images, one per record: for compressors that use the query
  text_train.json         no images; a system message describes the scene or the sheet
  reasoning_test.json     held-out scenes, and relations of characters on the held-out sheets
  ocr_test.json           held-out sheets
  contents.json           what each image shows; world.json  the tables: enough to derive every answer again
  tokenizer/              loadable by transformers.AutoTokenizer
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vlm_jax.files import write_whole
from vlm_jax.miniworld import questions, rendering, scenes
from vlm_jax.miniworld.scenes import Scene, Sheet
from vlm_jax.settings.checks import ConfigError

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
# Of the vicuna template, and the query of an empty image slot.
TEMPLATE_WORDS = ("USER:", "ASSISTANT:", "image")
Record = dict[str, Any]
Ask = Callable[[Scene | Sheet, np.random.Generator], list[questions.Turn]]

# The contents of the images of a split, in turn: 0 is a scene, k a sheet of k x k different blocks. Most training images are
# dense sheets: a scene's answers are mostly known from text, one block is read at once, and many teach to look at a place.
KINDS = (0, 1, 2, 4, 0, 8, 2, 8, 0, 4, 8, 2, 0, 8, 4, 4)
# Of the test images, the denser sheets are the rarer ones: the share that V tokens cannot tell apart falls about as a power of V.
TEST_SIDES = (1, 2, 1, 4, 1, 2, 8, 1, 2, 4, 1, 2, 1, 4, 2, 8)
TEST_KINDS = tuple(kind for side in TEST_SIDES for kind in (0, side))
# Slots that a text about a sheet tells, in turn. No text teaches to look one of several up, but with one slot only a model
# with 64 visual tokens learns it later or not at all.
TOLD = (1, 2, 4, 8)
ENCODER_KINDS = (0, 1, 2, 4, 0, 8, 4, 8)
# Of vlm_train: the texts among the images keep what the decoder has learnt from text.
IMAGES_PER_TEXT = 8
SCENE_QUESTIONS = 4  # of reasoning_test for each about a sheet


def write(
    directory: str | pathlib.Path,
    seed: int,
    num_train_images: int = 4000,
    num_test_images: int = 800,
    num_encoder_images: int = 2048,
    num_text_records: int = 32000,
    records_per_image: int = 3,
    questions_per_record: int = 8,
) -> None:
    """Writes everything below `directory` (created; files of the same name are replaced). Same arguments, same bytes.

    The shares of scenes and of sheets with 1, 4, 16 or 64 different blocks: see KINDS (training) and TEST_KINDS (half, half).
    records_per_image: conversations about each training image, with different questions. No test image equals a
    training image. Raises ConfigError for image counts that cannot be split evenly.
    """
    for name, count in (
        ("num_train_images", num_train_images),
        ("num_test_images", num_test_images),
        ("num_encoder_images", num_encoder_images),
    ):
        if count < 8 or count % 8:
            raise ConfigError(
                f"miniworld: {name} {count} is not a positive multiple of 8; use e.g. {max(8, count // 8 * 8)}."
            )
    directory = pathlib.Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    world = scenes.make_world(seed)
    images = functools.partial(_write_images, directory)
    train = images("train", num_train_images, KINDS, np.random.default_rng([seed, 1]))
    test = images("test", num_test_images, TEST_KINDS, np.random.default_rng([seed, 2]))
    dense = images("encoder", num_encoder_images, ENCODER_KINDS, np.random.default_rng([seed, 6]))
    asker = questions.Asker(world)
    ask = functools.partial(_ask, asker, questions_per_record)

    files: dict[str, Any] = {
        "encoder_train": _encoder_records(dense, ask, np.random.default_rng([seed, 3])),
        "text_train": _text_records(
            num_text_records, asker, questions_per_record, np.random.default_rng([seed, 4])
        ),
    }
    rng = np.random.default_rng([seed, 5])
    files["vlm_train"] = [
        _record(f"{name}-{i}", ask(content, rng), image=name)
        for i in range(records_per_image)
        for name, content in train.items()
    ]
    files["vlm_single_train"] = [
        _record(f"{r['id']}-{i}", [turn], image=r["image"])
        for r in files["vlm_train"]
        for i, turn in enumerate(_turns(r))
    ]
    for i in range(len(files["vlm_train"]) // IMAGES_PER_TEXT):
        system, turns = _told(asker, questions_per_record, rng)
        files["vlm_train"].append(_record(f"told-{i:05d}", turns, system=system))
    files |= _test_records(test, asker, questions_per_record, rng)
    shown = (train | test | dense).items()
    files["contents"] = {name: dataclasses.asdict(content) for name, content in shown}
    files["world"] = {name: t.tolist() for name, t in dataclasses.asdict(world).items()}
    for name, content in files.items():
        write_whole(directory / f"{name}.json", json.dumps(content, separators=(",", ":")))
    write_tokenizer(directory / "tokenizer")


def _ask(
    asker: questions.Asker, count: int, content: Scene | Sheet, rng: np.random.Generator
) -> list[questions.Turn]:
    if isinstance(content, Scene):
        return asker.ask(content, count, rng)
    return asker.read(content, count, rng)


def _encoder_records(
    shown: dict[str, Scene | Sheet], ask: Ask, rng: np.random.Generator
) -> list[Record]:
    """A listing of all slots and the ordinary questions about each image."""
    return [
        _record(name, [questions.listing(content), *ask(content, rng)], image=name)
        for name, content in shown.items()
    ]


def _test_records(
    shown: dict[str, Scene | Sheet], asker: questions.Asker, count: int, rng: np.random.Generator
) -> dict[str, list[Record]]:
    """`count` questions about each scene and about each sheet; of a sheet, relations for the reasoning family as well."""
    reasoning, ocr = [], []
    for name, content in shown.items():
        if isinstance(content, Scene):
            reasoning.append(_record(name, asker.ask(content, count, rng), image=name))
            continue
        asked = asker.read(content, count, rng, questions.TEST_RELATED_SHARE)
        ocr.append(_record(name, asked, image=name))
        asked = asker.relations(content, count // SCENE_QUESTIONS, rng)
        reasoning.append(_record(name, asked, image=name))
    return {"reasoning_test": reasoning, "ocr_test": ocr}


def _text_records(
    count: int, asker: questions.Asker, questions_per_record: int, rng: np.random.Generator
) -> list[Record]:
    """Questions about scenes and sheets, in turn, that the system message describes in words."""
    records = []
    for i in range(count):
        if i % 2:
            told = TOLD[i // 2 % len(TOLD)]
            system, turns = asker.note(questions_per_record, told, rng)
        else:
            system, turns = _told(asker, questions_per_record, rng)
        records.append(_record(f"text-{i:06d}", turns, system=system))
    return records


def _told(
    asker: questions.Asker, count: int, rng: np.random.Generator
) -> tuple[str, list[questions.Turn]]:
    """A scene in words, and `count` questions about it."""
    scene = scenes.sample_scene(rng)
    return questions.caption(scene), asker.ask(scene, count, rng)


def _write_images(
    directory: pathlib.Path,
    split: str,
    count: int,
    kinds: tuple[int, ...],
    rng: np.random.Generator,
) -> dict[str, Scene | Sheet]:
    """Draws and saves `count` images, with the kinds in turn; returns name -> content."""
    shown: dict[str, Scene | Sheet] = {}
    for i in range(count):
        side = kinds[i % len(kinds)]
        content = scenes.sample_sheet(side, rng) if side else scenes.sample_scene(rng)
        name = f"images/{split}-{i:05d}.png"
        Image.fromarray(rendering.draw(content, rng)).save(directory / name, compress_level=1)
        shown[name] = content
    return shown


def _record(name: str, turns: list[questions.Turn], image: str = "", system: str = "") -> Record:
    """One LLaVA-format record; the image is in the first turn."""
    identity = name.removeprefix("images/").replace(".png", "")
    conversations = [{"from": "system", "value": system}] if system else []
    for i, (question, answer) in enumerate(turns):
        mark = "<image>\n" if image and i == 0 else ""
        conversations.append({"from": "human", "value": mark + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": identity} | ({"image": image} if image else {}) | {"conversations": conversations}


def _turns(record: Record) -> list[questions.Turn]:
    said = [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def write_tokenizer(directory: pathlib.Path) -> None:
    """A word-level tokenizer of the world's words, split at white space."""
    vocabulary = [*SPECIALS, *TEMPLATE_WORDS, *dict.fromkeys(questions.words())]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIALS))
    bos = ("<s>", SPECIALS.index("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "model_max_length": 4096, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    write_whole(directory / "tokenizer_config.json", json.dumps(settings, indent=1))
