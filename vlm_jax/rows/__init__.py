# SPDX-License-Identifier: Apache-2.0
"""Results: the rows of a grid and tables of other tools, as points for the law."""
