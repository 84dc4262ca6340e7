"""A disk that is full, gone, or already in use: one clear line, and what was saved stays."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import files
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage.checkpoint import Checkpoints, load_params

ROOT = Path(__file__).parents[1]

# Saves until the disk takes no more; the same again after that; what each save said.
SCRIPT = """
import json, logging, resource, sys
from pathlib import Path
import grain, jax, jax.numpy as jnp
from vlm_jax.training import telemetry
from vlm_jax.storage.checkpoint import Checkpoints
from vlm_jax.settings.checks import ConfigError

logging.getLogger("absl").setLevel(logging.CRITICAL)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
data = iter(grain.MapDataset.range(9).to_iter_dataset())
state = {"params": {"w": jax.random.normal(jax.random.key(0), (512, 512))}}
checkpoints, said = Checkpoints(folder, keep=9), []
checkpoints.save(1, state, data)
checkpoints.close()
checkpoints = Checkpoints(folder, keep=9)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for step in range(2, 9):
    try:
        checkpoints.save(step, state, data)
    except ConfigError as error:
        said.append(str(error))
        break
metrics = telemetry.Metrics(folder, 0, True, lambda line, ids: None)
for step in range(1, 20001):
    metrics.append(step, {"loss": 1.0, "skipped": 0}, [])
for _ in range(2):
    try:
        metrics.flush(20000)
        metrics.close()
    except ConfigError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def numbers():
    return iter(grain.MapDataset.range(9).to_iter_dataset())


def state():
    return {"params": {"w": jax.random.normal(jax.random.key(0), (512, 512))}}


def check_kept(folder, said, reason):
    checkpoint, *metrics = said
    assert f"could not be written to '{folder}/checkpoints': {reason}" in checkpoint
    assert "; that of step " in checkpoint and " is complete. " in checkpoint
    assert metrics[0].startswith(f"cannot write '{folder}/metrics.jsonl': {reason}; free or mend")


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_in_one_clear_line_and_the_last_checkpoint_stays(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "200000"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    check_kept(tmp_path, json.loads(run.stdout), "File too large")
    wanted = jax.eval_shape(state)["params"]
    sharded = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jnp.zeros(()).sharding), wanted
    )
    np.testing.assert_array_equal(load_params(tmp_path, sharded)["w"], state()["params"]["w"])


@pytest.mark.slow
def test_a_full_disk_ends_in_one_clear_line(tmp_path):
    mount = f'mount -t tmpfs -o size=4m tmpfs "{tmp_path}"'
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    possible = shutil.which("unshare") and subprocess.run([*private, mount], capture_output=True)
    if not possible or possible.returncode:
        pytest.skip("this machine lets nobody mount a small disk of their own (unshare, tmpfs)")
    script = f'{mount}; exec "$0" -c "$1" "{tmp_path}" 0; '
    run = subprocess.run([*private, script, sys.executable, SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_kept(tmp_path, json.loads(run.stdout), "No space left on device")


def test_a_checkpoint_folder_that_is_gone_is_told_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(), numbers())
    checkpoints._finish()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"step 2 could not be written .*: Not a directory; that of step 1 is"
    ):
        checkpoints.save(2, state(), numbers())
    checkpoints.close()
    with pytest.raises(ConfigError, match=r"cannot write .*checkpoints': File exists"):
        Checkpoints(tmp_path, keep=2)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    assert Checkpoints(tmp_path, keep=2).latest() == 1


def test_a_workdir_is_locked_while_a_run_lives_and_no_longer(tmp_path):
    hold = f"import time; from vlm_jax import files; from pathlib import Path\nwith files.lock(Path({str(tmp_path)!r})):\n    print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout.readline() == b"locked\n"
    with (
        pytest.raises(ConfigError, match=rf"process {other.pid} on .* is training in"),
        files.lock(tmp_path),
    ):
        pass
    other.kill()
    other.wait()
    with files.lock(tmp_path):
        pass
    with files.lock(tmp_path):  # released at the end of the block
        pass


def test_a_disk_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.lock(tmp_path):
        assert "cannot be locked" in caplog.text


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(), numbers())
    checkpoints._finish()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(
        ConfigError, match=r"step 2 .*\(1\.0 MB are needed, 1\.0 MB are free\); that of step 1 is"
    ):
        checkpoints.save(2, state(), numbers())  # 512 * 512 * 4 bytes
    monkeypatch.undo()
    checkpoints.save(2, state(), numbers())
    checkpoints.close()
    assert [int(path.name) for path in sorted((tmp_path / "checkpoints").iterdir())] == [1, 2]
