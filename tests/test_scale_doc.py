"""The commands of docs/scale.md: launchers run as printed with --dry-run, and each training's mesh divides its batch and model."""

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
# How many devices the machine of each section has.
DEVICES = {
    "From a laptop to TPU pods": 8, "Will it fit, and how long does it take?": 256, "One GPU": 1,
    "Eight GPUs, one or more nodes": 8, "One TPU slice": 256,
    "Several slices": 512, "GKE": 512,
}  # fmt: skip
LAUNCHERS = ("tpu_run.sh", "gke_run.sh", "sweep_array.sh", "slurm.sbatch")


SETS = re.compile(r'(?:export )?([A-Z]\w*)="?(.*?)"?$')  # BUCKET=.., DATA=".."


def commands() -> list[tuple[str, str]]:
    """(section, command) of each indented command of the page, in its order, with the variables that were set above it."""
    found, section, known = [], "", {}
    text = (ROOT / "docs" / "scale.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("    "):
            continue
        for name, value in known.items():
            line = re.sub(rf"\${name}\b", value, line)
        if sets := SETS.match(line.strip()):
            known[sets[1]] = sets[2]
        else:
            found.append((section, line.strip()))
    return found


ALL = commands()
LAUNCHED = [text for _, text in ALL if any(name in text.split(" -- ")[0] for name in LAUNCHERS)]


def training(text: str) -> list[str]:
    """The words of a training or of aot in a command, behind `-m`; [] if it has none."""
    words = shlex.split(text, comments=True)
    if "scripts/slurm.sbatch" in words:
        return ["vlm_jax.train", *words[words.index("scripts/slurm.sbatch") + 1 :]]
    called = words[words.index("-m") + 1 :] if "-m" in words else [""]
    return called if called[0] in ("vlm_jax.train", "vlm_jax.aot") else []


TRAININGS = [(section, words) for section, text in ALL if (words := training(text))]


def test_the_page_has_the_commands_that_are_tested_here():
    assert {section for section, _ in TRAININGS} == DEVICES.keys()
    assert len(TRAININGS) == 10 and len(LAUNCHED) == 6
    others = [t for _, t in ALL if t not in LAUNCHED and not training(t)]
    assert [t.split()[0] for t in others] == [
        "git", "pip", "hf", "hf", "python", "python", "pip", "scripts/quickstart.sh", "pip", "gcloud", "gcloud", "gcloud", "gcloud",
        "scripts/prepare_data.py", "scripts/prepare_data.py", "python",
    ]  # fmt: skip
    assert not [text for _, text in ALL if "$" in text]


@pytest.mark.parametrize(("section", "words"), TRAININGS, ids=lambda x: x if isinstance(x, str) else x[0])  # fmt: skip
def test_its_mesh_divides_the_batch_and_every_parameter(section, words):
    texts, switches = (
        {"workdir": "", "topology": "", "slices": ""},
        {"search": "", "train-only": ""},
    )
    flags = cli.parse(words[1:], texts, switches, ("config",))
    flags.config.data.annotations = flags.config.data.image_roots = ()  # they need not be there
    flags.config.init.update({"from": "", "vit": "", "lm": ""})
    flags.config.mesh.slices = int(flags.slices or flags.config.mesh.slices)
    exp = experiment.resolve(flags.config)
    count = 32 if "--config.mesh.data=4" in words else DEVICES[section]
    rows = exp.data.batch_size // exp.train.micro_batches
    sizes = sharding.mesh_sizes(exp.mesh, count, rows, exp.model.lm.num_kv_heads)
    mesh = AbstractMesh(sizes, sharding.AXES)
    sharding.check_batch(exp.data.batch_size, mesh, exp.train.micro_batches)
    sharding.shardings_of(shapes(exp.model), mesh)
    if count >= 256:
        both = (256, 1) if "--config=configs/stage1.py" in words else (128, 2)
        assert sizes == (count // 256, *both, 1)
    assert exp.train.loss_chunk == 512


@pytest.mark.parametrize("text", LAUNCHED)
def test_its_launchers_run_as_printed(text):
    """In bash, with --dry-run before the script's own words; sbatch's script runs without SLURM."""
    text = re.sub(r"^sbatch\s.*?(?=scripts/)", "bash ", text)
    text = re.sub(r"(scripts/\S+)", r"\1 --dry-run", text, count=1)
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert "vlm_jax" in printed and text.split("--workdir=")[1].split()[0] in printed


def test_its_price_list_is_printed_as_it_says(capsys):
    from vlm_jax import sweep

    (text,) = [t for _, t in ALL if "vlm_jax.sweep" in t]
    assert sweep.main(shlex.split(text)[3:]) == 0
    assert "$" in capsys.readouterr().out
