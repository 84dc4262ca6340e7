"""The alphabet of array axes: one letter, one meaning, everywhere (signatures, einsums, docs).

    B batch             T decoder positions        S key/value positions
    I images per sample Q query-text tokens        P patches of one image
    M visual tokens     L layers                   V vocabulary
    N query heads       K key/value heads          G = N / K    H head dim
    C encoder width     Z width of the taps        D decoder width    F mlp width

The scaling law's letters (N parameters, V visual tokens) appear only inside `laws/`; elsewhere they are
spelt out as `lm_params` and `visual_tokens`.
"""
