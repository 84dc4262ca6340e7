"""The house rules a machine can hold: who may import what, how long a file may grow, one obvious place for each thing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlm_jax"
MAX_LINES = 400
MAX_FUNCTION_LINES = 70
COMMANDS = {"train", "evaluate", "sweep", "show", "features", "ask", "chat", "serve"}

# The rooms from the ground up -> what each may import of the project. Nothing imports a command, but sweeps train and show.
GROUND = {"settings", "files", "progress"}
MODEL = {"settings", "layers", "compressors", "models", "sharding"}
ROOMS: dict[str, set[str]] = {
    "settings": set(),
    "files": {"settings"},
    "progress": set(),
    "layers": {"settings"},
    "sharding": {"settings"},
    "compressors": {"settings", "layers"},
    "models": {"settings", "layers", "compressors"},
    "data": GROUND,
    "hf": {*GROUND, "compressors"},
    "benchmarks": GROUND,
    "miniworld": GROUND,
    "costs": {"settings", "compressors"},
    "laws": {*GROUND, "costs"},
    "storage": {*GROUND, *MODEL, "hf", "data"},
    "training": {*GROUND, *MODEL, "hf", "data", "storage", "costs"},
    "inference": {*GROUND, *MODEL, "hf", "data", "storage", "costs", "benchmarks", "laws"},
    "aot": {*GROUND, *MODEL, "hf", "data", "storage", "costs", "training", "inference"},
    "serving": {*GROUND, *MODEL, "hf", "data", "storage", "costs", "inference"},
}
EVERYTHING = set(ROOMS)
# The room of the command sweep, which alone runs other commands.
ROOMS["sweeps"] = EVERYTHING - {"miniworld"} | {"train", "show"}
# What a room's module may not do although its room may.
SEALED = {"sweeps.parts": GROUND}  # worker processes, whatever they run
ALLOWED = ROOMS | {
    "train": EVERYTHING,
    "evaluate": EVERYTHING,
    "sweep": {"settings", "sweeps"},
    "show": EVERYTHING,
    "features": EVERYTHING,
    "api": EVERYTHING | {"train"},
    "ask": EVERYTHING | {"api"},
    "chat": EVERYTHING | {"ask"},
    "serve": EVERYTHING | {"ask"},
}
# grain loads jax by itself. Of a compressor, what runs loads it, not what is known without running it.
NO_JAX = (
    "settings",
    "files",
    "progress",
    "data",
    "miniworld",
    "benchmarks",
    "laws",
    "costs",
    "compressors",
)
LOADS_JAX = {"data": {"pipeline", "feature_images", "eval_batches"}}


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
    if module_name(path) in SEALED:
        assert {name.split(".")[0] for name in imports(path)} <= SEALED[module_name(path)]
    for name in imports(path):
        target = name.split(".")[0]
        if target != home:
            assert target in ALLOWED[home], (
                f"{path.relative_to(ROOT)} may not import vlm_jax.{name}"
            )
        if (home, target) == ("models", "compressors"):
            assert path.name == "vlm.py", f"only models/vlm.py imports compressors, not {path.name}"


def module_name(path: Path) -> str:
    """models/vit.py -> models.vit; a room's __init__.py -> the room."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def graph() -> dict[str, set[str]]:
    """Module -> the modules it imports anywhere in it."""
    known = {module_name(path) for path in modules()}
    return {
        module_name(path): {
            name if name in known else name.rpartition(".")[0] for name in imports(path)
        }
        for path in modules()
    }


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first one again at the end; [] without any."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next((f for n in sorted(arrows.get(name, ())) if (f := walk(n, [*way, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_no_module_imports_itself_by_way_of_others():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    assert circle(graph()) == []


def is_light(path: Path) -> bool:
    home = room(path)
    heavy = path.stem in LOADS_JAX.get(home, ()) or path.parent.name == "modules"
    return home in NO_JAX and not heavy


def test_what_feeds_workers_and_reports_never_loads_jax():
    for path in filter(is_light, modules()):
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
    light = [f"vlm_jax.{module_name(path)}" for path in filter(is_light, modules())]
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
        if module_name(path) in {"sharding", "settings.run"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor"):
                raise AssertionError(
                    f"{path.relative_to(ROOT)}:{node.lineno} names the mesh axis {node.value!r}"
                )


# Who may name paths without vlm_jax.files: what lies on this machine by its nature.
LOCAL_ONLY = {
    "settings.cli": "how the command itself was called",
    "settings.config_files": "config files, which are Python",
    "settings.hub": "whether a name is a hub's or a folder's",
    "settings.huge_pages": "one of the kernel's own files",
    "miniworld.generate": "fills a local folder, which the sweep puts where it belongs",
}
OPENS = re.compile(
    r"(?<![\w.])open\(|(?<![\w.])Path\(|os\.path\.(?:is|exists|get)|os\.(?:stat|listdir|scandir|makedirs|replace|rename|remove)\("
)


def test_a_path_that_may_lie_in_a_bucket_is_opened_by_files_alone():
    assert (
        OPENS.search("with open(x)")
        and OPENS.search("Path(x)")
        and OPENS.search("os.path.isdir(x)")
    )
    for path in modules():
        name = module_name(path)
        if room(path) == "files" or name in LOCAL_ONLY:
            continue
        source = path.read_text(encoding="utf-8")
        assert "pathlib" not in source, f"{name} imports pathlib; files.to_path makes paths"
        found = [line for line in source.splitlines() if OPENS.search(line)]
        assert not found, f"{name} opens a path by itself: {found}"


def test_in_laws_only_the_three_commands_print():
    writes = ("print", "console.print", "sys.stdout.write")
    found = {
        path.stem
        for path in (PACKAGE / "laws").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in writes
    }
    assert found == {"fit", "plan", "plot"}
