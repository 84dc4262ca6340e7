"""python -m vlm_jax.serve --model=RUN: an OpenAI-style server with a page at /. Needs `pip install vlm_jax[serve]`.

    POST /v1/chat/completions   text and data-URL pictures, streaming or not     GET /v1/models   /health   /metrics   /

Every program is compiled before the first request. Ctrl-C or SIGTERM: running answers are finished, new ones refused. An API
key, if VLM_JAX_API_KEY is set in the environment, is asked for by everything but the page, /health and /metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from vlm_jax import ask
from vlm_jax.files import to_path
from vlm_jax.settings import cli
from vlm_jax.settings.checks import ConfigError

log = logging.getLogger("vlm_jax.serve")
KEY = "VLM_JAX_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def flags(about: str) -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = ask.model_flags(about)
    add = parser.add_argument
    add("--model", required=True, metavar="RUN", help="a workdir or a model directory")
    add("--name", default="", help="of the model, as clients call it (default: the directory's)")
    add("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="(default: 8000)")
    add("--rows", type=int, default=8, help="answers that grow at the same time (default: 8)")
    add("--queue", type=int, default=64, help="requests that wait; more get 429 (default: 64)")
    add(
        "--timeout-s", type=float, default=120.0, help="of a whole request; then 504 (default: 120)"
    )
    add("--image-mib", type=float, default=20.0, help="of one encoded picture; more gets 413 (default: 20)")  # fmt: skip
    add("--image-pixels", type=int, default=50_000_000, help="of one picture; more gets 413 (default: 50 million)")  # fmt: skip
    add("--images", type=int, default=1, help="of one request (default: 1)")
    add("--max-new-tokens", type=int, default=512, help="of an answer, at most (default: 512)")
    add("--prompt-tokens", type=int, default=1024, help="of a prompt, visual ones included (default: 1024)")  # fmt: skip
    add("--choices", default="", metavar="V,V,..", help="numbers of visual tokens that clients may choose (default: those trained for, six at most)")  # fmt: skip
    add("--allow-remote-images", action="store_true", help="fetch pictures from http(s) addresses that clients send")  # fmt: skip
    return parser


def command(argv: Sequence[str]) -> None:
    args = flags(__doc__ or "").parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve: {', '.join(missing)} is not installed; pip install 'vlm_jax[serve]'.")  # fmt: skip
    choices = [word for word in args.choices.split(",") if word]
    if not all(word.strip().isdecimal() for word in choices):
        raise ConfigError(f"serve: --choices {args.choices!r} is no comma-separated list of whole numbers.")  # fmt: skip
    from vlm_jax.serving.limits import Limits

    limits = Limits(
        args.rows, args.queue, args.timeout_s, args.image_mib, args.image_pixels, args.images, args.prompt_tokens,
        args.max_new_tokens, args.allow_remote_images,
    )  # fmt: skip
    _check_port(args.host, args.port)
    _keep_memory_flat()
    model = ask.load(args.model, args)
    import uvicorn

    from vlm_jax.serving.app import make_app
    from vlm_jax.serving.engine import Engine

    engine = Engine(model, limits, tuple(int(word) for word in choices))
    name = args.name or to_path(args.model).resolve().name
    app = make_app(engine, name, os.environ.get(KEY, ""))
    log.info("%s: compiling; then at http://%s:%d", name, args.host, args.port)
    # uvicorn ends its answers at SIGTERM, then raises it again: nothing is left to do, and the exit code is 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.run(
        app, host=args.host, port=args.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=round(args.timeout_s),
    )  # fmt: skip


def _keep_memory_flat() -> None:
    """Lets glibc keep freed memory in two heaps, not in eight per core, which a server's threads fill one after the other.

    MALLOC_ARENA_MAX in the environment says otherwise; other C libraries have no such setting.
    """
    arena_max = -8  # M_ARENA_MAX in malloc.h
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, TypeError):  # TypeError: Windows
            ctypes.CDLL(None).mallopt(arena_max, 2)


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError for a place where nothing can listen, before a model is loaded and compiled."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind, number) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"serve: cannot listen on {host}:{port}: {error}; give another --port."
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a mistake of the user's."""
    return cli.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
