# SPDX-License-Identifier: Apache-2.0
"""Law and budget in, LLM size and number of visual tokens out. numpy and scipy only."""
