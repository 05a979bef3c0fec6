# SPDX-License-Identifier: Apache-2.0
"""The base of descriptions of methods whose LLM reads all patches and a summary behind them.

V visual tokens (`tokens`), those of the summary  P patches
"""

from dataclasses import dataclass

from vlm_jax.compressors.method import Interface, Products, UpToPatches


@dataclass(frozen=True)
class Summary(UpToPatches):
    """V learned tokens stand behind the patches; the LLM makes a summary of them."""

    def products(self, interface: Interface, form: str) -> Products:
        rows = interface.rows
        return Products(reading=rows * interface.up, other=rows * interface.down)
