"""Compute-optimal vision-language models in JAX: train with any visual-token compressor, measure, fit the law, plan.

commands      train  evaluate  sweep  show  features  aot/ (cost of a compiled run; chips)  laws.fit  laws.plan   cli: flags, errors
settings      config: frozen dataclasses   presets: named sizes   experiment: one run's settings, checked and saved
              inherit: those of the run it starts from   hub: names that are not on this disk
model         axes  layers  models/ (vit, projector, lm; vlm: the whole flow)  compressors/ (module, token count, FLOPs)
training      loop  step  losses  optim  adapters (LoRA)  sharding
keeping it    checkpoint  guard (NaN)  interrupt (SIGTERM)  disk  telemetry  outline (what a run says before and after)
data          data/ (images, chat, tokenizer, sources, pipeline, sampling, packing)  miniworld/ (the embedded benchmark)
costs         costs/ (FLOPs of a question and of a training step, counted in one place)
evaluation    generate  answer (a checkpoint that answers questions)  inference/ (a frozen encoder's cached features)
               benchmarks/ (rows, score, reduce)
              lmms_eval (a model of that harness)
the law       laws/ (table, fit, plan, plot, report)
"""

__version__ = "0.1.0"
