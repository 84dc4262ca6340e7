"""What our adapter uses of lmms-eval 0.7.3, for machines without it: base class, Instance, manifest.

The signatures, fields and class attributes are those of lmms_eval/api/model.py, api/instance.py and models/registry_v2.py.
"""

import abc
import dataclasses
import sys
import types
from importlib.util import find_spec
from typing import Any


class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        words = [word.split("=", 1) for word in arg_string.split(",")]
        given = {k: int(v) if v.isnumeric() else v for k, v in words}
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**given, **more)


@dataclasses.dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any]

    def __post_init__(self):
        self.task_name, self.doc_id, self.repeats = (
            self.metadata[name] for name in ("task", "doc_id", "repeats")
        )

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


INSTALLED = find_spec("lmms_eval") is not None


def install(monkeypatch):
    """Makes `import lmms_eval` find this file's classes; the real package, where there is one, stays."""
    if INSTALLED:
        return
    content = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, classes in content.items():
        module = types.ModuleType(name)
        module.__dict__.update(classes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
