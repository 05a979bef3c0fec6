# SPDX-License-Identifier: Apache-2.0
"""The scaling law: its forms, how it is fitted and how sure it is. numpy and scipy only."""
