# SPDX-License-Identifier: Apache-2.0
"""Published weights: files, names and configurations, to and from the models of this package."""
