# SPDX-License-Identifier: Apache-2.0
"""OpenAI's chat API before a model that answers: requests checked, budgets chosen, answers sent."""
