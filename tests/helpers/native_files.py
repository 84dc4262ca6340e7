"""Tiny benchmark files in their native formats: FIXTURES has a builder for every benchmark.

A builder writes a few questions and their pictures into a folder and returns what `rows` takes as annotations.
"""

import base64
import csv
import io
import json

import pyarrow
import pyarrow.parquet
from PIL import Image


def png(value=0):
    data = io.BytesIO()
    Image.new("RGB", (3, 2), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def base64_png(value=0):
    return base64.b64encode(png(value)).decode()


def embedded(value=0):
    """A picture as the hub's parquet files hold it."""
    return {"bytes": png(value), "path": None}


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path, content):
    write_text(path, json.dumps(content, ensure_ascii=False))


def write_lines(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tsv(path, columns, lines):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([columns, *lines])


def write_parquet(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def write_shards(directory, split, records, images):
    """`records` with the pictures at `images` in two parquet files, as the hub ships them."""
    full = [
        {**record, "image": {"bytes": image.read_bytes(), "path": image.name}}
        for record, image in zip(records, images, strict=True)
    ]
    for i, part in enumerate((full[:1], full[1:])):
        write_parquet(directory / "data" / f"{split}-{i:05d}-of-00002.parquet", part)


def golds(*groups):
    """("a", 3), ("b", 7) -> ten answers."""
    return [text for text, count in groups for _ in range(count)]


def humans(*groups):
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(golds(*groups), 1)]  # fmt: skip


def dialogue(*said, image=None, name=None, system=None):
    messages = [{"from": "system", "value": system}] if system else []
    messages += [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)]
    record = {"conversations": messages}
    return record | ({"id": name} if name else {}) | ({"image": image} if image else {})


def llava(directory):
    """Two turns about a picture and a question without an answer; then a text alone."""
    picture(directory / "0.jpg")
    records = [
        dialogue("<image>\nWhat?", "A cat.", "Where?", "At home.", "Why?", image="0.jpg", name="r"),
        dialogue("Hello", "Hi"),
    ]
    write_json(directory / "any.json", records)
    return directory


def mini(directory):
    """Two pictures with two questions each, for both families."""
    for i in range(2):
        picture(directory / "images" / f"{i}.png")
    for family in ("reasoning", "ocr"):
        records = [
            dialogue("<image>\nread a1", "q", "read b2", "z", image="images/0.png", name="s0"),
            dialogue("<image>\nread c3", "k", "read d4", "w", image="images/1.png", name="s1"),
        ]
        write_json(directory / f"{family}_test.json", records)
    return directory


def llava_questions(directory):
    """Two questions about one picture, one without."""
    picture(directory / "count" / "1.png")
    lines = [
        {"question_id": "count/1.png", "image": "count/1.png", "text": "Two?", "category": "count"},
        {"question_id": "count/1.png", "image": "count/1.png", "text": "Three?"},
        {"question_id": 7, "text": "Why?"},
    ]
    write_lines(directory / "llava_mme.jsonl", lines)
    return directory


def gqa(directory):
    questions = {
        "201307251": {"imageId": "n1", "question": "Is it a cat?", "answer": "no", "types": {}},
        "201307252": {"imageId": "n2", "question": "Who is tall?", "answer": "man"},
        "7": {"imageId": "n2", "question": "Where?", "answer": "left"},
    }
    write_json(directory / "testdev_balanced_questions.json", questions)
    for name in ("n1", "n2"):
        picture(directory / "images" / f"{name}.jpg")
    return directory


POPE_LABELS = {"random": "yynn", "popular": "yynn", "adversarial": "ynnn"}


def pope(directory):
    for split, labels in POPE_LABELS.items():
        lines = [
            {"question_id": i, "image": f"COCO_val2014_{i}.jpg", "text": "Is there a cat in the image?",
             "label": {"y": "yes", "n": "no"}[label]}
            for i, label in enumerate(labels, start=1)
        ]  # fmt: skip
        write_lines(directory / f"coco_pope_{split}.json", lines)
    for i in range(1, 5):
        picture(directory / "val2014" / f"COCO_val2014_{i}.jpg")
    return directory


