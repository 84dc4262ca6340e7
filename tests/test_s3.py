"""Inputs and results on s3://, against a real S3 server on this machine: `pip install s3fs`, and moto_server on the PATH.

Their versions of other packages conflict with those of the tests, so both belong in environments of their own (docs/buckets.md).
"""

import shutil
import subprocess
import time
import urllib.request

import hf_models
import pytest
import tiny
from gcs_server import free_port

from configs import eval as eval_config
from vlm_jax import evaluate, files, train
from vlm_jax.settings.checks import ConfigError
from vlm_jax.storage import checkpoint
from vlm_jax.storage import run as experiment

BUCKET = "s3://bucket"


@pytest.mark.parametrize(
    "use",
    [experiment.last_step, checkpoint.saved_names, lambda run: checkpoint.load_params(run, {})],
)
def test_a_run_on_s3_is_refused_and_told_where_it_can_be(use):
    with pytest.raises(ConfigError, match=r"'s3://bucket/run' cannot hold checkpoints: .*gs://"):
        use(f"{BUCKET}/run")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    fs = pytest.importorskip("s3fs", reason="s3fs is not installed here")
    moto = shutil.which("moto_server")
    if moto is None:
        pytest.skip("moto_server is not on the PATH")
    port = free_port()
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip
    running = subprocess.Popen(
        [moto, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        for _ in range(200):
            try:
                urllib.request.urlopen(values["AWS_ENDPOINT_URL"], timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        fs.S3FileSystem().mkdir("bucket")
        yield
    running.kill()
    running.wait()


def test_a_run_from_inputs_on_s3_is_that_from_a_disk_and_so_is_its_evaluation_there(
    s3, world, tmp_path
):
    """Annotations, pictures, tokenizer and two model directories are read, an evaluation is written."""
    for name in ("llama, many shards", "clip tower"):
        hf_models.build(name, tmp_path / "models" / name)
    files.upload(tmp_path / "models", files.to_path(f"{BUCKET}/models"))
    files.upload(world, files.to_path(f"{BUCKET}/data"))
    read = []
    for place, data, models_in, out in (
        ("disk", str(world), tmp_path / "models", tmp_path / "eval"),
        ("s3", f"{BUCKET}/data", f"{BUCKET}/models", f"{BUCKET}/eval"),
    ):
        cfg, run = tiny.with_models(world, models_in), tmp_path / place
        cfg.data.annotations, cfg.data.image_roots = (f"{data}/data.json",), (data,)
        cfg.data.tokenizer = f"{data}/tokenizer"
        train.train(cfg, str(run))
        asked = eval_config.get_config()
        asked.eval.update(
            {"checkpoint": str(run), "benchmarks": ("llava",), "annotations": (data,), "batch_size": 4, "max_new_tokens": 3}
        )  # fmt: skip
        evaluate.evaluate(asked, str(out))
        found = files.to_path(str(out)) / "llava" / "predictions.jsonl"
        read.append(((run / "metrics.jsonl").read_bytes(), found.read_bytes()))
    assert read[0] == read[1] and all(read[0])
    with pytest.raises(ConfigError, match="cannot hold checkpoints"):
        experiment.open_workdir(f"{BUCKET}/run")
