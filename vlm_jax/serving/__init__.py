# SPDX-License-Identifier: Apache-2.0
"""A trained model answers: decoding, requests, chat templates, predictions of a split."""
