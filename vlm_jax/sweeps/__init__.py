"""An experiment over many cells: a language model and a number of visual tokens each, trained, evaluated, fitted by the law.

A config is an ordinary one (`configs/default.py`), whose blocks hold for every training, with a block `sweep`:

    cells     seeds x compressors x lms x visual_tokens, and `beside`: cells that are shown, not fitted. A compressor with counts
              of its own has them in visual_tokens_of; its other settings stand in compressor_settings.
              An LM is a key of presets.LM or a model directory; fields of the config that differ for it (mesh, micro-batches,
              remat, a rate) stand in lm_settings.
    stages    in their order, each with its data, trainable parts, steps or epochs, rates and batch. A stage is trained once
              per "seed" (an encoder), per "lm" (a language model on text) or per "cell". `init` names where a part comes from:
              an earlier stage, or a model directory.
    inputs    the folder from which relative paths begin. With a `prepare` step, a function (folder, seed, **prepare_settings),
              paths begin from the folder that it filled, DIR/seed<k>/data.
    cache     records whose images' features are computed once; stages with cached = True read them in place of the images.
    benchmarks, annotations, image_roots, families   as in the block `eval`; a family "" is the benchmark's own.

An elastic compressor (M3, MQT) is trained once per LM and evaluated at each of its counts. Two names stand for baselines:
"resized" shrinks the image before the encoder and compresses nothing; "text_only" leaves the image out.

Modules: plan (cells and stages, as the config says), stages (the config of each training), checks (all mistakes at once),
dry_run (what it costs), running (what is missing, on one machine or many), parts (side by side in worker processes), answers (the rows
of the table and their questions), conclusion (laws, report) and its appendix.
"""
