# SPDX-License-Identifier: Apache-2.0
"""For a given inference budget: which language model, and how many visual tokens?"""

__version__ = "0.1.0"
