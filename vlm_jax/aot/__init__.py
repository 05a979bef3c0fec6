# SPDX-License-Identifier: Apache-2.0
"""What the TPU compiler makes of a step, on a machine without a TPU."""