MME_QUESTION = "Is there a {} here? Please answer yes or no."


def mme_task(directory, task, stem, split=False, suffix=".png"):
    """One picture's two questions; split: texts and pictures in folders of their own."""
    texts = directory / task / "questions_answers_YN" if split else directory / task
    picture((directory / task / "images" if split else texts) / f"{stem}{suffix}")
    lines = [MME_QUESTION.format("cat") + "\tYes", MME_QUESTION.format("dog") + "\tNo"]
    write_text(texts / f"{stem}.txt", "\n".join(lines) + "\n")


def mme(directory):
    """Two pictures of `count` in one folder, one of `posters` in two folders, one of a cognition task."""
    mme_task(directory, "count", "0001")
    mme_task(directory, "count", "0002")
    mme_task(directory, "posters", "tt01", split=True, suffix=".jpg")
    mme_task(directory, "code_reasoning", "0001")
    return directory


def science_problem(answer, image=None, hint="", choices=("red", "blue", "green")):
    return {
        "question": "Which?", "choices": list(choices), "answer": answer, "hint": hint, "image": image, "split": "test",
    }  # fmt: skip


def scienceqa(directory):
    problems = {
        "4": science_problem(0, "image.png", "See the picture."),
        "5": science_problem(1),
        "11": science_problem(2, "image.png"),
        "12": science_problem(1, hint="Read.", choices=("a", "b")),
        "9": science_problem(1),
    }
    write_json(directory / "problems.json", problems)
    splits = {"train": ["9"], "val": [], "test": ["4", "5", "11", "12"]}
    write_json(directory / "pid_splits.json", splits)
    for pid in ("4", "11"):
        picture(directory / "images" / "test" / pid / "image.png")
    return directory


