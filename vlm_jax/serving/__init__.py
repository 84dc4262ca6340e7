"""A model over HTTP: OpenAI's chat protocol, continuous batching, limits, metrics and a page. Needs `pip install vlm_jax[serve]`.

limits.py     what a request may ask for, and the errors that say so
protocol.py   a request's JSON -> a record of questions and pictures; an answer -> JSON
engine.py     the thread that steps the batcher; programs compiled before the first request
app.py        the routes
page.html     the page at /: no build step, nothing from elsewhere
"""
