# SPDX-License-Identifier: Apache-2.0
"""A trained model answers: decoding, requests, predictions and scores of a split."""
