"""One training per LM size for every number of visual tokens, beside the miniature's cells: querypool, which looks at the question.

    python -m vlm_jax.sweep --config=configs/mini_elastic.py --workdir=runs/mini

With the workdir of a finished miniature (scripts/quickstart.sh) the five trainings of querypool are all that runs. Each takes
twice the steps of one cell and serves four. The report then holds both laws.
"""

from configs import mini


def get_config():
    c = mini.get_config()
    s = c.sweep
    s.title = "The miniature: one training per LM size beside one per cell"
    s.compressors = ("tokenpacker", "querypool")
    s.beside, s.looks = (), ()
    s.stages.query_aware_vlm.steps = 800  # each draws one of the four numbers of tokens
    return c
