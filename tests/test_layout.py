"""The house rules a machine can hold: who may import what, how long a file may grow, one obvious place for each thing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlm_jax"
MAX_LINES = 400
MAX_FUNCTION_LINES = 70
ENTRIES = {"train", "evaluate", "sweep", "aot", "show", "features"}

# package or module -> what it may import from the project ("*" = everything but the entry points)
ALLOWED: dict[str, set[str]] = {
    "axes": set(),
    "config": set(),
    "run_config": {"config"},
    "files": {"config"},
    "cli": {"config", "files"},
    "hub": set(),
    "presets": {"config", "hf", "hub"},
    "adapters": {"config"},
    "layers": {"axes", "config"},
    "sharding": {"axes", "config", "run_config"},
    "optim": {"config", "run_config", "sharding"},
    "disk": {"config"},
    "interrupt": set(),
    "guard": {"config", "run_config"},
    "checkpoint": {"config", "run_config", "sharding", "disk", "checksums"},
    "checksums": {"sharding"},
    "inference": {"models", "data", "weights", "sharding", "config", "run_config", "experiment"},
    "weights": {
        "models",
        "compressors",
        "data",
        "checkpoint",
        "hf",
        "sharding",
        "config",
        "adapters",
        "experiment",
    },
    "telemetry": {"disk", "files"},
    "chips": set(),
    "inherit": {"config", "run_config", "presets", "hf"},
    "outline": {"config", "run_config"},
    "experiment": {"config", "run_config", "files", "presets", "inherit", "data", "hf", "hub"},
    "content": {"config", "data", "experiment", "files"},
    "tasks": {"benchmarks", "config", "data", "experiment", "files", "content"},
    "loop": {"*"},
    "losses": {"*"},
    "step": {"*"},
    "compressors": {"layers", "config"},
    "models": {"layers", "config", "compressors"},
    "data": {"config", "run_config", "hub"},
    "miniworld": {"config"},
    "benchmarks": {"config", "cli", "files"},
    "hf": {"config"},
    "generate": {"models", "config"},
    "answer": {"*"},
    "lmms_eval": {"*"},
    "costs": {"config", "run_config", "compressors"},
    "laws": {"config", "cli", "files", "presets", "compressors", "chips", "costs"},
    "train": {"*", "train"},
    "evaluate": {"*", "evaluate"},
    "sweep": {"*", "train", "evaluate"},
    "aot": {"*"},
    "show": {"*"},
    "features": {"*"},
}
NO_JAX = (
    "data",
    "miniworld",
    "benchmarks",
    "config",
    "run_config",
    "files",
    "cli",
    "presets",
    "axes",
    "experiment",
    "hub",
    "inherit",
    "outline",
    "chips",
    "hlo",
    "hlo_text",
)
NO_JAX_LAWS = (
    "law", "table", "cells", "least_squares", "bootstrap", "profile", "runs", "alternatives", "weighting", "sizes", "terminal",
    "fit", "plot", "report", "cost", "budget", "offer", "plan", "plan_words", "plan_command",
)  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The first name below the package: `models` for models/vit.py, `train` for train.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Project modules a file imports anywhere in it, dotted, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("vlm_jax.") for name in found if name.startswith("vlm_jax.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_allows(path):
    home = room(path)
    if home == "__init__":
        assert not imports(path)
        return
    allowed = ALLOWED[home]
    for name in imports(path):
        target = name.split(".")[0]
        if target == home:
            continue
        if "*" in allowed:
            assert target not in ENTRIES - allowed, f"{path.name} imports the entry point {target}"
        else:
            assert target in allowed, f"{path.relative_to(ROOT)} may not import vlm_jax.{name}"
        if home == "models" and target == "compressors":
            assert path.name == "vlm.py", (
                f"only models/vlm.py may import compressors, not {path.name}"
            )


def test_what_feeds_workers_and_reports_never_loads_jax():
    names = [
        ".".join(("vlm_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in modules()
        if room(path) in NO_JAX or (room(path) == "laws" and path.stem in NO_JAX_LAWS)
    ]
    # costs asks compressors for their counts, which load jax; its own files do not.
    sources = [
        p
        for p in modules()
        if room(p) in (*NO_JAX, "costs") or (room(p) == "laws" and p.stem in NO_JAX_LAWS)
    ]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            heads = []
            if isinstance(node, ast.Import):
                heads = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                heads = [node.module]
            for head in heads:
                assert head.split(".")[0] not in ("jax", "flax", "optax", "orbax"), (
                    f"{path} imports {head}"
                )
    # grain loads jax by itself
    with_grain = [f"vlm_jax.data.{name}" for name in ("pipeline", "feature_images", "prompts")]
    light = [n for n in names if n not in with_grain]
    code = f"import importlib, sys\nfor name in {light!r}:\n    importlib.import_module(name)\nprint('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "False", "a module that must stay light loads jax"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path.name}:{node.name} has {length} lines"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_hides_behind_try_and_no_branch_names_a_model(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try):
            hidden = [n for n in node.body if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not hidden, f"{path.name}:{node.lineno}: import inside try"


def test_configs_hold_data_only():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert not imports(path), f"{path.name} imports the package"


def test_mesh_axes_are_named_in_one_file():
    for path in modules():
        if room(path) in {"sharding", "run_config"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor"):
                raise AssertionError(
                    f"{path.relative_to(ROOT)}:{node.lineno} names the mesh axis {node.value!r}"
                )
