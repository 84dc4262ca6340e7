"""python -m vlm_jax.chat --model=RUN [photo.jpg ..]: a conversation on a terminal, about pictures or none.

    /image FILE    another picture, about which the next question is asked
    /tokens V      show V visual tokens per picture, of a model that can; the conversation begins anew
    /map [FILE]    writes a picture of what the visual tokens look at (default: map.png)
    /why           milliseconds and FLOPs of the last answer by part, beside those with a visual token for every patch
    /new           forgets the conversation; the pictures stay
    /quit          or Ctrl-D

Ctrl-C ends a reply and not the program. Answers go to standard output, everything else to the terminal or standard error, so
a pipe gets plain answers: echo "What is this?" | python -m vlm_jax.chat --model=RUN photo.jpg
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from vlm_jax import ask
from vlm_jax.files import to_path
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError

if TYPE_CHECKING:
    from vlm_jax.inference.model import Model

HISTORY = "chat_history"  # in $XDG_STATE_HOME/vlm_jax


class Talk:
    """The state of one session: a model, the conversation, and what its commands need."""

    def __init__(
        self, model: Model, pictures: Sequence[str], options: dict[str, Any], out: io.TextIOBase
    ):
        self.model, self.pictures, self.options, self.out = model, list(pictures), options, out
        self.console = Console(stderr=True, highlight=False)
        self.question = ""
        self.begin()

    def begin(self) -> None:
        """A conversation without turns about the same pictures."""
        self.conversation = self.model.chat(list(self.pictures) or None, **self.options)

    def say(self, line: str) -> bool:
        """Answers a line or obeys it. False: the session is over. A mistake is one line on standard error."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word in ("/quit", "/exit"):
                return False
            if word in COMMANDS:
                COMMANDS[word](self, rest.strip())
            elif word.startswith("/") and not to_path(word).exists():
                raise ConfigError(f"{word} is no command; use one of {', '.join([*COMMANDS, '/quit'])}.")  # fmt: skip
            elif line.strip():
                self.answer(line.strip())
        except ConfigError as error:
            self.console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return True

    def answer(self, question: str) -> None:
        """Streams an answer. Ctrl-C ends it; what was said so far stays part of the conversation."""
        self.question = question
        pieces = self.conversation.stream(question)
        try:
            for piece in pieces:
                self.out.write(piece)
                self.out.flush()
        except KeyboardInterrupt:
            self.out.write(" ...")
        finally:
            pieces.close()
        self.out.write("\n")
        self.out.flush()

    def image(self, path: str) -> None:
        if not to_path(path).is_file():
            raise ConfigError(f"/image: {path!r} is no file; give the path of a picture.")
        self.pictures.append(path)
        self.conversation.show(path)
        self.console.print(f"{path}: ask about it", style="dim")

    def tokens(self, count: str) -> None:
        if not count.isdecimal():
            choices = ", ".join(map(str, self.model.visual_token_choices))
            raise ConfigError(f"/tokens: give a number, such as one of {choices}; got {count!r}.")
        self.options["visual_tokens"] = self.model.checked_tokens(int(count))
        self.begin()
        self.console.print(f"{count} visual tokens per picture; a new conversation", style="dim")

    def map(self, path: str) -> None:
        from vlm_jax.laws import drawing

        if not self.pictures or not self.question:
            raise ConfigError("/map: needs a picture and a question that was asked about it.")
        out = drawing.check_path(path or "map.png")
        said = self.conversation.turns[-1][1] if self.conversation.turns else ""
        count = self.conversation.visual_tokens
        figure = self.model.token_map(self.pictures[-1], self.question, visual_tokens=count, answer=said)  # fmt: skip
        self.console.print(str(drawing.save(figure, out)))

    def why(self, _: str) -> None:
        from vlm_jax.inference import timing

        if self.conversation.ticket is None:
            raise ConfigError("/why: ask something first.")
        self.console.print(why_table(*timing.compare(self.model, self.conversation.ticket)))

    def new(self, _: str) -> None:
        self.begin()
        self.console.print("a new conversation", style="dim")


COMMANDS = {"/image": Talk.image, "/tokens": Talk.tokens, "/map": Talk.map, "/why": Talk.why, "/new": Talk.new}  # fmt: skip


def why_table(this: Any, other: Any) -> Table:
    """The parts of two `timing.Cost`s side by side."""
    columns = [("", "left")] + [
        (f"V = {cost.visual_tokens}, {unit}", "right") for cost in (this, other) for unit in ("ms", "GFLOPs")
    ]  # fmt: skip
    found = Table(title=f"{this.text_tokens} text tokens, {this.answer_tokens} of the answer; measured here and now")  # fmt: skip
    for name, justify in columns:
        found.add_column(name, justify=justify)  # pyrefly: ignore[bad-argument-type]
    for part in [*this.milliseconds, "total"]:
        cells = []
        for cost in (this, other):
            for amounts in (cost.milliseconds, cost.gflops):
                amount = sum(amounts.values()) if part == "total" else amounts[part]
                cells.append(f"{amount:,.1f}" if amount >= 1 else f"{amount:.3g}")
        found.add_row(part, *cells, end_section=part == "decode")
    return found


def lines() -> Iterator[str]:
    """What is typed, with history and editing on a terminal; the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = to_path(home) / "vlm_jax"
    folder.mkdir(parents=True, exist_ok=True)
    words = WordCompleter([*COMMANDS, "/quit"], sentence=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(folder / HISTORY)), completer=words)  # fmt: skip
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:  # clears the line, as in a shell
            continue
        except EOFError:
            return


def command(argv: Sequence[str]) -> None:
    parser = ask.flags(__doc__ or "")
    parser.add_argument("--model", required=True, metavar="RUN", help="a workdir or a model directory")  # fmt: skip
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="what the conversation is about")  # fmt: skip
    args = parser.parse_args(argv)
    for picture in args.pictures:
        if not to_path(picture).is_file():
            raise ConfigError(f"chat: {picture!r} is no file; give the paths of pictures.")
    talk = Talk(
        ask.load(args.model, args),
        args.pictures,
        ask.options(args),
        cast(io.TextIOBase, sys.stdout),
    )
    if sys.stdin.isatty():
        talk.console.print("Ask, or type /image /tokens /map /why /new /quit.", style="dim")
    for line in lines():
        if not talk.say(line):
            break


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
