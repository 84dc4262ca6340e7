"""Pickled weights to safetensors: which files, in which of torch's formats, whole or not at all, with one line for a mistake."""

import json
import os
import shutil
from pathlib import Path

import hf_models
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_hf_export import convert, tensors  # noqa: F401 (a fixture)
from test_hf_parity import load

INDEX = "pytorch_model.bin.index.json"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture(scope="module")
def safe(tmp_path_factory):
    return hf_models.build("llama, grouped queries", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def pickled(safe, tmp_path):
    """The same model in two pickles with an index, and what a training run leaves beside them."""
    folder = Path(shutil.copytree(safe, tmp_path / "pickled"))
    weights = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save({"model.mm_projector.0.bias": torch.ones(3)}, folder / "mm_projector.bin")
    torch.save({"step": Path("x")}, folder / "training_args.bin")
    torch.save([1, 2], folder / "optimizer.pt")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def refused(convert, capsys, given: Path, out: Path) -> str:  # noqa: F811
    """The one line of an error, after which nothing lies where the directory would."""
    assert convert("--from-bin", given, out) == 2
    assert not [path for path in out.parent.iterdir() if path.name.startswith(out.name)]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and len(said) < 600, said
    return said


def test_the_files_that_the_index_names_are_taken_and_no_others(pickled, safe, tmp_path, convert, caplog):  # noqa: F811  # fmt: skip
    with caplog.at_level("INFO"):
        assert convert("--from-bin", pickled, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model-00001-of-00002.safetensors",
        "pytorch_model-00002-of-00002.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    assert "left behind: mm_projector.bin, optimizer.pt, training_args.bin" in caplog.text
    before, after = tensors(safe), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    load(tmp_path / "out", ("lm",))
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(model.model.norm.weight.detach(), before["model.norm.weight"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_both_formats_of_torch_are_read(zipped, safe, tmp_path, convert):  # noqa: F811
    folder = Path(shutil.copytree(safe, tmp_path / "one"))
    weights = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights[
        "model.embed_tokens.weight"
    ]  # one storage, as tied weights have
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    torch.save({"step": Path("x")}, folder / "training_args.bin")
    assert convert("--from-bin", folder, tmp_path / "out") == 0
    after = load_file(tmp_path / "out" / "pytorch_model.safetensors")
    assert after.keys() == weights.keys()
    assert all(np.array_equal(weights[name], after[name]) for name in weights)


def test_a_projector_that_is_all_there_is_is_converted(tmp_path, convert):  # noqa: F811
    (tmp_path / "given").mkdir()
    torch.save({"model.mm_projector.weight": torch.ones(2, 3)}, tmp_path / "given" / "mm_projector.bin")  # fmt: skip
    assert convert("--from-bin", tmp_path / "given", tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / "mm_projector.safetensors").keys() == {"model.mm_projector.weight"}  # fmt: skip


class Attack:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def first_shard_is_missing(folder):
    (folder / SHARDS[0]).unlink()


def second_shard_is_cut(folder):
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-200])


def second_shard_is_no_pickle(folder):
    (folder / SHARDS[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def second_shard_runs_code(folder):
    torch.save({"x": Attack(str(folder / "hacked"))}, folder / SHARDS[1])


def second_shard_is_a_list(folder):
    torch.save([torch.ones(2)], folder / SHARDS[1])


def second_shard_holds_a_state(folder):
    torch.save({"state_dict": {"x": torch.ones(2)}}, folder / SHARDS[1])


def a_tensor_is_missing(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.ghost"] = SHARDS[0]
    (folder / INDEX).write_text(json.dumps(index))


def a_tensor_stands_twice(folder):
    torch.save(torch.load(folder / SHARDS[0]), folder / SHARDS[1])


def the_index_is_no_json(folder):
    (folder / INDEX).write_text("{")


def the_index_leads_elsewhere(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../x.bin"}}))


def nothing_is_named(folder):
    (folder / INDEX).unlink()


def safetensors_are_there(folder):
    (folder / "model.safetensors").write_bytes(b"")


MISTAKES = {
    first_shard_is_missing: f"lacks 1 of 2 weight files of {INDEX}: {SHARDS[0]}; download them again.",
    second_shard_is_cut: f"{SHARDS[1]}' cannot be read as plain weights: ",
    second_shard_is_no_pickle: f"{SHARDS[1]}' cannot be read as plain weights: ",
    second_shard_runs_code: f"{SHARDS[1]}' cannot be read as plain weights: it asks for posix.mkdir, which is no tensor.",
    second_shard_is_a_list: f"{SHARDS[1]}' holds more than tensors; it is no model's weights.",
    second_shard_holds_a_state: f"{SHARDS[1]}' holds more than tensors; it is no model's weights.",
    a_tensor_is_missing: f"{INDEX}' names model.ghost (1 tensors), which its files do not hold; download them again.",
    a_tensor_stands_twice: "lm_head.weight stands in pytorch_model-00001-of-00002.safetensors and in pytorch_model-00002-of-",
    the_index_is_no_json: f"{INDEX}' is no valid JSON",
    the_index_leads_elsewhere: f"{INDEX}' names '../x.bin', outside its directory.",
    nothing_is_named: f"has neither {INDEX} nor pytorch_model.bin, but mm_projector.bin, optimizer.pt, {SHARDS[0]}, ",
    safetensors_are_there: "holds safetensors files already; use it as it is.",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, pickled, tmp_path, convert, capsys):  # noqa: F811
    mistake(pickled)
    assert MISTAKES[mistake] in refused(convert, capsys, pickled, tmp_path / "out")
    assert not (pickled / "hacked").exists()


def test_a_directory_that_is_not_there_is_named(tmp_path, convert, capsys):  # noqa: F811
    assert "is no directory." in refused(convert, capsys, tmp_path / "nowhere", tmp_path / "out")
