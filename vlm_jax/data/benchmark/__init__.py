# SPDX-License-Identifier: Apache-2.0
"""The embedded benchmark: scenes, their descriptions, questions and pages, made from a seed."""
