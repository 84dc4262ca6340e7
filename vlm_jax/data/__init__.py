"""From files to fixed-shape NumPy batches: images, chat, tokenizer, sources, pipeline. Never imports jax."""
