"""The embedded benchmark: a small world whose images, questions and texts are made from one seed.

`scenes` says what exists, `rendering` draws it, `questions` asks about it and knows the answers, `generate` writes
LLaVA-format datasets and a tokenizer to disk. A run reads them like any other data.
"""

# Limits of the miniature, which a report prints beside its numbers.
CAVEATS = (
    "The tasks are built so that each resource binds: reasoning is recall and short composition, whose error the LM's "
    "capacity sets; OCR needs as many visual tokens as there are characters. The order of the exponents is therefore "
    "nearly built in. The miniature shows the machinery and the order, not the paper's ratio.",
    "Of a scene only wall and floor need more than one visual token, which keeps reasoning's beta small; of a sheet only the "
    "relations of characters need the LM's capacity, which keeps OCR's alpha small. Both shares were chosen.",
    "The curves are not clean power laws over so short a range. With D free, alpha moves a lot along the flat direction of "
    "the fit; compare exponents at D = 0 and trust their order only.",
    "Differences between seeds are larger than what resampling questions would suggest: read intervals over seeds.",
    "N counts the parameters of the layers, without embeddings.",
)
