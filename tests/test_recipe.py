"""README's recipe: each of its vlm_jax commands runs as printed on tiny models in the places of the hub's; one step per training."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import tiny
from PIL import Image
from test_demo_model import tiny_decoder

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--config.train.num_steps=1", "--config.data.batch_size=2"]


def recipe() -> list[list[str]]:
    """The words of each line of README's block of shell commands; lines that end in a backslash go on."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


def write_files(root: Path) -> None:
    """What the downloads of the recipe leave, in small."""
    hf_models.vision("Siglip", image_size=64, num_hidden_layers=24).save_pretrained(root / "siglip")
    tiny_decoder(root / "qwen")
    shown = {"pretrain": ("pretrain", "00000/000000010.jpg"), "instruct": ("instruct/train2017", "000000033471.jpg")}  # fmt: skip
    files = {"pretrain": "blip_laion_cc_sbu_558k.json", "instruct": "llava_instruct_150k.json"}
    for name, (folder, image) in shown.items():
        path = root / folder / image
        path.parent.mkdir(parents=True)
        Image.new("RGB", (80, 60), (200, 30, 30)).save(path)
        records = [tiny.record(str(i), ["What is this?\n<image>", "A red wall."], image) for i in range(2)]  # fmt: skip
        (root / name / files[name]).write_text(json.dumps(records))
    Image.new("RGB", (90, 60), (30, 30, 200)).save(root / "photo.jpg")


def test_the_recipe_names_what_it_downloads():
    lines = recipe()
    programs = [words[0] for words in lines]
    assert programs == ["python3", "hf", "hf", "hf", "hf", "curl", "python", "python", "python", "python"]  # fmt: skip
    made = {words[words.index("--local-dir") + 1] for words in lines if "--local-dir" in words}
    assert made == {"siglip", "qwen", "pretrain", "instruct"}


@pytest.mark.slow
def test_every_command_of_the_recipe_runs(tmp_path):
    write_files(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = {}
    for words in recipe():
        if words[:2] != ["python", "-m"]:
            continue
        command = [sys.executable, *words[1:], *(SMALL if words[2] == "vlm_jax.train" else [])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, input="And the colour?\n")  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-2000:])
        said[words[2]] = done.stdout
    assert set(said) == {"vlm_jax.train", "vlm_jax.ask", "vlm_jax.chat"}
    model = json.loads((tmp_path / "runs" / "instruct" / "config.json").read_text())["model"]
    assert model["compressor"]["stride"] == 4 and model["lm"]["lora_rank"] == 128
    assert all((tmp_path / "runs" / name / "final.json").is_file() for name in ("align", "instruct"))  # fmt: skip
