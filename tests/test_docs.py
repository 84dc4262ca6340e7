"""Commands that the documents print: their configs, fields and flags exist, and files of the project that they name are there."""

import re
import shlex
from pathlib import Path

import pytest

from vlm_jax.settings import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
)
CALL = re.compile(r"(?:python -m (vlm_jax[\w.]*)|(scripts/[\w/.]+))((?:\\\n|[^\n`#|])*)")


def commands(document: str) -> list[tuple[str, list[str]]]:
    """(module or script, its words) of every command in a document; lines that end in a backslash go on."""
    found = []
    for module, script, rest in CALL.findall((ROOT / document).read_text(encoding="utf-8")):
        words = rest.replace("\\\n", " ")
        if words.count('"') % 2 == 0 and words.count("'") % 2 == 0:
            found.append((module or script, shlex.split(words)))
    return found


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_every_command_of_a_document_names_configs_and_fields_that_exist(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for called, words in commands(document):
        where = Path(called) if called.startswith("scripts/") else Path(called.replace(".", "/"))
        assert any((ROOT / f"{where}{end}").exists() for end in ("", ".py", "/__init__.py")), called
        flags = [word for word in words if word.startswith("--config") and word != "--config=.."]
        if any(word.startswith("--config=") for word in flags):
            cli.check_overrides([word for word in flags if "*" not in word])


def test_the_guide_s_commands_are_found():
    """Were none found, the test above could not fail."""
    modules = [called for called, _ in commands("docs/guide.md")]
    assert modules.count("vlm_jax.train") >= 3 and modules.count("vlm_jax.laws.plan") >= 4
    (stage2,) = [w for _, w in commands("docs/guide.md") if "--workdir=runs/instruct" in w]
    assert "--config.init.from=runs/align" in stage2
    assert "--config.data.annotations=llava_v1_5_mix665k.json" in stage2


NAMED = re.compile(
    r"(?<![\w/.])(?:vlm_jax|tests|configs|docs)/[\w/.]*\w(?:\.\w+|/)|(?<![\w/.])vlm_jax/\w+/"
)


def named(document: str) -> list[str]:
    """Paths of the project in a document; what a reader is to make (NAME.py) or a pattern stands for is left out."""
    found = NAMED.findall((ROOT / document).read_text(encoding="utf-8"))
    return [path for path in found if "NAME" not in path]


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_every_path_that_a_document_names_exists(document):
    for path in named(document):
        assert (ROOT / path).exists(), path


def test_the_walk_through_the_code_names_its_files():
    """Were none found, the test above could not fail."""
    assert {"vlm_jax/models/vlm.py", "vlm_jax/laws/planning.py", "vlm_jax/costs/"} <= set(
        named("docs/architecture.md")
    )
    assert len(set(named("docs/architecture.md"))) > 35
