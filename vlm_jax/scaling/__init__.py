# SPDX-License-Identifier: Apache-2.0
"""The scaling law, its costs and the planner: numpy and scipy only, so a laptop without JAX can."""
