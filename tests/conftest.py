"""Shapes and dtypes of every signature are checked at run time, in every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs run a few times each: compiling them less thoroughly takes a third off the suite's CPU time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from absl import flags
from jaxtyping import install_import_hook

hook = install_import_hook("vlm_jax", "typechecker.check")
hook.__enter__()

if not flags.FLAGS.is_parsed():  # grain's worker processes read an absl flag
    flags.FLAGS.mark_as_parsed()
