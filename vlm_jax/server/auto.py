# SPDX-License-Identifier: Apache-2.0
"""V by the law: the fewest visual tokens that err no more than the best that are in time.

The law says what V tokens of this model err, the cost model how long a request with them takes on
this chip at the present load. Both are the planner's (vlm_jax/planning). The law answers inside the
range on which it was fitted, for the compressor it was fitted with, and only where it fits; else
the server's default is taken, and the response says which of these was missing.

V visual tokens of an image   N LLM parameters in billions   Q text tokens   G new tokens
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_jax.compressors.method import Method
from vlm_jax.cost import flops as cost
from vlm_jax.cost import parameters, roofline
from vlm_jax.cost.calibration import IDEAL, Calibration
from vlm_jax.cost.chips import Chip
from vlm_jax.law.answer import CELLS_ALONE
from vlm_jax.models.sizes import VLMSize
from vlm_jax.planning import answers, decision
from vlm_jax.planning.mixture import Mixture
from vlm_jax.server.choices import Choices
from vlm_jax.server.schema import Budget

EPSILON = decision.EPSILON  # of error: V within it of the best are as good


@dataclass(frozen=True)
class Load:
    """What the server does when a request arrives: answers under way, and requests that wait.

    `measured` is the time of its last answers over what the cost model says of them; None before
    the first.
    """

    active: int
    waiting: int
    slots: int
    measured: float | None = None


def law_for(law: Mixture | None, method: Method, N: float) -> tuple[Mixture | None, str]:
    """The law that answers for a model, or None and why there is none."""
    if law is None:
        return None, "the server has no law (--law)"
    kind = method.kind
    mine = law if law.kind == kind else law.others.get(kind, law)
    if mine.kind not in (None, kind):
        return None, f"the law was fitted with {mine.method}, and this model has {kind}"
    for name, weight in mine.weights.items():
        answer = mine.answers[name]
        doubt = answers.doubt_of(name, mine.laws[name], answer)
        if weight and doubt and (answer.by == CELLS_ALONE or answer.cells is None):
            return None, f"the law gives no answer: {doubt}"
    ends = mine.domain("N")
    if ends is None:
        return None, "the law does not say on which N it was fitted"
    if not ends[0] * (1 - 1e-9) <= N <= ends[1] * (1 + 1e-9):
        return None, (
            f"the law was fitted on N={ends[0]:.4g} to {ends[1]:.4g} billion, and this model has "
            f"N={N:.4g}"
        )
    return mine, ""


@dataclass(frozen=True)
class Auto:
    """Takes V for a model by its law.

    Attributes:
      size: the description of the served model.
      law: None without one.
      chip: None without one: then there is no time to predict, and no target.
      target_ms: milliseconds from a request to the end of its answer; None without a target.
      calibration: what is reached of the chip's roofline.
      epsilon: V that err at most this much more than the best are as good.
    """

    size: VLMSize
    law: Mixture | None = None
    chip: Chip | None = None
    target_ms: float | None = None
    calibration: Calibration = IDEAL
    epsilon: float = EPSILON
    silent: str = field(init=False)
    fitted: Mixture | None = field(init=False)

    def __post_init__(self) -> None:
        if self.target_ms is not None and self.chip is None:
            raise ValueError("--target-ms needs --chip, on which the time is predicted")
        if self.target_ms is not None and self.law is None:
            raise ValueError("--target-ms needs --law, which says what fewer visual tokens err")
        fitted, silent = law_for(self.law, self.size.compressor, self.N)
        object.__setattr__(self, "fitted", fitted)
        object.__setattr__(self, "silent", silent)

    @property
    def N(self) -> float:
        """The LLM's parameters in billions."""
        return parameters.llm_parameters(self.size.llm) / 1e9

    def describe(self) -> str:
        """What "auto" does here, in words."""
        if self.fitted is None:
            return f"the server's default: {self.silent}"
        limit = "" if self.target_ms is None else f" within {self.target_ms:g} ms"
        return (
            f"by the law: the fewest tokens whose expected error is at most {self.epsilon:g} more "
            f"than the best's{limit}"
        )

    def take(
        self,
        choices: Choices,
        *,
        images: int,
        text: int,
        new: int,
        load: Load,
        most: int | None = None,
    ) -> Budget:
        """The budget of a request of Q `text` and G `new` tokens and so many images.

        `most` limits V. Without an answer of the law it is the server's default, or less.
        """
        silent = self.silent
        if self.fitted is not None:
            side = self.size.interface.side
            planned = [v for v in self.size.compressor.planned(side) if v in choices.supported]
            low, high = self.fitted.domain("V") or (0.0, 0.0)
            known = [v for v in planned if low <= v <= high and (most is None or v <= most)]
            if known:
                return self._chosen(self.fitted, known, images, text, new, load)
            limit = "" if most is None else f" up to {most}"
            silent = f"the law was fitted on V={low:g} to {high:g}, and this model has none{limit}"
        offered = [v for v in choices.supported if most is None or v <= most]
        V = max((v for v in offered if v <= choices.default), default=offered[0])
        what = "the server's default" if V == choices.default else f"the most up to {most}"
        return Budget(visual_tokens=V, by="server", why=f"{what}: {silent}")

    def _chosen(
        self, law: Mixture, offered: Sequence[int], images: int, text: int, new: int, load: Load
    ) -> Budget:
        """The fewest of the `offered` V that err at most epsilon more than the best in time."""
        times = {V: self.milliseconds(V, images, text, new, load) for V in offered}
        target = self.target_ms
        inside = [V for V in offered if target is None or (times[V] or 0.0) <= target]
        late = not inside
        inside = inside or [min(offered, key=lambda V: times[V] or 0.0)]
        errors = np.array([float(law.error(self.N, V, text)) for V in inside])
        best = int(errors.argmin())
        taken = int(np.flatnonzero(errors <= errors[best] + self.epsilon)[0])
        V = inside[taken]
        draws = law.draws(np.full(len(inside), self.N), np.array(inside, np.float64), text)
        odds = None if draws is None else decision.odds(draws)
        ends = law.interval(self.N, V, text)
        return Budget(
            visual_tokens=V,
            by="law",
            why=self._why(inside, taken, best, errors, late, odds),
            warnings=self._warnings(law, V, text, load),
            predicted_error=float(errors[taken]),
            interval=None if ends is None else (float(ends[0]), float(ends[1])),
            p_best=None if odds is None else float(odds.best[taken]),
            predicted_ms=times[V],
            target_ms=target,
            load=dataclasses.asdict(load),
            new_tokens=new,
        )

    def _why(
        self, inside: Sequence[int], taken: int, best: int, errors: np.ndarray, late: bool,
        odds: decision.Odds | None,
    ) -> str:  # fmt: skip
        """The choice in one sentence."""
        if late:
            return (
                f"no V is expected within {self.target_ms:g} ms at this load: V={inside[0]} is the "
                "soonest"
            )
        limit = "" if self.target_ms is None else f" expected within {self.target_ms:g} ms"
        gap = float(errors[taken] - errors[best])
        why = f"V={inside[best]} errs least of the {len(inside)} V{limit}"
        if taken != best:
            why = f"errs {gap:.4f} more than V={inside[best]}, the best of {len(inside)} V{limit}"
        if odds is not None:
            why += (
                f"; best with probability {odds.best[taken]:.2f}, expected regret "
                f"{odds.regret[taken]:.4f}"
            )
        return why

    def _warnings(self, law: Mixture, V: int, text: int, load: Load) -> list[str]:
        """What to know before trusting the choice."""
        found = law.outside(self.N, V, text)
        if law.method is None:
            found.append("the law does not say with which compressor it was fitted")
        for name, weight in law.weights.items():
            if weight and (doubt := answers.doubt_of(name, law.laws[name], law.answers[name])):
                found.append(doubt)
        if self.chip is not None and self.calibration == IDEAL and load.measured is None:
            found.append("times are the roofline's, which no system reaches: give --efficiency or "
                         "--calibration, or wait for measured answers")  # fmt: skip
        return found

    def flops(
        self, V: int, *, images: int, text: int, new: int, encoded: float = 1.0, cached: int = 0
    ) -> dict[str, float]:
        """FLOPs of a request by phase.

        Args:
          encoded: the share of its images that were encoded, and not found in the index.
          cached: tokens whose keys and values were kept from an earlier request.
        """
        llm = self.size.llm
        if images:
            asked = dict(Q=text, G=new, frames=images, pruning=self.size.pruning)
            found = cost.request_flops(self.size.vit, self._method(V), llm, **asked)
            spent = dataclasses.asdict(found)
            # Where text reads the patches, an index keeps what the encoder gives of them.
            fused = self.size.compressor.prefusion > 0
            for phase in ("encoder",) if fused else ("encoder", "compressor", "question"):
                spent[phase] *= encoded
        else:
            spent = dict.fromkeys(cost.PHASES, 0.0)
            spent["decode"] = cost.decode_flops(llm, context=text, G=new)
        if cached or not images:
            spent["prefill"] = cost.llm_flops(llm, text + V * images - cached, cached=cached)
        return {phase: float(amount) for phase, amount in spent.items()}

    def _method(self, V: int) -> Method:
        """The compressor at V; itself if it has one V."""
        method = self.size.compressor
        return method.at(V) if method.serves_several else method

    def milliseconds(self, V: int, images: int, text: int, new: int, load: Load) -> float | None:
        """From a request to the end of its answer, at this load; None without a chip.

        Its own reading, then a step of all answers under way for each token. If every slot is
        taken, it first waits until those ahead of it have had one, each of them as long as it. All
        of it times what the last answers took of their own prediction.
        """
        if self.chip is None:
            return None
        together = min(load.active, load.slots - 1) + 1
        seconds = functools.partial(roofline.seconds, self.size.vit, self._method(V), self.size.llm)
        pruning = self.size.pruning
        asked = roofline.Request(text, new, frames=max(images, 1), pruning=pruning)
        alone = seconds(asked, self.chip, calibration=self.calibration)
        steps = seconds(
            dataclasses.replace(asked, batch=together), self.chip, calibration=self.calibration
        )
        own = sum(time for phase, time in alone.items() if phase != "decode") + steps["decode"]
        ahead = load.waiting + 1 if load.active + load.waiting >= load.slots else 0
        return 1e3 * own * (1 + ahead / load.slots) * (load.measured or 1.0)
