# SPDX-License-Identifier: Apache-2.0
"""The page of `vlm-jax serve`: a chat with an image at two budgets side by side, in one file."""

from collections.abc import Sequence

from vlm_jax.reports.page import TEMPLATES


def build(name: str, supported: Sequence[int], default: int, *, auto: str, with_key: bool) -> str:
    """The HTML.

    Args:
      name: of the served model.
      supported: V that a request may ask for, ascending; `default` is one of them.
      auto: what the server does when it chooses V, in words.
      with_key: whether requests need a key, which the page then asks for.
    """
    return TEMPLATES.get_template("chat.html").render(
        question=f"{name}: ask about a picture",
        chat={"model": name, "supported": list(supported), "default": default},
        auto=auto,
        with_key=with_key,
    )
