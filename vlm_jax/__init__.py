"""Compute-optimal vision-language models in JAX: train with any visual-token compressor, measure, fit the law, plan.

config, presets   frozen settings and named model sizes          axes, layers, sharding   letters, blocks, device mesh
models/           vit, projector, lm, vlm (the whole flow)        compressors/             one file each: module, token count, FLOPs
data/             images, chat, tokenizer, sources, pipeline      miniworld/               the embedded benchmark
train  generate  evaluate  sweep                                  benchmarks/              rows, prompt, score, reduce
optim  checkpoint                                                 laws/                    table, flops, fit, plan, plot, report
"""

__version__ = "0.1.0"
