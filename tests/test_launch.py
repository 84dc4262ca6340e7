"""The launch scripts: what --dry-run prints, and what they do when gcloud, srun and sbatch are scripts that write down their words."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TPU = ["--name=a", "--zone=z", "--type=v6e-64", "--spot"]
TRAIN = ["python", "-m", "vlm_jax.train", "--config=configs/stage2.py", "--workdir=/shared/run"]


@pytest.fixture
def fakes(tmp_path):
    """A folder for the PATH; `fakes(name, body)` adds a command that logs its words to calls.txt and then does `body`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, body=""):
        path = folder / name
        path.write_text(
            f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls.txt"\n{body}\n'
        )
        path.chmod(0o755)

    return add


def environment(tmp_path, **more):
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "POLL_SECONDS": "0", "TMPDIR": str(tmp_path)} | more


def run(tmp_path, script, *words, **more):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *words], capture_output=True, text=True, cwd=tmp_path,
        env=environment(tmp_path, **more), timeout=60,
    )  # fmt: skip


def calls(tmp_path):
    path = tmp_path / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def printed(text):
    """The commands that --dry-run printed, as lists of words."""
    return [shlex.split(line) for line in text.splitlines()]


def test_a_dry_run_of_the_tpu_scripts_prints_every_command_and_runs_none(tmp_path, fakes):
    fakes("gcloud")
    done = run(
        tmp_path,
        "tpu_run.sh",
        *TPU,
        "--dry-run",
        "--",
        *TRAIN,
        "--config.data.image_roots=('a b',)",
    )
    assert done.returncode == 0, done.stderr
    create, _, copy, install, train, check = printed(done.stdout)
    assert create == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "a", "--node-id=a", "--zone=z",
        "--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--spot",
    ]  # fmt: skip
    assert {"scp", "--worker=all"} <= set(copy) and {"ssh", "--worker=all"} <= set(install)
    command = next(w for w in train if w.startswith("--command=")).removeprefix("--command=")
    assert "--worker=all" in train
    words = [*TRAIN, "--config.data.image_roots=('a b',)"]
    assert shlex.split(command.split(" > ")[0])[-6:] == words
    assert check[-2:] == ["--worker=0", "--command=test -f /shared/run/final.json"]
    assert not calls(tmp_path)


BUCKET = [*TRAIN[:-1], "--workdir=gs://bucket/run"]


def test_several_slices_are_one_resource_and_a_bucket_says_when_the_run_is_finished(tmp_path):
    done = run(tmp_path, "tpu_run.sh", *TPU, "--slices=2", "--dry-run", "--", *BUCKET)
    assert done.returncode == 0, done.stderr
    create, _, *for_each, check = printed(done.stdout)
    assert {"--node-count=2", "--node-prefix=a"} <= set(create) and "--node-id=a" not in create
    assert len(for_each) == 6 and all("--worker=all" in words for words in for_each)
    for words, slice_ in zip(for_each, ("a-0", "a-0", "a-1", "a-1", "a-0", "a-1"), strict=True):
        assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
        assert slice_ in words or f"{slice_}:vlm_jax.tar.gz" in words
    assert check == ["gcloud", "storage", "ls", "gs://bucket/run/final.json"]


@pytest.mark.parametrize("slices", ["1", "2"])
def test_a_run_in_a_bucket_goes_on_until_the_bucket_holds_its_end(tmp_path, fakes, slices):
    """The trainer of the first attempt was asked to stop, and exits 0 without having finished."""
    fakes("gcloud", rf"""
        here="{tmp_path}"
        case "$*" in
          *queued-resources\ describe*) echo ACTIVE ;;
          *vlm_jax.train*) if [ -e "$here/logs/2" ]; then touch "$here/finished"; fi ;;
          storage\ ls\ gs://bucket/run/final.json) [ -e "$here/finished" ] ;;
          *test\ -f*) exit 3 ;;
          *tpu-vm\ describe*) echo READY ;;
        esac""")  # fmt: skip
    words = [*TPU, f"--slices={slices}", f"--logs={tmp_path}/logs", "--", *BUCKET]
    done = run(tmp_path, "tpu_run.sh", *words)
    assert done.returncode == 0, done.stderr
    assert "finished (gs://bucket/run/final.json)" in done.stdout
    assert sum("vlm_jax.train" in line for line in calls(tmp_path)) == 2 * int(slices)


