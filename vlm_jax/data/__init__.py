# SPDX-License-Identifier: Apache-2.0
"""From examples on disk, or made from a seed, to batches on the devices."""
