"""The Python that the documents print: the five lines of README and guide are taken out and run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from askable import write_run
from PIL import Image

import vlm_jax
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: str) -> list[str]:
    return BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))


def test_readme_and_guide_open_with_the_same_five_lines():
    lines = [line for line in blocks("README.md")[0].splitlines() if line]
    assert len(lines) == 5 and lines[0] == "import vlm_jax"
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert blocks("docs/guide.md")[0] == blocks("README.md")[0]
    assert guide.index("```python") < 100


def test_the_five_lines_run_as_printed(tmp_path):
    world = tiny.write(tmp_path / "data")
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs" / "instruct", world)
    Image.open(world / "images" / "red.png").convert("RGB").save(tmp_path / "photo.jpg")
    run = subprocess.run(
        [sys.executable, "-c", blocks("README.md")[0]], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), **os.environ},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    answer, many = run.stdout.splitlines()
    assert answer and many.startswith("[") and many.count("'") + many.count('"') == 4
    with Image.open(tmp_path / "map.png") as image:
        assert min(image.size) > 300


def test_the_guide_s_calls_name_functions_configs_and_fields_that_exist():
    _, calls = blocks("docs/guide.md")
    assert set(re.findall(r"vlm_jax\.(\w+)", calls)) <= set(vlm_jax.__all__)
    name, fields = re.search(r'start\(\s*"(\w+)", "[^"]+", (\w+)=', calls).groups()
    cli.check_overrides([f"--config={name}", f"--config.{fields.replace('__', '.')}=x"])


def test_a_wrong_value_of_a_field_is_a_config_error_and_one_path_is_a_list_of_one(tmp_path):
    with pytest.raises(ConfigError, match=r"start: train__num_steps=10.5"):
        vlm_jax.start("stage1", tmp_path / "run", train__num_steps=10.5)
    with pytest.raises(ConfigError, match=r"no-such.json' does not exist"):
        vlm_jax.start(
            "stage1", tmp_path / "run", data__annotations="no-such.json", data__image_roots=""
        )


@pytest.mark.parametrize("name", ["stage1", "stage2", "mini"])
def test_a_config_is_found_by_its_name_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train" in cli.load_config(name)
