# SPDX-License-Identifier: Apache-2.0
"""The base of descriptions of methods whose LLM reads all patches and a summary behind them.

V visual tokens (`tokens`), those of the summary  P patches
"""

from dataclasses import dataclass

from vlm_jax.compressors.method import Interface, Method, Products, tilings


@dataclass(frozen=True)
class Summary(Method):
    """V learned tokens stand behind the patches; the LLM makes a summary of them."""

    @staticmethod
    def supported(side: int) -> list[int]:
        """Any number up to that of the patches of a `side` x `side` grid."""
        return list(range(1, side**2 + 1))

    @classmethod
    def planned(cls, side: int) -> list[int]:
        """The V at which other methods can be compared with it."""
        return tilings(side)

    def products(self, interface: Interface, form: str) -> Products:
        rows = interface.rows
        return Products(reading=rows * interface.up, other=rows * interface.down)
