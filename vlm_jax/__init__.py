# SPDX-License-Identifier: Apache-2.0
"""For a given inference budget: which language model, and how many visual tokens?"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`vlm_jax.VLM`, imported when it is asked for: planning needs no jax."""
    if name == "VLM":
        from vlm_jax.serving.model import VLM

        return VLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
