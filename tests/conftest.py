"""What every test shares: shapes checked at run time, cheap compilation, and programs compiled once for the whole session."""

import ctypes
import gc
import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs run a few times each, so they are compiled less thoroughly. Without XLA's newer fusion emitters a training step
# compiles in a third of the time (0.8 s instead of 2.4 s, jax 0.10) and runs as fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# AVX has no fused multiply-add, with which the older emitters would round the same sum in two programs differently.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_max_isa=AVX",
)
# Threads of one process share two heaps; with one each, what a compilation freed stays with the process.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")
# google.auth, which reads this when it is imported, would look for a machine of Google's for seconds.
os.environ.setdefault("NO_GCE_CHECK", "true")
# One folder of compiled programs for the session: xdist's workers and every process that a test starts inherit it, so a
# killed and a resumed run, two processes, or two tests with the same model compile a program once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="vlm_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

hook = install_import_hook("vlm_jax", "typechecker.check")
hook.__enter__()

if not flags.FLAGS.is_parsed():  # grain's worker processes read an absl flag
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def memory_is_returned():
    """Compiled programs of a file that is done are dropped, and what they held goes back to the system."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures and conversations on disk."""
    import tiny  # here, as below: the package is imported behind the hook, and takes seconds

    return tiny.write(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture(scope="module")
def run(world):
    """A run that can be asked."""
    from askable import write_run

    return write_run(world.parent / "run", world)


@pytest.fixture(scope="module")
def model(run):
    """It, loaded."""
    import vlm_jax

    return vlm_jax.load(run)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A GCS server on this machine with the bucket `bucket`; this process and those it starts talk to it."""
    from gcs_server import Server

    root = tmp_path_factory.mktemp("gcs")
    (root / "bucket").mkdir()
    running = Server(root)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment().items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield running
    running.stop()
