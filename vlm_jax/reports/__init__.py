# SPDX-License-Identifier: Apache-2.0
"""Draws and words laws, costs and plans; the only room that imports matplotlib and writes HTML."""
