# SPDX-License-Identifier: Apache-2.0
"""A row of tokens with the places of its images, not yet cut or padded."""

from typing import NamedTuple


class Tokens(NamedTuple):
    """A row, not yet cut or padded."""

    ids: list[int]
    mask: list[bool]  # which ids are supervised
    places: tuple[int, ...]  # before which id the visual tokens of each image belong, ascending
    questions: list[
        list[int]
    ]  # the input of a question-reading compressor for each image, or for none

    @property
    def image_at(self) -> int | None:
        """The place of the first image, None without one."""
        return self.places[0] if self.places else None

    @property
    def question(self) -> list[int]:
        """The question of the first image."""
        return self.questions[0]
