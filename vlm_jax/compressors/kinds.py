# SPDX-License-Identifier: Apache-2.0
"""Which compressors are trained, and which choose patches without training."""

from vlm_jax.compressors import COMPRESSORS

TRAINED, FREE, CONTROL = "trained", "training-free", "control"
CONTROLS = ("random", "uniform")  # they read nothing of what an image shows


def kind_of(compressor: str) -> str:
    """Whether a compressor is trained, selects patches without training, or is a control.

    One that is not described here counts as trained.
    """
    if compressor in CONTROLS:
        return CONTROL
    method = COMPRESSORS.get(compressor)
    return FREE if method is not None and method.selects else TRAINED
