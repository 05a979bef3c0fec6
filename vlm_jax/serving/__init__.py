# SPDX-License-Identifier: Apache-2.0
"""A trained model answers: decoding, requests, an engine, predictions and scores of a split."""
