"""What the parts of tests/sweeps/test_parts.py call, in worker processes."""

import os
import signal
import time
from pathlib import Path

from vlm_jax.settings.checks import ConfigError, RunEnded


def note(folder, name, value=None):
    """Appends the name to the file `order` and to stdout; returns the value and the process that did it."""
    with (Path(folder) / "order").open("a") as file:
        file.write(name + "\n")
    os.write(1, f"{name} says\n".encode())
    return value, os.getpid()


def refuse():
    raise ConfigError("the setting x is wrong; use y.")


def fall():
    raise ZeroDivisionError("by nothing")


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def train(folder):
    """Stands for a training: handles signals as one does, and says when it has begun and what it saved."""
    from vlm_jax.training.interrupt import Interrupt

    with Interrupt() as interrupt:
        (Path(folder) / "begun").write_text(str(os.getpid()))
        while not interrupt.reached(1):
            time.sleep(0.02)
    time.sleep(2.5)  # a checkpoint is being written while further signals come
    (Path(folder) / "checkpoint").write_text("saved")
    raise RunEnded("asked to stop: saved.", exit_code=0)


def compile_and_count():
    """How many threads XLA computes with here."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((400, 400))
    jax.jit(lambda x: jnp.tanh(x @ x) @ x)(x).block_until_ready()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("tf_XLAEigen")
