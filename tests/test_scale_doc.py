"""The commands of docs/scale.md: each parses, and its mesh divides the batch and every parameter on the machine it names."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from vlm_jax import sharding
from vlm_jax.models.vlm import shapes
from vlm_jax.settings import cli
from vlm_jax.storage import run as experiment

ROOT = Path(__file__).resolve().parents[1]
# What stands for the reader's own settings, and how many devices the machine of each section has.
OWN = {"DATA": "", "INIT": "", "...": "--config=configs/stage2.py --workdir=runs/a"}
DEVICES = {"From a laptop to a TPU pod": 256, "One GPU": 1, "Eight GPUs, one or more nodes": 32, "TPU pod": 256}  # fmt: skip


def commands() -> list[tuple[str, list[str]]]:
    """(section, words) of each indented command of the page, of which the last words of a launcher may be a training."""
    found, section = [], ""
    text = (ROOT / "docs" / "scale.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("    "):
            words = shlex.split(line, comments=True)
            own = [shlex.split(OWN.get(word, shlex.quote(word))) for word in words]
            found.append((section, [word for group in own for word in group]))
    return found


ALL = commands()
PYTHON = [(s, words[words.index("-m") + 1 :]) for s, words in ALL if "-m" in words]
PYTHON += [
    (s, ["vlm_jax.train", *words[words.index("scripts/slurm.sbatch") + 1 :]])
    for s, words in ALL
    if "scripts/slurm.sbatch" in words
]
SCRIPTS = [words for _, words in ALL if re.search(r"(tpu_run|sweep_array)\.sh|\.sbatch$", " ".join(words[:3]))]  # fmt: skip


def test_the_page_has_the_commands_that_are_tested_here():
    assert [words[0] for _, words in PYTHON] == ["vlm_jax.aot", *["vlm_jax.train"] * 4]
    assert len(SCRIPTS) == 3 and {section for section, _ in PYTHON} == DEVICES.keys()


@pytest.mark.parametrize(("section", "words"), PYTHON, ids=lambda x: x if isinstance(x, str) else x[0])  # fmt: skip
def test_its_mesh_divides_the_batch_and_every_parameter(section, words):
    flags = cli.parse(words[1:], {"workdir": "", "topology": ""}, {"search": ""}, ("config",))
    exp = experiment.resolve(flags.config)
    count = 8 if words[-1] == "--config.mesh.fsdp=8" and "--config.mesh.data=4" not in words else DEVICES[section]  # fmt: skip
    rows = exp.data.batch_size // exp.train.micro_batches
    mesh = AbstractMesh(sharding.mesh_sizes(exp.mesh, count, rows), sharding.AXES)
    sharding.check_batch(exp.data.batch_size, mesh, exp.train.micro_batches)
    sharding.shardings_of(shapes(exp.model), mesh)
    if count == 256:
        assert tuple(mesh.shape.values()) == (1, 128, 2, 1)


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: words[0])
def test_its_launchers_accept_it(words, tmp_path):
    if words[0] == "sbatch":
        words = ["bash", *words[words.index("scripts/slurm.sbatch") :]]
    at = 2 if words[0] == "bash" else 1
    done = subprocess.run([*words[:at], "--dry-run", *words[at:]], cwd=ROOT, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).strip()
