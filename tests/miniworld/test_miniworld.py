"""The embedded benchmark: every gold answer is derived again from the saved contents and tables alone."""

import collections
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from vlm_jax.miniworld import generate, questions, rendering, scenes
from vlm_jax.settings.checks import ConfigError

SIZES = dict(num_train_images=400, num_test_images=160, num_encoder_images=80, num_text_records=400)
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "white"]
GROUNDS = ["sand", "moss", "slate", "coal", "brick", "lake", "navy", "plum"]
ENTITIES = [
    "ant",
    "bee",
    "cat",
    "dog",
    "eel",
    "fox",
    "gnu",
    "hen",
    "ibex",
    "jay",
    "koi",
    "lynx",
    "mole",
    "newt",
    "owl",
    "pig",
]
RELATIONS = ["friend", "rival", "cousin", "guest", "guard", "tutor", "pilot", "baker"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("miniworld")
    generate.write(directory, seed=3, **SIZES)
    return directory


def load(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def turns(record):
    said = [m for m in record["conversations"] if m["from"] != "system"]
    assert [m["from"] for m in said] == ["human", "gpt"] * (len(said) // 2)
    return [(q["value"], a["value"]) for q, a in zip(said[::2], said[1::2], strict=True)]


CHARACTERS = "ABCDEFHJKLMNPRSTUVXZ"


def gold(question, colour, wall, floor, world):
    """The answer from the tables, by another road than the generator's: words are looked up one by one."""
    words = question.split()
    if words[0] == "shape's":
        at = COLOURS.index(colour)
        for word in words[1:]:
            entity = world["relation"][RELATIONS.index(word.removesuffix("'s"))][at]
            at = 8 + entity
        return ENTITIES[entity]
    first, second, about = words
    if about == "shape":
        attribute = COLOURS.index(colour)
    else:
        attribute = 8 + GROUNDS.index({"wall": wall, "floor": floor}[about])
    return ENTITIES[world["fact"][ENTITIES.index(first)][ENTITIES.index(second)][attribute]]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path):
    small = dict(num_train_images=16, num_test_images=8, num_encoder_images=8, num_text_records=8)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate.write(tmp_path / name, seed=seed, **small)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 32 + 8 + 2
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    differing = [
        str(f)
        for f in files
        if (tmp_path / "a" / f).read_bytes() != (tmp_path / "c" / f).read_bytes()
    ]
    assert len(differing) == 32 + 8  # only the tokenizer is the same in every world


def gold_of_sheet(question, characters, world):
    """The same for a sheet; characters: by square."""
    asked, square = question.split()
    if asked == "read":
        return characters[square]
    row = 8 + 16 + CHARACTERS.index(characters[square])
    return ENTITIES[world["relation"][RELATIONS.index(asked)][row]]


def slot(square: str) -> int:
    """c5 -> raster number: column c, row 5 from the top."""
    return 8 * (int(square[1]) - 1) + "abcdefgh".index(square[0])


@pytest.mark.parametrize(
    "name", ["vlm_train", "vlm_single_train", "encoder_train", "reasoning_test", "ocr_test"]
)
def test_gold_answers_follow_from_the_saved_contents(folder, name):
    contents, world = load(folder, "contents"), load(folder, "world")
    for record in load(folder, name):
        if "image" not in record:
            continue
        shown = contents[record["image"]]
        for i, (question, answer) in enumerate(turns(record)):
            assert question.startswith("<image>\n") == (i == 0)
            question = question.removeprefix("<image>\n")
            if question == "list":
                continue
            assert len(answer.split()) == 1
            if "colour" in shown:
                assert answer == gold(
                    question, shown["colour"], shown["wall"], shown["floor"], world
                )
            else:
                square = question.split()[1]
                told = {square: shown["characters"][slot(square)]}
                assert answer == gold_of_sheet(question, told, world)


def test_text_only_questions_follow_from_what_is_told_and_the_same_tables(folder):
    world, records = load(folder, "world"), load(folder, "text_train")
    assert len(records) == SIZES["num_text_records"]
    scenes_told, lengths = 0, collections.Counter()
    for record in records:
        assert "image" not in record
        system = record["conversations"][0]
        assert system["from"] == "system"
        told = system["value"].split()
        assert len(turns(record)) == 8
        scenes_told += told[-1] == "floor"
        sheet = dict(zip(told[::2], told[1::2], strict=False))
        for question, answer in turns(record):
            if told[-1] == "floor":
                assert answer == gold(question, told[0], told[2], told[4], world)
            else:
                assert answer == gold_of_sheet(question, sheet, world)
        lengths[len(sheet) if told[-1] != "floor" else 0] += 1
    assert lengths == {0: 200, 1: 50, 2: 50, 4: 50, 8: 50}
    assert scenes_told == len(records) / 2


def test_one_training_record_in_nine_is_a_scene_told_in_words(folder):
    world, records = load(folder, "world"), load(folder, "vlm_train")
    told = [r for r in records if "image" not in r]
    assert len(told) == len(records) // 9
    for record in told:
        words = record["conversations"][0]["value"].split()
        assert record["conversations"][0]["from"] == "system" and words[-1] == "floor"
        for question, answer in turns(record):
            assert answer == gold(question, words[0], words[2], words[4], world)


def test_listings_name_every_slot_in_raster_order(folder):
    contents = load(folder, "contents")
    for record in load(folder, "encoder_train"):
        shown, (question, answer) = contents[record["image"]], turns(record)[0]
        slots = answer.split()
        assert question == "<image>\nlist"
        assert len(slots) == 64
        if "side" in shown:
            assert slots == list(shown["characters"])
            block = 8 // shown["side"]
            grid = np.array(slots).reshape(8, 8)
            for row, column in np.ndindex(8, 8):
                assert grid[row, column] == grid[row // block * block, column // block * block]
        else:
            upper, lower = set(slots[:32]), set(slots[32:])
            assert upper <= {shown["colour"], shown["wall"]} and lower <= {
                shown["colour"],
                shown["floor"],
            }
            assert shown["wall"] in upper and shown["floor"] in lower
            middle = [round(shown[k] + shown["size"] / 2) // 8 for k in ("top", "left")]
            assert slots[8 * middle[0] + middle[1]] == shown["colour"]


def test_pictures_show_what_the_contents_say(folder):
    for name, shown in load(folder, "contents").items():
        image = np.asarray(Image.open(folder / name)).astype(float)
        assert image.shape == (64, 64, 3)
        if "colour" in shown:
            row, column = (round(shown[k] + shown["size"] / 2) for k in ("top", "left"))
            seen = image[row - 2 : row + 2, column - 2 : column + 2].mean((0, 1))
            assert np.abs(seen - scenes.COLOURS[shown["colour"]]).max() < 20
            aside = 60 if shown["left"] + shown["size"] < 60 else 0  # a column without the shape
            if aside or shown["left"] > 4:
                for ground, rows in (("wall", slice(0, 32)), ("floor", slice(32, 64))):
                    seen = image[rows, aside : aside + 4].mean((0, 1))
                    assert np.abs(seen - scenes.GROUNDS[shown[ground]]).max() < 20
            continue
        dark, bright = np.percentile(image, 10), np.percentile(image, 95)
        for i, character in enumerate(shown["characters"][:16]):
            patch = image[i // 8 * 8 :, i % 8 * 8 :][:8, :8].mean(2)
            ink = rendering.GLYPHS[scenes.CHARACTERS.index(character)].sum()
            inked = (
                patch > (dark + bright) / 2
            ).sum()  # bright pixels: the glyph's, give or take noise
            assert abs(int(inked) - int(ink)) <= 16, (name, i)


def test_characters_are_pairwise_different_bitmaps():
    flat = rendering.GLYPHS.reshape(20, -1)
    distance = (flat[:, None] != flat[None]).sum(-1) + 100 * np.eye(20, dtype=int)
    assert distance.min() >= 3


def test_no_test_image_is_a_training_image(folder):
    digests = collections.defaultdict(set)
    for path in sorted((folder / "images").iterdir()):
        digests[path.name.split("-")[0]].add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert (len(digests["train"]), len(digests["test"])) == (400, 160)
    assert not digests["train"] & digests["test"]
    named = {r["image"] for name in ("reasoning_test", "ocr_test") for r in load(folder, name)}
    assert named == {f"images/test-{i:05d}.png" for i in range(160)}
    assert all("/train-" in r["image"] for r in load(folder, "vlm_train") if "image" in r)


def test_most_training_images_are_dense_sheets_which_are_rarer_in_the_test(folder):
    contents = load(folder, "contents")

    def sides(split):
        return collections.Counter(v.get("side") for k, v in contents.items() if f"/{split}-" in k)

    assert sides("train") == {None: 100, 1: 25, 2: 75, 4: 100, 8: 100}
    assert sides("test") == {None: 80, 1: 30, 2: 25, 4: 15, 8: 10}


def test_each_record_has_its_number_of_turns_and_its_own_id(folder):
    vlm, single = load(folder, "vlm_train"), load(folder, "vlm_single_train")
    shown = [r for r in vlm if "image" in r]
    assert len(shown) == 3 * 400 and {len(turns(r)) for r in vlm} == {8}
    assert len(single) == 8 * len(shown) and {len(turns(r)) for r in single} == {1}
    assert {len(turns(r)) for r in load(folder, "ocr_test")} == {8}
    of_sheets = {r["id"] for r in load(folder, "ocr_test")}
    for record in load(folder, "reasoning_test"):
        asked = [q.removeprefix("<image>\n").split()[0] for q, _ in turns(record)]
        if record["id"] in of_sheets:
            assert len(asked) == 2 and set(asked) <= set(RELATIONS)
        else:
            assert len(asked) == 8
    for records in (vlm, single, load(folder, "text_train")):
        assert len({r["id"] for r in records}) == len(records)
    packed = [(r["image"], q.removeprefix("<image>\n"), a) for r in shown for q, a in turns(r)]
    assert packed == [
        (r["image"], *(x.removeprefix("<image>\n") for x in turns(r)[0])) for r in single
    ]


def test_question_kinds_have_their_shares_and_frequent_facts_come_first(folder):
    asked = [q.split() for r in load(folder, "text_train") for q, _ in turns(r)]
    of_sheets = [q for q in asked if len(q) == 2 and q[1][1:].isdecimal()]
    assert abs(np.mean([q[0] == "read" for q in of_sheets]) - 0.75) < 0.033
    asked = [q for q in asked if q not in of_sheets]
    chains = [q for q in asked if q[0] == "shape's"]
    assert abs(len(chains) / len(asked) - 0.45) < 0.038  # 1600 questions: 3 standard errors
    assert abs(np.mean([len(q) == 3 for q in chains]) - 0.5) < 0.05
    about = collections.Counter(q[2] for q in asked if q not in chains)
    for word, share in (("shape", 0.5), ("wall", 0.25), ("floor", 0.25)):
        assert abs(about[word] / sum(about.values()) - share) < 0.05
    weight = np.sort(scenes.make_world(3).fact_weight.reshape(-1))[::-1]
    np.testing.assert_allclose(weight[[0, 9, 4095]], [1.0, 1 / 10, 1 / 4096])
    asker, rng = questions.Asker(scenes.make_world(3)), np.random.default_rng(0)
    scene = scenes.Scene("red", "moss", "sand", "disc", 30, 0, 0)
    drawn = [asker.ask(scene, 1, rng)[0][0] for _ in range(8000)]
    facts = collections.Counter(q for q in drawn if q.endswith("shape"))
    weights = asker.world.fact_weight[:, :, 0]
    heaviest = np.unravel_index(weights.argmax(), weights.shape)
    assert facts.most_common(1)[0][0] == f"{ENTITIES[heaviest[0]]} {ENTITIES[heaviest[1]]} shape"
    share = weights.max() / weights.sum()
    assert abs(facts.most_common(1)[0][1] / sum(facts.values()) - share) < 4 * np.sqrt(share / 2200)


def test_guessing_without_the_image_stays_at_chance(folder):
    ocr = [a for r in load(folder, "ocr_test") for _, a in turns(r)]
    assert 0.90 < 1 - max(collections.Counter(ocr).values()) / len(ocr) < 0.95
    reasoning = [a for r in load(folder, "reasoning_test") for _, a in turns(r)]
    assert 0.85 < 1 - max(collections.Counter(reasoning).values()) / len(reasoning) < 0.94


def test_the_tokenizer_has_one_token_for_every_word(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    names = ("encoder_train", "vlm_train", "text_train", "reasoning_test", "ocr_test")
    said = [
        m["value"].replace("<image>", "")
        for n in names
        for r in load(folder, n)
        for m in r["conversations"]
    ]
    words = {word for text in said for word in text.split()} | {
        "USER:",
        "ASSISTANT:",
        "image",
        "</s>",
        "<s>",
        "<pad>",
    }
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and ids[0] != tokenizer.unk_token_id, word
    text = "USER: shape's friend's rival ASSISTANT: fox</s>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 7 and ids[-1] == tokenizer.eos_token_id
    assert (
        tokenizer.decode(ids, skip_special_tokens=True)
        == "USER: shape's friend's rival ASSISTANT: fox"
    )
    assert tokenizer("nonsense", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize("count", [0, 12, -8])
def test_uneven_image_counts_are_refused(tmp_path, count):
    with pytest.raises(
        ConfigError, match=rf"num_train_images {count} is not a positive multiple of 8"
    ):
        generate.write(tmp_path, seed=0, num_train_images=count)


def test_the_generator_never_imports_jax():
    code = (
        "import sys; from vlm_jax.miniworld import generate; assert 'jax' not in sys.modules, 'jax'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
