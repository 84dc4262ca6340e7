"""Processes find each other wherever JAX finds a cluster: two real ones each time, a metadata server on this machine."""

import http.server
import os
import subprocess
import sys
import threading

import pytest
from gcs_server import free_port

from vlm_jax import sharding
from vlm_jax.settings.checks import ConfigError

# JAX leaves the metadata alone on a machine without TPU chips, which it finds out while it is imported.
CODE = """
import os, sys, jax
for name in sys.argv[1:]:
    os.environ.pop(name, None)
from vlm_jax import sharding
sharding.start_processes(20)
print(jax.process_index(), jax.process_count(), jax.distributed.is_initialized())
"""
TPU = {"JAX_FORCE_TPU_INIT": "1", "TPU_LIBRARY_PATH": __file__}  # any file: no TPU is opened


@pytest.fixture
def metadata():
    """(address, {attribute: text}) of a server like Compute Engine's."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = attributes.get((self.server.worker, self.path.rsplit("/", 1)[-1]))
            self.send_response(200 if known is not None else 404)
            self.end_headers()
            self.wfile.write((known or "").encode())

        def log_message(self, *_):
            pass

    servers = []
    for worker in range(2):  # each machine has its own
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.worker = worker
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    yield [f"127.0.0.1:{s.server_address[1]}" for s in servers], attributes
    for server in servers:
        server.shutdown()


def said(environments, drop=()):
    """What a process in each environment prints."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "TPU_"))}
    base |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, *drop], env=base | own, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own in environments
    ]  # fmt: skip
    ended = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), ended
    return [out.strip() for out, _ in ended]


TWO = ["0 2 True", "1 2 True"]


def test_tpu_machines_of_compute_engine_find_each_other_by_their_metadata(metadata):
    addresses, attributes = metadata
    for worker in range(2):
        attributes[worker, "agent-worker-number"] = str(worker)
        attributes[worker, "worker-network-endpoints"] = "x:0:127.0.0.1,x:1:127.0.0.1"
        attributes[worker, "tpu-env"] = ""
    ours = [TPU | {"GCE_METADATA_IP": address} for address in addresses]
    assert said(ours, ["TPU_SKIP_MDS_QUERY"]) == TWO
    # One machine alone is no cluster, although its metadata are there.
    attributes[0, "worker-network-endpoints"] = "127.0.0.1"
    assert said(ours[:1], ["TPU_SKIP_MDS_QUERY"]) == ["0 1 False"]


def test_slurm_and_open_mpi_are_found_and_the_variables_come_first():
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    ours = [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} for i in range(2)]
    assert said(ours) == TWO
    mpi = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    ours = [
        mpi | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": "0"} for i in range(2)
    ]
    assert said(ours) == TWO
    alone = slurm | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "JAX_NUM_PROCESSES": "1"}
    assert said([alone]) == ["0 1 False"]


@pytest.mark.parametrize(
    "given", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_COORDINATOR_ADDRESS": "a:1"},
              {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}]
)  # fmt: skip
def test_variables_that_do_not_say_who_takes_part_are_refused(monkeypatch, given):
    for name in sharding.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="set all three"):
        sharding.start_processes()


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1.0;tcp://127.0.0.1:1")
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    with pytest.raises(
        ConfigError, match=r"^environment: OmpiCluster does not say .*JAX_NUM_PROCESSES=1 alone"
    ):
        sharding.start_processes()
