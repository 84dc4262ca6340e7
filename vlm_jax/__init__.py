"""Compute-optimal vision-language models in JAX: train with any visual-token compressor, measure, fit the law, plan.

From Python   load (a model that answers)  start (a training)  fit (the law of a table): see api.py. Importing the package is
              quick; what a function needs is loaded when it is called
commands      train  evaluate  sweep  show  features (a frozen encoder's features, computed once)
              ask (one question)  chat (on a terminal)  serve (over HTTP, with a page)
              laws.fit  laws.plan  laws.plot  aot  benchmarks.tables
settings/     model: frozen dataclasses   run: those of a training   presets: named sizes   cli: flags   checks: one-line errors
files         the one door to paths        progress   the one progress bar   parts  a sweep's parts side by side
sharding      processes, mesh, logical axes -> mesh axes
layers        the blocks of every module   models/    attention, vit, projector, lm; vlm: the whole flow
compressors/  settings, counts; modules/   data/      records, images, chat, tokenizer, pipeline, sampling, packing
hf/           a model directory in and out storage/   a workdir: its settings, checkpoints, weights
costs/        chips, FLOPs, memory, price: the one place that counts
training/     inputs, step, losses, optim, loop, guard (NaN), interrupt (SIGTERM), telemetry, outline (what a run says)
inference/    tasks, answer, generate, evaluation, features, lmms_eval; model: what `load` returns, over slots (the cache),
              batching (requests come and go), prompts, conversation, timing
serving/      the HTTP server: protocol, application, metrics, page
benchmarks/   rows, score, reduce          miniworld/ the embedded benchmark
laws/         table, fitting, law, planning, figures, report; commands fit, plan, plot
aot/          a step compiled for machines that one does not have
sweeps/       an experiment over many cells: plan, stages, checks, dry run, running, conclusion

Array axes, one letter and one meaning everywhere (signatures, einsums, docs):

    B batch             T decoder positions        S key/value positions
    I images per sample Q query-text tokens        P patches of one image
    M visual tokens     L layers                   V vocabulary
    N query heads       K key/value heads          G = N / K    H head dim
    C encoder width     Z width of the taps        D decoder width    F mlp width

The scaling law's letters (N parameters, V visual tokens) appear only inside laws/; elsewhere they are spelt out as
lm_params and visual_tokens.
"""

import importlib

__version__ = "0.1.0"

# Name -> (module, name there). They are looked up when they are first used: jax takes seconds to import.
_PUBLIC = {
    "load": ("vlm_jax.api", "load"),
    "start": ("vlm_jax.api", "start"),
    "fit": ("vlm_jax.api", "fit"),
    "ConfigError": ("vlm_jax.settings.checks", "ConfigError"),
}
__all__ = ["ConfigError", "__version__", "fit", "load", "start"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'vlm_jax' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    module, there = _PUBLIC[name]
    return getattr(importlib.import_module(module), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
