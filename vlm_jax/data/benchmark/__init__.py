# SPDX-License-Identifier: Apache-2.0
"""The embedded benchmark: scenes, what is said of them, questions and pages, made from a seed."""
