# SPDX-License-Identifier: Apache-2.0
"""Results: the rows of a grid and the tables of other tools, read as points for the law."""
