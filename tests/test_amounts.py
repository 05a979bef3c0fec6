# SPDX-License-Identifier: Apache-2.0
"""Sizes are written as people say them."""

import pytest

from vlm_jax.reports import amounts


@pytest.mark.parametrize(
    "billions, text",
    [(2.5e-5, "25k"), (8e-4, "800k"), (1.2e-2, "12M"), (0.5, "0.5B"), (14.0, "14B"), (5e-8, "50")],
)
def test_sizes_are_written_as_people_say_them(billions, text):
    assert amounts.parameters_text(billions) == text


@pytest.mark.parametrize("billions, text", [
    (9.808e-6, "9.8 k"), (2.9856e-5, "30 k"), (1.1296e-4, "113 k"), (0.5, "0.5 B"), (1.8, "1.8 B"),
    (7, "7 B"), (72.7, "73 B"), (3e-3, "3 M"), (5e-7, "500"), (9.96e-7, "996"), (1e-6, "1 k"),
])  # fmt: skip
def test_a_size_in_a_legend_has_two_digits_or_its_whole_part(billions, text):
    assert amounts.llm_text(billions) == f"{text} parameters"
