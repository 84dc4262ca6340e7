"""kill -9 at any step, in the middle of a save too; the same command again: the same losses, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from vlm_jax.telemetry import read_lines

HERE = Path(__file__).parent
STEPS = 40

SCRIPT = """
import json, sys
import tiny
from pathlib import Path
from vlm_jax import cli, train

def command(argv):
    config = tiny.config(Path(argv[0]), num_steps=int(argv[2]), save_every=4, log_every=1)
    config.optim.optimizer = "muon"
    train.train(config, argv[1])

if __name__ == "__main__":
    sys.exit(cli.run(command))
"""


def start(folder, workdir):
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), str(workdir), str(STEPS)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def lines(workdir):
    return read_lines(workdir / "metrics.jsonl")


def kill_when(process, happened):
    """SIGKILL as soon as `happened()`; whether it came to that before the process ended by itself."""
    while process.poll() is None:
        if happened():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.0005)
    raise AssertionError(f"the run ended before it could be killed:\n{process.stderr.read()}")


def saving(workdir):
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in entry.name for entry in folder.iterdir())


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_losses_bit_for_bit(tmp_path):
    folder = tiny.write(tmp_path / "data")
    whole = start(folder, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    want = lines(tmp_path / "whole")
    assert [line["step"] for line in want] == list(range(1, STEPS + 1))

    workdir, died_at = tmp_path / "killed", []
    for happened in (
        lambda: len(lines(workdir)) >= 2,  # before the first checkpoint
        lambda: len(lines(workdir)) >= 9 and saving(workdir),
        lambda: len(lines(workdir)) >= 27,
    ):
        kill_when(start(folder, workdir), happened)
        died_at.append(len(lines(workdir)))
    last = start(folder, workdir)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert died_at[0] >= 2 and died_at[-1] < STEPS, died_at
    assert lines(workdir) == want  # json keeps every bit of a float
    final = json.loads((workdir / "final.json").read_text())
    assert final == want[-1]
