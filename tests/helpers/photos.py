"""A small real input, written at test time: JPEG photographs that ship inside three wheels, dialogues about them, a tokenizer.

`write(directory)` makes

    directory/images/*.jpg       twelve photographs, 200 x 200 to 1000 x 872, landscape, portrait and square, two of them grey
    directory/captions.json      stage 1: one caption per photograph
    directory/dialogues.json     stage 2: one question, several turns, two images, no image
    directory/tokenizer/         a byte-level BPE trained on these texts, as a Hugging Face directory
"""

import importlib.util
import json
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# name -> wheel, path inside it, caption
PHOTOS = {
    "cat": ("skimage", "data/chelsea.png", "A ginger cat looks into the camera."),
    "coffee": ("skimage", "data/coffee.png", "A cup of espresso on a wooden table."),
    "astronaut": ("skimage", "data/astronaut.png", "An astronaut in an orange suit."),
    "rocket": ("skimage", "data/rocket.jpg", "A rocket on its launch pad at dusk."),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", "Distant galaxies on black sky."),
    "motorcycle": ("skimage", "data/motorcycle_left.png", "A motorcycle in a garage."),
    "coins": ("skimage", "data/coins.png", "Four rows of old coins."),
    "camera": ("skimage", "data/camera.png", "A man films with a camera on a tripod."),
    "chessboard": ("skimage", "data/chessboard_RGB.png", "A black and white chessboard."),
    "temple": ("sklearn", "datasets/images/china.jpg", "A Chinese temple behind trees."),
    "dahlia": ("sklearn", "datasets/images/flower.jpg", "A red and yellow dahlia."),
    "admiral": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "A navy officer before a flag."),
}  # fmt: skip

# images, then question and answer in turn; <image> stands where the record has pictures
DIALOGUES = (
    (["cat"], "<image>\nWhat animal is this?", "A cat.", "What colour is it?", "Ginger.", "Is it asleep?", "No."),
    (["coffee"], "<image>\nWhat is in the cup?", "Espresso."),
    (["astronaut"], "<image>\nWho is this?", "An astronaut.", "What does she wear?", "An orange suit."),
    (["rocket"], "<image>\nWhat is this?", "A rocket.", "When was it taken?", "At dusk."),
    (["temple"], "What is this?\n<image>", "A Chinese temple."),
    (["dahlia"], "<image>\nWhat is this?", "A dahlia, red and yellow."),
    (["admiral"], "<image>\nWho is this?", "A navy officer."),
    (["coins"], "<image>\nHow many rows of coins are there?", "Four."),
    (["cat", "coffee"], "<image>\n<image>\nWhich photo shows a cat?", "The first."),
    (["coffee", "cat"], "<image>\n<image>\nWhich photo shows a cat?", "The second.", "And the other?", "Coffee."),
    ([], "What is the capital of France?", "Paris.", "And of Italy?", "Rome."),
    ([], "Who wrote Hamlet?", "William Shakespeare."),
)  # fmt: skip

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")
SYSTEM = "Answer briefly."


def write(directory: Path) -> None:
    (directory / "images").mkdir(parents=True)
    for name, (wheel, path, _) in PHOTOS.items():
        photo = Image.open(Path(importlib.util.find_spec(wheel).origin).parent / path)
        photo.convert("L" if photo.mode == "L" else "RGB").save(
            directory / "images" / f"{name}.jpg", quality=90
        )
    captions = [
        record(name, [name], "<image>\nDescribe the photo.", caption)
        for name, (_, _, caption) in PHOTOS.items()
    ]
    dialogues = [record(f"dialogue-{i}", *one) for i, one in enumerate(DIALOGUES)]
    (directory / "captions.json").write_text(json.dumps(captions))
    (directory / "dialogues.json").write_text(json.dumps(dialogues))
    texts = [m["value"] for r in captions + dialogues for m in r["conversations"]]
    write_tokenizer(directory / "tokenizer", [*texts, SYSTEM, "USER: ASSISTANT: image"])


def record(name: str, images: list[str], *said: str) -> dict:
    paths = [f"images/{image}.jpg" for image in images]
    image = {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
    roles = ("human", "gpt")
    conversations = [{"from": roles[i % 2], "value": value} for i, value in enumerate(said)]
    return {"id": name, **image, "conversations": conversations}


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", SPECIALS.index("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
