# SPDX-License-Identifier: Apache-2.0
"""How many visual tokens a request gets: what it asks for, or what the law says is worth its time.

A request has one V for all of its images. It says V itself (visual_tokens), a limit
(mm_processor_kwargs.max_soft_tokens), a word (image_url.detail), or "auto". The response says what
was taken and why; what cannot be is refused.

V visual tokens of an image   N LLM parameters in billions   Q text tokens   G new tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_jax.compressors import COMPRESSORS, ELASTIC
from vlm_jax.server.auto import Auto, Load
from vlm_jax.server.choices import Choices, listed
from vlm_jax.server.messages import Placed
from vlm_jax.server.refusals import Refusal
from vlm_jax.server.schema import Budget, ChatRequest

SEVERAL = [kind for kind, method in COMPRESSORS.items() if method.any_tokens]


@dataclass(frozen=True)
class Chooser:
    """Takes V for requests; `auto` answers for "auto", and says why where it cannot."""

    choices: Choices
    auto: Auto

    def take(
        self, request: ChatRequest, images: Sequence[Placed], *, text: int, new: int, load: Load
    ) -> Budget | None:
        """The budget of a request of Q `text` and G `new` tokens; None without an image.

        Raises:
          Refusal: for wishes that contradict each other, and for V that the model does not serve.
        """
        wished = request.visual_tokens
        soft = request.mm_processor_kwargs and request.mm_processor_kwargs.max_soft_tokens
        details = {placed.image.detail: placed for placed in images if placed.image.detail}
        most = soft if isinstance(soft, int) else None
        if isinstance(wished, int):
            self._check(wished, most)
        if most is not None and most < self.choices.supported[0]:
            raise Refusal(
                f"mm_processor_kwargs.max_soft_tokens={most}: this model gives at least "
                f"V={self.choices.supported[0]} ({listed(self.choices.supported)})",
                param="mm_processor_kwargs.max_soft_tokens",
                code="unsupported_budget",
            )
        if len(details) > 1 and wished is None and soft is None:
            raise Refusal(
                f"image_url.detail is {' and '.join(sorted(details))} in one request: all of its "
                "images get the same V; give one detail, or visual_tokens",
                param=f"{list(details.values())[1].where}.image_url.detail",
                code="unsupported_budget",
            )
        if not images:
            return None
        detail = next(iter(details), None)
        if self.choices.one:
            return self._only(wished, soft, detail)
        aside = f"; detail={' and '.join(sorted(details))} gives way to it" if details else ""
        if isinstance(wished, int):
            return Budget(visual_tokens=wished, by="request", why=f"visual_tokens={wished}{aside}")
        if most is not None:
            V = max(v for v in self.choices.supported if v <= most)
            if wished is None:
                why = f"the most that max_soft_tokens={most} allows{aside}"
                return Budget(visual_tokens=V, by="request", why=why)
        if wished is None and soft is None and detail in ("low", "high"):
            V = self.choices.low if detail == "low" else self.choices.high
            return Budget(visual_tokens=V, by="detail", why=f"detail={detail} of the image")
        asked = "auto" in (wished, soft) or detail == "auto"
        if not asked:
            why = "the server's default: the request has no budget"
            return Budget(visual_tokens=self.choices.default, by="server", why=why)
        found = self.auto.take(
            self.choices, images=len(images), text=text, new=new, load=load, most=most
        )
        found.why += aside if "auto" in (wished, soft) else ""
        return found

    def _check(self, wished: int, most: int | None) -> None:
        """Raises Refusal for a V that cannot be."""
        supported = self.choices.supported
        if wished not in supported:
            way_out = (
                f"leave it out; compressors that give several are {', '.join(SEVERAL)}, and "
                f"{', '.join(ELASTIC)} if they were trained so (compressor.elastic)"
                if self.choices.one
                else f"choose one of {listed(supported)}, or auto"
            )
            raise Refusal(
                f"visual_tokens={wished}: this model gives V={listed(supported)}: {way_out}",
                param="visual_tokens",
                code="unsupported_budget",
            )
        if most is not None and wished > most:
            raise Refusal(
                f"visual_tokens={wished} is more than max_soft_tokens={most}: give one of them",
                param="visual_tokens",
                code="unsupported_budget",
            )

    def _only(self, wished: int | str | None, soft: int | str | None, detail: str | None) -> Budget:
        """The budget of a model with one V, which says what had no effect."""
        why = f"this model's compressor gives V={self.choices.default} and no other"
        names = {"visual_tokens": wished, "max_soft_tokens": soft, "detail": detail}
        words = [f"{name}={x}" for name, x in names.items() if isinstance(x, str)]
        if words:
            why += f"; {' and '.join(words)} changes nothing"
        return Budget(visual_tokens=self.choices.default, by="model", why=why)
