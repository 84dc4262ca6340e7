"""A tiny run that can be asked, questions to it, and a server of it. tests/conftest.py has its fixtures: world, run, model."""

import contextlib
import threading
import time

import jax
import tiny
import uvicorn
from flax import linen as nn

from vlm_jax import compressors
from vlm_jax.inference.answer import Answerer
from vlm_jax.inference.settings import EvalConfig
from vlm_jax.models.vlm import init_params
from vlm_jax.serving.app import make_app
from vlm_jax.settings.run import MeshConfig
from vlm_jax.storage import run as experiment
from vlm_jax.storage.checkpoint import save_params

QUESTION = "What colour is this ?"
QUESTIONS = [
    ("red", QUESTION),
    ("blue", "Is it bright ?"),
    ("green", f"{QUESTION} Is it bright ? " * 7),
    (None, "Say hello"),
    ("yellow", f"{QUESTION} Is it bright ?"),
    ("purple", "Say one image ."),
]  # fmt: skip


def write_run(folder, world, compressor="tokenpacker", max_tokens=120, norm="rms", **fields):
    """A run whose parameters are random and large, so that answers differ from question to question."""
    cfg = tiny.config(world)
    cfg.data.max_tokens = max_tokens
    cfg.model.projector_norm = norm
    cfg.model.vit.post_norm = norm != "none"  # LLaVA has neither norm
    if compressor != "tokenpacker":
        compressors.choose(cfg.model.compressor, compressor, **fields)
    exp = experiment.resolve(cfg)
    folder.mkdir()
    experiment.write(exp, folder)
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(exp.model, jax.random.key(3)))
    save_params(folder, jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, params))
    return folder


def picture(world, name):
    return None if name is None else world / "images" / f"{name}.png"


def asked(world):
    return [(picture(world, name), question) for name, question in QUESTIONS]


def evaluated(run, world, **settings):
    """The texts that the evaluation harness gives for the same questions."""
    answerer = Answerer(EvalConfig(str(run), 4, 12, **settings), MeshConfig())
    rows = []
    for number, (name, question) in enumerate(QUESTIONS):
        image = {"image": f"images/{name}.png"} if name else {}
        value = f"<image>\n{question}" if name else question
        rows.append({"id": str(number), **image, "conversations": [{"from": "human", "value": value}]})  # fmt: skip
    texts = {i: text for answers in answerer.ask(rows, str(world), 4) for i, text in answers}
    return [texts[str(number)] for number in range(len(rows))]


@contextlib.contextmanager
def serving(engine, key=""):
    """The address of a server in a thread of this process."""
    config = uvicorn.Config(make_app(engine, "tiny", key), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
