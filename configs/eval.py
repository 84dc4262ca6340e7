"""Evaluation: set eval.checkpoint (a training workdir), eval.benchmarks and eval.annotations."""

from configs import default


def get_config():
    c = default.get_config()
    # Prompts are split over the devices; a model too large for one lies on as few as hold it (inference/placement.py).
    c.mesh.tensor = 0
    return c
