# SPDX-License-Identifier: Apache-2.0
"""Which compressors are trained, and which choose patches without training."""

from vlm_jax.compressors import COMPRESSORS

TRAINED, FREE, CONTROL, PLAIN = "trained", "training-free", "control", "uncompressed"
# Of those that show patches as they are: controls read nothing of what an image shows.
NAMED = {"random": CONTROL, "uniform": CONTROL, "none": PLAIN}


def kind_of(compressor: str) -> str:
    """Whether a compressor is trained, selects without training, is a control, or keeps all.

    One that is not described here counts as trained.
    """
    method = COMPRESSORS.get(compressor)
    selects = method is not None and method.selects
    return NAMED.get(compressor, FREE) if selects else TRAINED
