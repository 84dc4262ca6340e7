"""The wheel: built, installed into an environment without a checkout, and every command started from there once."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    entry.name.removeprefix("vlm-jax-")
    for entry in metadata.distribution("vlm_jax").entry_points
    if entry.group == "console_scripts"
]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of a fresh environment that holds the wheel; its dependencies are those of this environment."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    for name in ("vlm_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", f"--wheel-dir={work}"]
    subprocess.run([*pip, "wheel", *options, str(source)], check=True, cwd=work)
    venv.create(work / "env", with_pip=False)
    python = work / "env" / "bin" / "python"
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, f"--python={python}", "install", "--no-deps", str(wheel)], check=True)
    paths = {"base": str(work / "env"), "platbase": str(work / "env")}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    # A path file adds this environment's packages; the checkout, a path file among them, does not come along.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def call(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "JAX_PLATFORMS": "cpu"
    }
    words = [str(program), *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment)


def test_every_command_has_a_console_script():
    assert set(COMMANDS) == {
        "train", "evaluate", "sweep", "show", "features", "ask", "chat", "serve", "aot", "fit", "plan", "plot", "tables",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_console_script_starts_without_a_checkout(installed, name, tmp_path):
    done = call(installed / f"vlm-jax-{name}", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


@pytest.mark.slow
def test_the_wheel_carries_the_configs_and_the_published_scores(installed, tmp_path):
    done = call(
        installed / "vlm-jax-train", "--config=configs/stage1.py", "--workdir=w", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "annotations is empty" in done.stderr  # the config loaded: what is missing is its data
    where = "import vlm_jax, pathlib; print(pathlib.Path(vlm_jax.__file__).parent)"
    package = Path(call(installed / "python", "-c", where, cwd=tmp_path).stdout.strip())
    assert package.is_relative_to(installed.parent)
    scores = package / "laws" / "data" / "paper_reasoning.csv"
    done = call(installed / "vlm-jax-fit", str(scores), "--out=law.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = call(
        installed / "vlm-jax-plan",
        "--law=law.json",
        "--budget-gflops=1000",
        "--text-tokens=50",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "use qwen1.5-7b with 16 visual tokens" in done.stdout


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_names_one_version_of_each_requirement_and_the_bounds_allow_it(python):
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    locked: dict[str, str] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            (exact,) = pin.specifier
            assert exact.operator == "==" and pin.name not in locked, line
            locked[pin.name] = exact.version
    wanted = [Requirement(text) for text in metadata.requires("vlm_jax") or []]
    tested = [
        r for r in wanted if r.marker is None or r.marker.evaluate({**environment, "extra": "test"})
    ]
    assert len(tested) > 30
    for requirement in tested:
        name = requirement.name.lower().replace("_", "-")
        if name == "torch":  # pinned in setup.py
            assert str(requirement.specifier).startswith("==")
        else:
            assert requirement.specifier.contains(locked[name], prereleases=True), requirement