def test_a_worker_names_its_lines_and_saves_when_it_is_asked_to_stop(tmp_path, fakes):
    """The command that a slice gets, run here: the trainer's exit code and last words come through."""
    done = run(tmp_path, "tpu_run.sh", *TPU, "--dry-run", "--", *BUCKET)
    command = next(w for w in printed(done.stdout)[-2] if w.startswith("--command="))
    (tmp_path / "vlm_jax/.venv/bin").mkdir(parents=True)
    (tmp_path / "vlm_jax/.venv/bin/activate").touch()
    fakes("hostname", "echo worker-7")
    fakes("python", 'trap "echo saved; exit 3" TERM; echo up; while true; do sleep 0.05; done')
    worker = subprocess.Popen(
        ["bash", "-c", command.removeprefix("--command=")], cwd=tmp_path, env=environment(tmp_path),
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert worker.stdout is not None and worker.stdout.readline() == "worker-7: up\n"
    os.killpg(worker.pid, signal.SIGTERM)
    *others, last = worker.stdout.read().splitlines()
    assert last == "worker-7: saved" and all(line.startswith("worker-7: ") for line in others)
    assert worker.wait(timeout=30) == 3


GKE = ["--name=a", "--image=i:1", "--accelerator=tpu-v5-lite-podslice", "--topology=16x16"]


def test_a_jobset_has_a_job_per_slice_and_a_pod_per_host(tmp_path, fakes):
    fakes("kubectl", f'cat > "{tmp_path}/applied.yaml"')
    words = [*GKE, "--slices=2", "--spot", "--", *BUCKET, "--config.data.image_roots=('a b',)"]
    dry = run(tmp_path, "gke_run.sh", "--dry-run", *words)
    assert dry.returncode == 0 and not calls(tmp_path), dry.stderr
    done = run(tmp_path, "gke_run.sh", *words)
    assert done.returncode == 0 and calls(tmp_path) == ["kubectl apply -f -"]
    assert (tmp_path / "applied.yaml").read_text() == dry.stdout
    (job,) = yaml.safe_load(dry.stdout)["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    assert (job["replicas"], hosts["parallelism"], hosts["completions"]) == (2, 64, 64)
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert shlex.split(container["args"][0]) == [*BUCKET, "--config.data.image_roots=('a b',)"]


@pytest.mark.parametrize(("trainer", "finished", "code"), [(0, True, 0), (0, False, 1), (2, True, 2)])  # fmt: skip
def test_a_pod_succeeds_only_when_the_run_is_finished(tmp_path, fakes, trainer, finished, code):
    """The command of the manifest, with a `python` that is the trainer and the question for final.json in turn."""
    check = f"exit {0 if finished else 1}"
    fakes("python", f'case "$*" in *vlm_jax.train*) exit {trainer} ;; *final.json) {check} ;; esac')
    dry = run(tmp_path, "gke_run.sh", "--dry-run", *GKE, "--", *BUCKET)
    (job,) = yaml.safe_load(dry.stdout)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    done = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode != 0) == (code != 0), done.stderr
    asked = [line for line in calls(tmp_path) if "final.json" in line]
    assert len(asked) == (trainer == 0)


def test_a_pod_that_is_asked_to_stop_lets_the_trainer_save(tmp_path, fakes):
    body = (
        'trap "touch $WORK/saved; exit 0" TERM; touch "$WORK/up"; while true; do sleep 0.05; done'
    )
    fakes("python", f'case "$*" in *vlm_jax.train*) {body} ;; *) exit 1 ;; esac')
    dry = run(tmp_path, "gke_run.sh", "--dry-run", *GKE, "--", *BUCKET)
    (job,) = yaml.safe_load(dry.stdout)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    pod = subprocess.Popen(words, env=environment(tmp_path, WORK=str(tmp_path)))
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=30) == 1  # saved, but not finished: the set is started anew
    assert (tmp_path / "saved").exists()