def textvqa(directory):
    """Also with the OCR tokens."""

    def record(i, image, *groups):
        return {
            "question_id": 34602 + i, "image_id": image, "question": "what brand is it?", "answers": golds(*groups),
        }  # fmt: skip

    records = [
        record(0, "003a", ("nous les gosses", 4), ("dakota", 6)),
        record(1, "003a", ("dakota digital", 3), ("Dakota", 7)),
        record(2, "3af0", ("4", 10)),
    ]
    write_json(directory / "TextVQA_0.5.1_val.json", {"data": records})
    seen = [
        {"image_id": "003a", "ocr_tokens": ["DAKOTA", "DIGITAL"], "ocr_info": []},
        {"image_id": "3af0", "ocr_tokens": []},
    ]
    write_json(directory / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": seen})
    for name in ("003a", "3af0"):
        picture(directory / "train_images" / f"{name}.jpg")
    return directory


def vqav2(directory):
    questions = [
        {"image_id": 42 + i, "question": f"What is {i}?", "question_id": 42000 + i}
        for i in range(3)
    ]
    path = directory / "v2_OpenEnded_mscoco_val2014_questions.json"
    write_json(path, {"info": {}, "questions": questions})
    answers = [
        {"question_id": 42000, "answers": humans(("yes", 10)), "answer_type": "yes/no"},
        {"question_id": 42002, "answers": humans(("2", 7), ("3", 3)), "answer_type": "number"},
        {"question_id": 42001, "answers": humans(("no", 10)), "answer_type": "yes/no"},
    ]
    write_json(directory / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    for i in range(3):
        picture(directory / "val2014" / f"COCO_val2014_{42 + i:012d}.jpg")
    return directory


def vizwiz(directory):
    def record(i, kind, *groups):
        name = f"VizWiz_val_{i:08d}.jpg"
        picture(directory / "val" / name)
        return {
            "image": name, "question": "What is this?", "answers": humans(*groups), "answer_type": kind, "answerable": 1,
        }  # fmt: skip

    records = [
        record(0, "unanswerable", ("unanswerable", 8), ("unsuitable", 2)),
        record(1, "other", ("soup can", 1), ("can", 3), ("tin", 6)),
        record(2, "other", ("basil", 10)),
    ]
    write_json(directory / "val.json", records)
    return directory


MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip


def mmbench_line(index, question, options, answer, category="color", image=None, hint="nan"):
    cells = [*options, *[""] * (4 - len(options))]
    image = base64_png() if image is None else image
    return [
        index, question, hint, *cells, answer, category, image, "coco", f"{category}_l2", "", "dev",
    ]  # fmt: skip


# A question with three rotations and one with two.
MMBENCH_LINES = [
    mmbench_line(7, 'Which "one"?', ["x", "y", "z"], "A", hint="Look\nwell."),
    mmbench_line(8, "Two?", ["left", "right"], "B", category="place", image=base64_png(9)),
    mmbench_line(1_000_007, 'Which "one"?', ["z", "x", "y"], "B"),
    mmbench_line(2_000_007, 'Which "one"?', ["y", "z", "x"], "C", image="7"),
    mmbench_line(1_000_008, "Two?", ["right", "left"], "A", category="place", image=base64_png(9)),
]


def mmbench(directory):
    write_tsv(directory / "mmbench_dev_20230712.tsv", MMBENCH_COLUMNS, MMBENCH_LINES)
    return directory


def mmbench_cn(directory):
    """Without rotations."""
    write_tsv(directory / "mmbench_dev_cn_20231003.tsv", MMBENCH_COLUMNS, MMBENCH_LINES[:2])
    return directory


def mmmu_record(
    name, answer, question="See <image 1>. Which?", options="['x', \"it's\"]", images=1
):
    filled = {f"image_{k}": {"bytes": png(k), "path": f"{k}.png"} for k in range(1, images + 1)}
    empty = {f"image_{k}": None for k in range(images + 1, 8)}
    kind = "open" if options == "[]" else "multiple-choice"
    return {
        "id": name, "question": question, "options": options, "answer": answer, "question_type": kind, **filled, **empty,
    }  # fmt: skip


def mmmu(directory):
    """Two subjects, each in its own folder as on the hub; the second question has two pictures."""
    art = [
        mmmu_record("validation_Art_Theory_1", "B"),
        mmmu_record("validation_Art_Theory_2", "A", images=2),
    ]
    math = [mmmu_record("validation_Math_9", "['24/7', '3.429']", "How many <image 1>?", "[]")]
    write_parquet(directory / "Art_Theory" / "validation-00000-of-00001.parquet", art)
    write_parquet(directory / "Math" / "validation-00000-of-00001.parquet", math)
    return directory


def diagram(**change):
    record = {"question": "What?", "options": ["a root", "a leaf", "3", "d"], "answer": "1"}
    return record | {"image": {"bytes": png(), "path": "1.png"}} | change


def ai2d(directory):
    """Two shards."""
    write_parquet(directory / "data" / "test-00001-of-00002.parquet", [diagram(answer="3")])
    write_parquet(directory / "data" / "test-00000-of-00002.parquet", [diagram(), diagram()])
    return directory


def math_problem(pid, answer, **change):
    record = {
        "pid": pid, "question": "How many?", "choices": None, "unit": None, "precision": None, "answer": answer,
        "question_type": "free_form", "answer_type": "integer", "image": f"images/{pid}.jpg", "query": f"Q{pid}",
        "metadata": {"task": "figure question answering", "context": "bar chart"},
    }  # fmt: skip
    return record | change


def mathvista(directory):
    """A number, options, and options that are letters in another order."""
    options = {"question_type": "multi_choice", "answer_type": "text"}
    problems = [
        math_problem("1", "1.2", answer_type="float", precision=2.0),
        math_problem("2", "x", choices=["x", "y"], **options),
        math_problem("3", "7", metadata={"task": "geometry", "context": "bar chart"}),
        math_problem("4", "C", choices=["B", "C", "A"], **options),
    ]
    for problem in problems:
        picture(directory / problem["image"])
    write_json(directory / "testmini.json", {problem["pid"]: problem for problem in problems})
    return directory


def chartqa(directory):
    human = [
        {"imgname": "1.png", "query": "How many?", "label": "14"},
        {"imgname": "1.png", "query": "Is it?", "label": "Yes"},
    ]
    augmented = [{"imgname": "2.png", "query": "Share?", "label": "20%"}]
    write_json(directory / "test_human.json", human)
    write_json(directory / "test_augmented.json", augmented)
    for i in (1, 2):
        picture(directory / "png" / f"{i}.png")
    return directory


DOCUMENTS = [
    {"questionId": 11, "question": "What?", "image": "documents/a_1.png", "answers": ["The Cat", "cat"], "docId": 1},
    {"questionId": 12, "question": "When?", "image": "documents/a_1.png", "answers": ["1999"], "docId": 1},
]  # fmt: skip


def docvqa(directory):
    picture(directory / "documents" / "a_1.png")
    content = {"dataset_name": "docvqa", "data": DOCUMENTS}
    write_json(directory / "val_v1.0_withQT.json", content)
    return directory


def infovqa(directory):
    record = {"questionId": 65718, "question": "Who?", "image_local_name": "2.jpeg", "answers": ["Ann"]}  # fmt: skip
    picture(directory / "infographicsvqa_images" / "2.jpeg")
    write_json(directory / "infographicsVQA_val_v1.0_withQT.json", {"data": [record]})
    return directory


def seed_question(number, answer="A", kind="image", dimension=1, **change):
    record = {
        "question_id": str(number), "question": "What?", "choice_a": "w", "choice_b": "x", "choice_c": "y",
        "choice_d": "z", "answer": answer, "data_type": kind, "data_id": f"{number}_0", "question_type_id": dimension,
    }  # fmt: skip
    return record | change


def seed(directory):
    """Three questions about pictures, one about a video."""
    questions = [
        seed_question(101), seed_question(102, kind="video", dimension=10), seed_question(103, "D", dimension=2),
        seed_question(104, "B"),
    ]  # fmt: skip
    names = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    write_json(directory / "SEED-Bench.json", {"question_type": names, "questions": questions})
    for number in (101, 103, 104):
        picture(directory / "SEED-Bench-image" / f"{number}_0")
    return directory


def ocrbench(directory):
    names = [
        ("IIIT5K", "Regular Text Recognition", "JOINT"),
        ("FUNSD", "Key Information Extraction", ["1", "2"]),
    ]
    records = [
        {"dataset_name": d, "type": t, "question": " What? \n", "answers": a, "image_path": f"{d}/1.png"}
        for d, t, a in [*names, names[0]]
    ]  # fmt: skip
    for name, _, _ in names:
        picture(directory / "OCRBench_Images" / name / "1.png")
    write_json(directory / "OCRBench.json", records)
    return directory


def mmvet(directory):
    questions = {
        f"v1_{i}": {"imagename": f"v1_{i}.png", "question": f"Q{i}", "answer": "x"}
        for i in range(2)
    }
    for i in range(2):
        picture(directory / "images" / f"v1_{i}.png")
    write_json(directory / "mm-vet.json", questions)
    return directory


def llava_bench(directory):
    lines = [{"question_id": i, "image": "001.jpg", "text": f"Q{i}", "category": "conv"} for i in range(2)]  # fmt: skip
    picture(directory / "images" / "001.jpg")
    write_lines(directory / "questions.jsonl", lines)
    return directory


FIXTURES = {
    "llava": llava,
    "mini_reasoning": mini,
    "mini_ocr": mini,
    "llava_questions": llava_questions,
    "gqa": gqa,
    "pope": pope,
    "mme": mme,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "textvqa_ocr": textvqa,
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "mmbench": mmbench,
    "mmbench_cn": mmbench_cn,
    "mmmu": mmmu,
    "ai2d": ai2d,
    "mathvista": mathvista,
    "chartqa": chartqa,
    "docvqa": docvqa,
    "infovqa": infovqa,
    "seed": seed,
    "ocrbench": ocrbench,
    "mmvet": mmvet,
    "llava_bench": llava_bench,
}
