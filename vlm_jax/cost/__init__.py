# SPDX-License-Identifier: Apache-2.0
"""What a request costs: sizes, FLOPs, bytes and time on a chip. numpy and scipy only."""