def test_a_preempted_slice_is_asked_for_anew_until_the_run_is_finished(tmp_path, fakes):
    # The first attempt loses its slice; the second one finishes.
    fakes("gcloud", f"""
        here="{tmp_path}"
        case "$*" in
          *queued-resources\\ describe*) cat "$here/state" 2>/dev/null || exit 1 ;;
          *queued-resources\\ create*) echo ACTIVE > "$here/state" ;;
          *queued-resources\\ delete*) rm "$here/state" ;;
          *vlm_jax.train*)
            if [ -e "$here/once" ]; then touch "$here/finished"; else
              touch "$here/once"; echo SUSPENDED > "$here/state"; exit 1; fi ;;
          *test\\ -f*) [ -e "$here/finished" ] ;;
          *tpu-vm\\ describe*) echo PREEMPTED ;;
        esac""")  # fmt: skip
    done = run(tmp_path, "tpu_run.sh", *TPU, f"--logs={tmp_path}/logs", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "finished (/shared/run/final.json)" in done.stdout
    order = [
        next(w for w in ("create", "delete", "vlm_jax.train", "other") if w in line or w == "other")
        for line in calls(tmp_path)
        if "describe" not in line and "scp" not in line and "tar -xzf" not in line
    ]
    assert [w for w in order if w != "other"] == [
        "create", "vlm_jax.train", "delete", "create", "vlm_jax.train",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["1", "2"]


def test_a_command_that_fails_three_times_on_a_healthy_slice_is_given_up(tmp_path, fakes):
    fakes("gcloud", """
        case "$*" in
          *queued-resources\\ describe*) echo ACTIVE ;;
          *vlm_jax.train* | *test\\ -f*) exit 1 ;;
          *tpu-vm\\ describe*) echo READY ;;
        esac""")  # fmt: skip
    words = [*TPU, "--delete", f"--logs={tmp_path}/logs", "--", *TRAIN]
    done = run(tmp_path, "tpu_run.sh", *words)
    assert done.returncode == 1 and "three times in a row" in done.stderr
    assert sum("vlm_jax.train" in line for line in calls(tmp_path)) == 3
    assert "queued-resources delete a" in calls(tmp_path)[-1]
    assert run(tmp_path, "tpu_run.sh", *words).returncode == 1
    kept = sorted(p.name for p in (tmp_path / "logs").iterdir())
    assert kept == ["1", "2", "3", "4", "5", "6"]


def test_a_slice_that_cannot_be_asked_for_is_given_up(tmp_path, fakes):
    """No login or no quota: nothing exists and nothing can be made."""
    fakes(
        "gcloud",
        'case "$*" in *queued-resources\\ describe*) exit 1 ;; *) echo "no quota" >&2; exit 1 ;; esac',
    )
    done = run(tmp_path, "tpu_run.sh", *TPU, f"--logs={tmp_path}/logs", "--", *TRAIN)
    assert done.returncode == 1 and "three times in a row: could not be asked for" in done.stderr
    assert "no quota" in done.stderr and "the slice stays, and costs, until" in done.stdout
    assert sum("queued-resources create" in line for line in calls(tmp_path)) == 3


def test_a_setup_does_not_hide_that_the_installation_failed(tmp_path):
    done = run(tmp_path, "tpu_create.sh", *TPU, "--setup=false || true", "--dry-run")
    command = next(w for w in printed(done.stdout)[-1] if w.startswith("--command="))
    (tmp_path / "vlm_jax.tar.gz").write_text("no archive")
    words = ["bash", "-c", command.removeprefix("--command=")]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode != 0


def test_a_worker_with_an_old_python_gets_a_newer_one(tmp_path, fakes):
    """The command that installs, run here with a python3 that is 3.10 and brings 3.11 by uv."""
    done = run(tmp_path, "tpu_create.sh", *TPU, "--dry-run")
    command = next(w for w in printed(done.stdout)[-1] if w.startswith("--command="))
    subprocess.run(["tar", "-czf", tmp_path / "vlm_jax.tar.gz", "-C", ROOT, "scripts"], check=True)
    fakes("python3", 'case "$*" in *sys.version_info*) exit 1 ;; *find*) echo newer-python ;; esac')
    fakes("newer-python")
    done = subprocess.run(
        ["bash", "-c", command.removeprefix("--command=")], cwd=tmp_path, env=environment(tmp_path),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "python3 -m uv python install --quiet 3.11" in calls(tmp_path)
    (made,) = [line for line in calls(tmp_path) if "-m venv" in line]
    assert made == f"newer-python -m venv {tmp_path}/vlm_jax/.venv"
    assert done.returncode  # the fake makes no environment


def slurm(tmp_path, *words, **more):
    return run(tmp_path, "slurm.sbatch", f"--workdir={tmp_path}", "--config=c.py", *words, SLURM_JOB_ID="7", **more)  # fmt: skip


def test_a_slurm_job_runs_one_process_per_node_with_all_its_gpus(tmp_path, fakes):
    fakes("srun")
    done = slurm(tmp_path, "--dry-run", SLURM_GPUS_ON_NODE="4")
    export, step, requeue = done.stdout.splitlines()
    assert export == "export JAX_LOCAL_DEVICE_IDS=0,1,2,3"
    words = ["python", "-m", "vlm_jax.train", f"--workdir={tmp_path}", "--config=c.py"]
    assert shlex.split(step)[0] == "srun" and shlex.split(step)[-5:] == words
    assert requeue.endswith(f" {tmp_path}/final.json || scontrol requeue 7 ")
    assert not calls(tmp_path)
    header = (ROOT / "scripts" / "slurm.sbatch").read_text()
    for line in ("--ntasks-per-node=1", "--gpus-per-node=8", "--requeue", "--signal=B:USR1@300"):
        assert f"#SBATCH {line}\n" in header


@pytest.mark.parametrize(
    ("body", "code", "queued"),
    [("exit 0", 0, True), ('touch "$WORK/final.json"', 0, False), ("exit 2", 2, False)],
)
def test_a_slurm_job_is_queued_again_when_it_saved_before_the_end(
    tmp_path, fakes, body, code, queued
):
    fakes("srun", body)
    fakes("scontrol")
    done = slurm(tmp_path, WORK=str(tmp_path))
    assert done.returncode == code
    assert ("scontrol requeue 7" in calls(tmp_path)) == queued


def test_the_signal_before_the_time_limit_reaches_the_trainer(tmp_path, fakes):
    fakes(
        "srun",
        'trap "touch $WORK/saved; exit 0" TERM\ntouch "$WORK/up"\nwhile true; do sleep 0.05; done',
    )
    fakes("scontrol")
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), f"--workdir={tmp_path}"]
    job = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path, WORK=str(tmp_path), SLURM_JOB_ID="7")
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "saved").exists() and "scontrol requeue 7" in calls(tmp_path)


