"""What a report is made of, each in Markdown and in HTML: headings, tables, pictures; and the page around them.

The page is one file beside its pictures. It fits a phone (a wide table scrolls inside its own box) and follows the dark mode.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlm_jax import files

# A range or an interval, which a table prints small.
SMALL = re.compile(r"[(\[][^)\]]*[)\]]|\S+\.\.\S+")
PARENTHESES = re.compile(r"\([^)]*\)")


class Block(NamedTuple):
    markdown: str
    html: str


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    file: str  # in the report's folder
    caption: str


def heading(level: int, text: str) -> Block:
    return Block(f"{'#' * level} {text}", f"<h{level}>{html.escape(text)}</h{level}>")


def paragraph(text: str) -> Block:
    return Block(text, f"<p>{html.escape(text)}</p>")


def answer(lines: Sequence[str]) -> Block:
    """The sentences in a box, what stands in parentheses muted."""
    texts = (PARENTHESES.sub(r"<span>\g<0></span>", html.escape(line)) for line in lines)
    shown = "".join(f"<p>{text}</p>" for text in texts)
    return Block(items(lines).markdown, f"<section>{shown}</section>")


def items(lines: Sequence[str]) -> Block:
    shown = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return Block("\n".join(f"- {line}" for line in lines), f"<ul>{shown}</ul>")


def command(text: str) -> Block:
    return Block(f"    {text}", f"<pre>{html.escape(text)}</pre>")


def table(content: Table) -> Block:
    """It scrolls inside its own box where the page is narrow."""
    lines = [content.header, ["---"] * len(content.header), *content.rows]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    shown = _line("th", content.header) + "".join(_line("td", row) for row in content.rows)
    return Block(markdown, f"<div class=wide><table>{shown}</table></div>")


def _line(tag: str, cells: Sequence[str]) -> str:
    texts = [SMALL.sub(r"<small>\g<0></small>", html.escape(cell)) for cell in cells]
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def pictures(shown: Sequence[Picture]) -> Block:
    """Beside each other where the page is wide enough."""
    figures = (
        f'<figure><img src="{html.escape(file)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for file, caption in shown
    )
    markdown = "\n".join(f"![{caption}]({file})" for file, caption in shown)
    return Block(markdown, f"<div class=pictures>{''.join(figures)}</div>")


def folded(summary: str, *blocks: Block) -> Block:
    """Blocks that the page opens on a click."""
    inner = "".join(block.html for block in blocks)
    shown = f"<details><summary>{html.escape(summary)}</summary>{inner}</details>"
    return Block("\n\n".join([summary, *(block.markdown for block in blocks)]), shown)


def write(folder: Path, title: str, blocks: Sequence[Block]) -> Path:
    """report.md and report.html; returns the path of the latter."""
    markdown = "\n\n".join(block.markdown for block in blocks) + "\n"
    files.write_whole(folder / "report.md", markdown)
    body = "\n".join(block.html for block in blocks)
    files.write_whole(folder / "report.html", PAGE.format(title=html.escape(title), body=body))
    return folder / "report.html"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #222; --paper: #fff; --box: #f3f5f7; --line: #d8dce0; --muted: #5b636b; --mark: #d55e00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e6e8; --paper: #16181a; --box: #22262a; --line: #3a4046; --muted: #a3abb3; --mark: #f08a3c; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }} h3 {{ font-size: 1rem; margin-bottom: 0; }}
section {{ margin: 1rem 0; padding: .2rem 1rem; background: var(--box); border-left: 4px solid var(--mark); }}
section p {{ margin: .7rem 0; font-weight: 600; }} section span {{ font-weight: 400; color: var(--muted); }}
ul {{ padding-left: 1.2rem; font-size: .9rem; color: var(--muted); }}
pre {{ background: var(--box); padding: .6rem; white-space: pre-wrap; font-size: .85rem; }}
.wide {{ width: fit-content; max-width: 100%; overflow-x: auto; margin: .6rem 0; background: linear-gradient(to left, var(--paper) 1.2rem, transparent 2.5rem) local, linear-gradient(to left, var(--line), transparent 1.2rem); }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }}
th {{ min-width: 3.2rem; }} td:first-child, td:not(:has(small)), small {{ white-space: nowrap; }} small {{ color: var(--muted); }}
@media (max-width: 40rem) {{ td:first-child small {{ display: block; }} }}
.pictures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; color: var(--muted); }}
img {{ width: 100%; height: auto; background: #fff; border-radius: 4px; }}
summary {{ cursor: pointer; margin: .6rem 0; }}
</style></head><body>
{body}
</body></html>
"""
