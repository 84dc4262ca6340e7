"""Evaluation: set eval.checkpoint (a training workdir), eval.benchmarks and eval.annotations."""

from configs import default


def get_config():
    return default.get_config()
