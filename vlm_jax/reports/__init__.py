# SPDX-License-Identifier: Apache-2.0
"""Draws and words what the scaling package computes; the only room that imports matplotlib."""