def test_a_sweep_over_machines_is_three_jobs_in_a_row(tmp_path, fakes):
    fakes(
        "sbatch",
        'case "$*" in *sweep-shared*) echo 11 ;; *sweep-cells*) echo "12;cluster" ;; *) echo 13 ;; esac',
    )
    words = [
        "--machines=4",
        "--sbatch=--partition=gpu",
        "--config=configs/mini.py",
        "--workdir=/s/x",
    ]
    dry = run(tmp_path, "sweep_array.sh", "--dry-run", *words)
    assert dry.returncode == 0 and len(printed(dry.stderr)) == 3 and not calls(tmp_path)
    done = run(tmp_path, "sweep_array.sh", *words)
    assert done.returncode == 0, done.stderr
    sweep = "--wrap=python -m vlm_jax.sweep --config=configs/mini.py --workdir=/s/x"
    first, cells, report = calls(tmp_path)
    assert first.endswith(f"--requeue --partition=gpu {sweep} --part=shared")
    assert cells.endswith(
        f"--array=0-3 --dependency=afterok:11 {sweep} --part=$SLURM_ARRAY_TASK_ID/4"
    )
    assert report.endswith(f"--dependency=afterok:12 {sweep}")


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu_create.sh", ["--name=a", "--zone=z"], "--name, --zone and --type are needed"),
        ("tpu_create.sh", [*TPU, "--tipe=x"], "unknown argument '--tipe=x'"),
        ("tpu_create.sh", ["--name=a", "--zone=z", "--type=v9-8"], "no image is known for 'v9-8'"),
        ("tpu_run.sh", [*TPU, "--", "python", "--workdir=here"], "--workdir=/ABSOLUTE/PATH"),
        ("tpu_create.sh", [*TPU, "--slices=0"], "'0' is no number of slices"),
        ("gke_run.sh", [*GKE, "--", "python", "--workdir=/disk"], "--workdir=gs://.. are needed"),
        (
            "gke_run.sh",
            [*GKE, "--topology=16", "--", *BUCKET],
            "'16' is none; give chips such as 16x16",
        ),
        ("slurm.sbatch", ["--config=c.py"], "--workdir=WORKDIR is needed"),
        ("sweep_array.sh", ["--machines=0", "--workdir=w"], "--machines=N (1 or more)"),
    ],
)
def test_a_wrong_call_is_answered_with_the_usage_and_exit_code_2(tmp_path, script, words, message):
    done = run(tmp_path, script, *words)
    assert done.returncode == 2 and message in done.stderr
    assert run(tmp_path, script, "--help").stdout.startswith("usage: ")
