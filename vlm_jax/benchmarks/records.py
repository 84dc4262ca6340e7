"""One record of a native file, whose fields are checked as they are read, and the row that is made from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm_jax.benchmarks import prompts
from vlm_jax.files import ImageSource, Path
from vlm_jax.settings.checks import ConfigError

Question = dict[
    str, Any
]  # a LLaVA record that asks one question, with its gold "answer" and what its metric reads
# The texts that pandas reads as a missing value, in lower case. The official scripts of TSV benchmarks use pandas.
MISSING = {
    "", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na", "nan",
    "none", "null",
}  # fmt: skip


MEND = "correct the file or download it again"


def fault(where: str | Path, reason: str, mend: str = MEND) -> ConfigError:
    """The error for a faulty file. where: benchmark and file, and the row or the line."""
    return ConfigError(f"{where}: {reason}; {mend}.")


def shown(value: Any) -> str:
    """The beginning of any value of a file, on one line."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return f"a {type(value).__name__} with too many levels"


@dataclasses.dataclass(frozen=True)
class RawRecord:
    """An object of a file. Its methods raise ConfigError for a field that is absent or of another kind."""

    where: str  # "NAME: FILE row N"
    key: str  # its name in an object of objects; "" in a list
    values: dict[str, Any]

    def fault(self, reason: str) -> ConfigError:
        return fault(self.where, reason)

    def name(self) -> str:
        """Its name in the object that holds it."""
        if not self.key:
            raise self.fault("has no name: the file must be an object of records, not a list")
        return self.key

    def has(self, name: str) -> bool:
        """Whether the field has a value: neither null nor NaN, which pandas writes for a missing one."""
        value = self.values.get(name)
        return value is not None and value == value

    def field(self, *names: str) -> Any:
        """The first field of `names` that has a value."""
        for name in names:
            if self.has(name):
                return self.values[name]
        raise self.fault(f"has no {' or '.join(map(repr, names))}")

    def text(self, *names: str) -> str:
        """As a string; a number is written as Python does."""
        value = self.field(*names)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.fault(f"{names[0]!r} must be a string, got {shown(value)}")
        return self.unicode(names[0], str(value))

    def unicode(self, name: str, value: str) -> str:
        """`value`, if it is valid Unicode. Raises ConfigError for a lone surrogate, which JSON's escapes can express."""
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.fault(f"{name!r} is no Unicode text: {shown(value)}") from None
        return value

    def optional(self, name: str) -> str:
        """As a string; "" where it is absent, null, or a text that pandas reads as missing ("nan", "None", ...)."""
        value = str(self.values[name]) if self.has(name) else ""
        return "" if value.strip().lower() in MISSING else value

    def whole(self, name: str) -> int:
        """A whole number."""
        value = self.field(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(f"{name!r} must be a whole number, got {shown(value)}")
        return value

    def texts(self, *names: str) -> list[str]:
        """A list of strings; a single string is a list of one."""
        value = self.field(*names)
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(_is_text(v) for v in values):
            return [self.unicode(names[0], str(v)) for v in values]
        raise self.fault(f"{names[0]!r} must be a list of strings, got {shown(value)}")

    def part(self, name: str) -> dict[str, Any]:
        """An object inside it, {} where there is none."""
        value = self.values[name] if self.has(name) else {}
        if not isinstance(value, dict):
            raise self.fault(f"{name!r} must be an object, got {shown(value)}")
        return value

    def image(self, *names: str, folder: str = "") -> ImageSource:
        """The path of an image, joined to `folder`, or an image inside the file; the first of a list."""
        value = self.field(*names)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value:
            return f"{folder}/{value}" if folder else value
        if callable(value):
            return value
        raise self.fault(f"{names[0]!r} must be an image or its path, got {shown(value)}")


def _is_text(value: Any) -> bool:
    """Whether a value is a string, or a number other than NaN."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool) and value == value


def row(
    row_id: str, image: ImageSource | None, question: str, /, answer: Any, **more: Any
) -> Question:
    """One question about at most one image, asked alone. answer: None where the gold is hidden."""
    image_field = {} if image is None else {"image": image}
    messages = prompts.ask(question, images=int(image is not None))
    return {"id": row_id, **image_field, "conversations": messages, "answer": answer, **more}


def native_id(name: str) -> int | str:
    """A row's id as the native file has it, for files whose ids are whole numbers."""
    return int(name) if name.isascii() and name.isdigit() else name


def distinct(rows: list[Question], where: str | Path) -> list[Question]:
    """The rows themselves. Raises ConfigError if there is none or an id occurs twice. where: their file or directory."""
    if not rows:
        raise fault(where, "holds no question")
    seen: set[str] = set()
    for one in rows:
        if one["id"] in seen:
            raise fault(where, f"has two questions with id {one['id']!r}")
        seen.add(one["id"])
    return rows
