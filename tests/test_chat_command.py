"""The terminal: answers stream, commands obey, pipes are plain, Ctrl-C ends a reply and not the program."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from askable import QUESTION, picture
from rich.console import Console

from vlm_jax import ask, chat
from vlm_jax.inference.timing import Cost

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def talk(model, world):
    options = {"max_new_tokens": 12}
    made = chat.Talk(model, [str(picture(world, "red"))], options, io.StringIO())
    made.console = Console(file=io.StringIO(), width=120, highlight=False)
    return made


def told(talk) -> str:
    return talk.console.file.getvalue()


def test_lines_are_answered_and_commands_obeyed(talk, model, world, tmp_path):
    expected = model.ask(picture(world, "red"), QUESTION, max_new_tokens=12)
    assert talk.say(QUESTION) and talk.out.getvalue() == f"{expected}\n"
    assert talk.say("  ") and talk.out.getvalue() == f"{expected}\n"
    assert talk.say(f"/map {tmp_path / 'm.png'}") and (tmp_path / "m.png").is_file()
    assert talk.say(f"/image {picture(world, 'blue')}") and talk.say("What is this ?")
    assert talk.conversation.ticket.prompt.images == 1 and len(talk.conversation.turns) == 2
    assert talk.say("/new") and talk.conversation.turns == []
    assert not talk.say("/quit") and "error" not in told(talk)


def test_why_compares_the_turn_with_every_patch(talk):
    assert talk.say("/why") and "error: /why: ask something first." in told(talk)
    talk.say(QUESTION)
    talk.say("/why")
    shown = told(talk)
    for text in ("V = 1, ms", "V = 4, GFLOPs", "encoder", "compressor", "prefill", "decode", "total"):  # fmt: skip
        assert text in shown, text


def test_the_table_adds_up():
    parts = ("encoder", "compressor", "prefill", "decode")
    costs = [Cost(v, 9, 5, dict.fromkeys(parts, ms), dict.fromkeys(parts, 2.0)) for v, ms in ((1, 1.0), (576, 30.0))]  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    console.print(chat.why_table(*costs))
    last = next(line for line in console.file.getvalue().splitlines() if "total" in line).split("│")
    assert [cell.strip() for cell in last[2:6]] == ["4.0", "8.0", "120.0", "8.0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tokens", "/tokens: give a number, such as one of 1; got ''."),
        ("/tokens 4", "visual_tokens 4: tokenpacker gives the 1 it was trained for"),
        ("/image nowhere.jpg", "/image: 'nowhere.jpg' is no file"),
        ("/map", "/map: needs a picture and a question that was asked about it."),
        ("/help", "/help is no command; use one of /image, /tokens, /map, /why, /new, /quit."),
        ("Say </s>", "contains the control token"),
    ],
)
def test_a_mistake_is_one_line_and_the_session_goes_on(talk, line, message):
    assert talk.say(line)
    assert f"error: {message}" in told(talk).replace("question: its text ", "") and told(talk).count("\n") == 1  # fmt: skip


def test_ctrl_c_ends_the_reply_and_keeps_what_was_said(talk, model, world):
    class Interrupting(io.StringIO):
        def write(self, text):
            super().write(text)
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return len(text)

    talk.out = Interrupting()
    talk.out.interrupted = False
    whole = model.ask(picture(world, "red"), QUESTION, max_new_tokens=12)
    assert talk.say(QUESTION)
    first, rest = talk.out.getvalue().split(" ...")
    assert rest == "\n" and first and whole.startswith(first)
    assert talk.conversation.turns == [(QUESTION, first)]
    assert talk.say("Say hello")


@pytest.mark.slow
def test_a_pipe_gets_plain_answers(run, world, model):
    command = [sys.executable, "-m", "vlm_jax.chat", f"--model={run}", str(picture(world, "red")), "--max-new-tokens=12"]  # fmt: skip
    done = subprocess.run(command, input=f"{QUESTION}\n/nonsense\n", capture_output=True, text=True, cwd=ROOT, env=os.environ)  # fmt: skip
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert done.stdout == model.ask(picture(world, "red"), QUESTION, max_new_tokens=12) + "\n"
    assert "error: /nonsense is no command" in done.stderr


def test_ask_answers_about_pictures_or_none(run, world, model, capsys):
    red, blue = (str(picture(world, name)) for name in ("red", "blue"))
    for images in ([], [red], [red, blue]):
        assert ask.main([str(run), *images, QUESTION, "--max-new-tokens=12"]) == 0
        assert capsys.readouterr().out == model.ask(images, QUESTION, max_new_tokens=12) + "\n"


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (ask.main, [], "the following arguments are required: RUN, PICTURE .. QUESTION"),
        (ask.main, ["/nowhere", "no.jpg", "Why ?"], "ask: picture 'no.jpg' does not exist"),
        (ask.main, ["/nowhere", __file__], "is a picture; give the question behind it"),
        (
            ask.main,
            ["/nowhere", "What is at https://example.com now?"],
            "load: '/nowhere' is no directory.",
        ),
        (ask.main, ["/nowhere", "Why ?"], "load: '/nowhere' is no directory."),
        (chat.main, [], "the following arguments are required: --model"),
        (chat.main, ["--model=RUN", "no.jpg"], "chat: 'no.jpg' is no file"),
    ],
)
def test_a_wrong_command_is_one_line(run, capsys, command, words, message):
    assert command([word.replace("RUN", str(run)) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
