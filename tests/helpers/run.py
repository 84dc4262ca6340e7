"""Trains the tiny config, for tests that need a process of its own: `run.py DATA WORKDIR [field=value ...]`.

Fields are dotted paths into the config with JSON values, such as train.num_steps=9. devices=8 fakes as many; address=...,
process=1 and processes=2 join others.
"""

import json
import os
import sys
from pathlib import Path

import jax
import tiny

from vlm_jax import train
from vlm_jax.settings import cli

ENVIRONMENT = {
    "address": "JAX_COORDINATOR_ADDRESS",
    "process": "JAX_PROCESS_ID",
    "processes": "JAX_NUM_PROCESSES",
}


def command(argv):
    config = tiny.config(Path(argv[0]))
    for word in argv[2:]:
        path, value = word.split("=", 1)
        if path in ENVIRONMENT:
            os.environ[ENVIRONMENT[path]] = str(json.loads(value))
        elif path == "devices":
            jax.config.update("jax_num_cpu_devices", json.loads(value))
        else:
            *blocks, field = path.split(".")
            node = config
            for block in blocks:
                node = node[block]
            node[field] = json.loads(value)
    train.train(config, argv[1])


if __name__ == "__main__":
    sys.exit(cli.run(command))
