"""python -m vlm_jax.ask RUN photo.jpg "What is this?": one question to a model, its answer on standard output.

RUN is the workdir of a training, or a model directory of the Hugging Face hub. Several pictures may stand before the
question, or none. The first question of a model compiles for a while; programs are kept on disk, so the next command does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vlm_jax import api
from vlm_jax.files import to_path
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError


def model_flags(about: str) -> argparse.ArgumentParser:
    """A parser with the flags that say how a model is loaded."""
    parser = cli.OneLineParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vit", default="", help="directory of the encoder, where a release only names it")
    add(
        "--template",
        default="",
        help="prompt format of a model directory; default: by its tokenizer",
    )
    add("--dtype", default="", choices=("", "float32", "bfloat16"), help="of the computation; default: the run's")  # fmt: skip
    return parser


def flags(about: str) -> argparse.ArgumentParser:
    """A parser with the flags that ask and chat share: those of `model_flags`, and how tokens are chosen."""
    parser = model_flags(about)
    add = parser.add_argument
    add("--visual-tokens", type=int, default=0, metavar="V", help="per picture, of a model that can show several numbers")  # fmt: skip
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default)")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this probability (default: 1)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    return parser


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that `Model.ask` and `Model.chat` take."""
    names = ("visual_tokens", "max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(args, name) for name in names}


def load(where: str, args: argparse.Namespace):
    """The model that the flags name."""
    return api.load(where, vit=args.vit, template=args.template, dtype=args.dtype)


def command(argv: Sequence[str]) -> None:
    parser = flags(__doc__ or "")
    parser.add_argument("model", metavar="RUN", help="a workdir or a model directory")
    parser.add_argument("words", nargs="+", metavar="PICTURE .. QUESTION", help="pictures, then the question")  # fmt: skip
    args = parser.parse_args(argv)
    *pictures, question = args.words
    if not pictures and to_path(question).exists():
        raise ConfigError(f"ask: {question!r} is a picture; give the question behind it.")
    for picture in pictures:
        if not to_path(picture).is_file():
            raise ConfigError(
                f"ask: picture {picture!r} does not exist; the question is the last word, in quotes."
            )
    model = load(args.model, args)
    for piece in model.stream(list(pictures) or None, question, **options(args)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
