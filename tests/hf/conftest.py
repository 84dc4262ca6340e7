"""What tests of model directories share."""

from pathlib import Path

import hf_models
import pytest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> a directory that every test may copy."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = hf_models.build(name, root / str(len(made)))
        return made[name]

    return get
