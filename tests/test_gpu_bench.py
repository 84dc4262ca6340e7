"""scripts/bench/gpu.sh at its smallest sizes on a CPU, and what it says where a package or a kernel is missing."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "gpu.sh"
SECTIONS = ("Attention", "Training step beside torch", "Training step, predicted and measured", "Generation", "Harness beside transformers")  # fmt: skip


def tables(*words: str, **environment: str) -> dict[str, list[str]]:
    """The lines of each section that the script prints."""
    ran = subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=os.environ | {"PYTHON": "python"} | environment)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    parts = ran.stdout.split("\n## ")[1:]
    return {part.splitlines()[0]: part.splitlines()[1:] for part in parts}


@pytest.mark.slow
def test_every_section_is_measured_and_a_kernel_that_fails_is_told(tmp_path):
    found = tables("--smoke", str(tmp_path / "gpu.md"))
    assert tuple(found) == SECTIONS
    kernels = [line for line in found["Attention"] if line.startswith("| tiny")]
    assert len(kernels) == 2 and "failed: " not in kernels[0] and "failed: " in kernels[1]
    beside = "\n".join(found["Training step beside torch"])
    assert "| torch, compiled |" in beside
    (predicted,) = (line for line in found["Training step, predicted and measured"] if "| mini |" in line)  # fmt: skip
    assert 0 < float(predicted.split("|")[3]) < 1  # GiB
    assert sum(line.startswith("| mini-82k |") for line in found["Generation"]) == 4
    assert "equal texts" in "\n".join(found["Harness beside transformers"])
    assert "ended" not in "".join(line for lines in found.values() for line in lines)
    written = (tmp_path / "gpu.md").read_text()
    assert all(f"## {title}" in written for title in SECTIONS)


def test_a_missing_package_ends_its_section_alone(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('no jax here')")
    found = tables("--smoke", PYTHONPATH=str(tmp_path))
    assert tuple(found) == SECTIONS
    for title in SECTIONS:
        assert any("ended with exit code 1: ImportError: no jax here" in line for line in found[title])  # fmt: skip


def test_what_does_not_fit_into_the_time_is_told():
    found = tables("--smoke", SECONDS_IN_ALL="5")
    assert all("Not measured: 5 seconds are over." in lines for lines in found.values())


def test_an_unknown_argument_is_refused():
    ran = subprocess.run([SCRIPT, "--fast"], capture_output=True, text=True)
    assert ran.returncode == 2 and "unknown argument '--fast'" in ran.stderr
