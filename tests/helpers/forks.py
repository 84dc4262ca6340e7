"""Trains in processes that do not spend seconds on imports: each is forked from one that imported everything.

`python forks.py DATA` reads WORKDIR and fields for run.py as one JSON list per line, forks a process that runs them with its
output in a log file, prints its id and, when it has ended, its exit status (negative: the signal). `Forks` is the other end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from paths import HELPERS, PYTHONPATH


class Forks:
    """The process that forks, one at a time."""

    def __init__(self, data, name="log"):
        environment = os.environ | {
            "PYTHONPATH": PYTHONPATH,
            "JAX_PLATFORMS": "cpu",
        }
        self._server = subprocess.Popen(
            [sys.executable, str(HELPERS / "forks.py"), str(data)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1,
        )  # fmt: skip
        self._name, self._pid, self._status = name, 0, None
        self.log = Path()

    def start(self, workdir, **fields):
        """A new process that trains; train__num_steps=9 sets train.num_steps."""
        self.stop()  # one that a failed test left behind
        self.log = workdir.parent / f"{workdir.name}.{self._name}"
        words = [f"{name.replace('__', '.')}={json.dumps(v)}" for name, v in fields.items()]
        self._server.stdin.write(json.dumps([str(self.log), str(workdir), *words]) + "\n")
        self._pid, self._status = int(self._server.stdout.readline()), None

    def running(self):
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        return True

    def send(self, kind):
        os.kill(self._pid, kind)

    def send_when(self, kind, happened):
        """Sends the signal as soon as `happened()`; whether it came to that before the process ended."""
        while self.running():
            if happened():
                self.send(kind)
                return True
            time.sleep(0.001)
        return False

    def wait(self, seconds=300):
        """The exit status, once the process has ended; it is killed when that takes too long."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
            time.sleep(0.01)
        if self._status is None:
            self._status = int(self._server.stdout.readline())
        return self._status

    def stop(self):
        if self._pid:
            if self.running():
                self.send(signal.SIGKILL)
            self.wait()

    def close(self):
        self.stop()
        self._server.stdin.close()
        self._server.wait()


def main(data):
    import run

    from vlm_jax.data import tokenizer
    from vlm_jax.settings import cli
    from vlm_jax.training import loop

    assert loop.run
    tokenizer.load(f"{data}/tokenizer")  # transformers takes longest
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)  # gloo prints
            os.dup2(file, 2)
            sys.exit(cli.run(run.command, [data, *arguments]))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
