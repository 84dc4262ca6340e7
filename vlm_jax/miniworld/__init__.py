"""The embedded benchmark: a small world whose images, questions and texts are made from one seed.

`scenes` says what exists, `rendering` draws it, `questions` asks about it and knows the answers, `generate` writes
LLaVA-format datasets and a tokenizer to disk. A run reads them like any other data.
"""
