"""Several evaluations side by side, laid out as Table 1 of arXiv 2411.03312.

    python -m vlm_jax.benchmarks.tables RUN... [--format=md|csv|latex]

RUN is the workdir of an evaluation (scores.json, and errors.csv for the compressor and its tokens) or a file that
`vlm_jax.evaluate --score --out` wrote. NAME=RUN names the row; the default is the name of the directory.

The eight columns of Table 1 come first, in its order, then the other benchmarks. A benchmark that no run has is left out; a
score that one run lacks is "-". Numbers are percentages, but for MME they are the points of perception, out of 2000, as in
Table 1. TextVQA is the variant with OCR tokens in the prompt, as there; the variant without them has a column of its own.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax import files
from vlm_jax.benchmarks import BENCHMARKS
from vlm_jax.benchmarks.records import shown
from vlm_jax.files import Path, to_path
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError

# key of BENCHMARKS -> heading
TABLE_1 = {
    "gqa": "GQA", "mmbench": "MMB", "mme": "MME", "pope": "POPE", "scienceqa": "SQA", "textvqa_ocr": "TextVQA",
    "vizwiz": "VizWiz", "vqav2": "VQAv2",
}  # fmt: skip
OTHERS = {
    "textvqa": "TextVQA (no OCR tokens)", "mmbench_cn": "MMB-CN", "ai2d": "AI2D", "mmmu": "MMMU", "mathvista": "MathVista",
    "chartqa": "ChartQA", "docvqa": "DocVQA", "infovqa": "InfoVQA", "ocrbench": "OCRBench", "seed": "SEED-I",
}  # fmt: skip
ABSENT = "-"


@dataclasses.dataclass(frozen=True)
class Run:
    """One row. compressor and visual_tokens are "" where no errors.csv names them."""

    name: str
    scores: Mapping[str, Mapping[str, Any]]  # benchmark -> {"score", "error", "n", "details"}
    compressor: str = ""
    visual_tokens: str = ""


def read(argument: str) -> Run:
    """A run from "RUN" or "NAME=RUN". Raises ConfigError when there are no scores, or a benchmark has two."""
    name, _, place = argument.rpartition("=")
    path = to_path(place)
    file = path / "scores.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"tables: no file {file}; give a directory with scores.json, or a file.")
    content = files.parse_json(files.read_text(file), f"tables: {file}")
    results = content if isinstance(content, list) else [content]
    scores: dict[str, Mapping[str, Any]] = {}
    for result in results:
        if not _is_score(result):
            raise ConfigError(f"tables: {file} holds {shown(result)}, which is no score.")
        if result["benchmark"] in scores:
            raise ConfigError(f"tables: {file} holds two scores of {result['benchmark']}.")
        scores[result["benchmark"]] = result
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    return Run(name, scores, *_model(file.parent / "errors.csv"))


def _is_score(result: Any) -> bool:
    """Whether a result has the numbers that `cell` prints."""
    if not isinstance(result, dict) or not isinstance(result.get("benchmark"), str):
        return False
    details = result.get("details")
    shows = [result.get("score")]
    if result["benchmark"] == "mme" and isinstance(details, dict):
        shows.append(details.get("perception"))
    return isinstance(details, dict) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in shows
    )


def _model(errors: Path) -> tuple[str, str]:
    """Compressor and visual tokens of an errors.csv; those of several models are joined by "/"."""
    if not errors.is_file():
        return "", ""
    lines = [line for line in files.read_text(errors).splitlines() if line[:1] != "#"]
    try:
        rows = list(csv.DictReader(lines))
    except csv.Error as error:
        raise ConfigError(f"tables: {errors} is not valid CSV: {error}.") from error
    found = []
    for column in ("compressor", "visual_tokens"):
        values = dict.fromkeys(row[column] for row in rows if row.get(column))
        found.append("/".join(values))
    return found[0], found[1]


def cell(name: str, result: Mapping[str, Any]) -> str:
    """A score as the table prints it: percent, and MME's points of perception; one decimal."""
    if name == "mme":
        return f"{result['details']['perception']:.1f}"
    return f"{100 * result['score']:.1f}"


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and one line of cells per run, in the order given."""
    if not runs:
        raise ConfigError("tables: no run; give one workdir or more.")
    named = {**TABLE_1, **OTHERS}
    order = [*named, *(name for name in BENCHMARKS if name not in named)]
    order += sorted({name for run in runs for name in run.scores} - set(order))
    columns = [name for name in order if any(name in run.scores for run in runs)]
    model = {
        "Compressor": [run.compressor or ABSENT for run in runs],
        "# Tokens": [run.visual_tokens or ABSENT for run in runs],
    }
    model = {head: values for head, values in model.items() if set(values) != {ABSENT}}
    heads = ["Method", *model, *(named.get(name, name) for name in columns)]
    lines = [
        [
            run.name,
            *about,
            *(cell(c, run.scores[c]) if c in run.scores else ABSENT for c in columns),
        ]
        for run, about in zip(runs, _across(list(model.values()), len(runs)), strict=True)
    ]
    return heads, lines


def _across(columns: Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """The columns transposed to `count` lines."""
    return [[column[i] for column in columns] for i in range(count)]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = [[c.replace("|", "\\|") for c in line] for line in [heads, *lines]]
    widths = [max(3, *map(len, column)) for column in zip(*text, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    padded = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in text
    ]  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in [padded[0], rule, *padded[1:]])


def comma_separated(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Absent cells are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([["" if c == ABSENT else c for c in line] for line in lines])
    return text.getvalue()


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def latex(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of the package booktabs."""
    rows = [" & ".join(c.translate(str.maketrans(LATEX)) for c in line) for line in [heads, *lines]]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            r"\toprule",
            rows[0] + r" \\",
            r"\midrule",
            *(row + r" \\" for row in rows[1:]),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


FORMATS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "latex": latex,
}


def command(argv: Sequence[str]) -> None:
    parser = cli.OneLineParser(description="Runs side by side, in Table 1's layout.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir, a score file, NAME=RUN")
    parser.add_argument("--format", default="md", choices=FORMATS)
    chosen = parser.parse_args(argv)
    sys.stdout.write(FORMATS[chosen.format](*table([read(run) for run in chosen.runs])))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
