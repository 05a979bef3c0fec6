# SPDX-License-Identifier: Apache-2.0
"""Bytes, seconds and memory of a request on a chip: each phase at the slower of compute and memory.

seconds of a phase = max(FLOPs / peak, bytes / bandwidth) / efficiency + communication
                     + passes through the LLM * overhead of a pass

for the whole batch, and an overhead of the batch (`calibration.py`). Bytes are weights (once per
pass) and the key-value cache; activations stay on the chip in this model, which holds where memory
binds (few tokens) and does not matter where compute does.

V and Q are visual and text tokens, G generated tokens, P patches.
"""

import dataclasses

from vlm_jax.compressors.method import Method, Number
from vlm_jax.cost import flops as cost
from vlm_jax.cost.calibration import IDEAL, Calibration
from vlm_jax.cost.chips import Chip
from vlm_jax.models.pruning import Pruning
from vlm_jax.models.sizes import LLMSize, ViTSize

PHASES = cost.PHASES
BYTES = {"f32": 4, "bf16": 2, "int8": 1, "fp8": 1}
QUERIES = 128  # that attend at once in prefill: `QUERIES` of vlm_jax/models/llm.py
HOP_SECONDS = 1e-6  # of one step from chip to chip (jax-ml.github.io/scaling-book)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Types of the LLM's weights, of its key-value cache and of its products; "" is the chip's own.

    Scales of quantized numbers, under 1 % of them, are not counted. ValueError for unknown types.
    """

    weights: str = ""
    cache: str = ""
    products: str = ""

    def __post_init__(self) -> None:
        for name, kind in dataclasses.asdict(self).items():
            if kind and kind not in BYTES:
                raise ValueError(f"{name} in {kind!r}: choose one of {', '.join(BYTES)}")


AS_CHIP = Stored()


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: Q text tokens and G generated ones, in batches of `batch` requests.

    `question`, the tokens of the separate question pass, is Q when None; with `cached_text` keys
    and values of the text are kept from an earlier request; `frames` of a video are encoded
    together, V tokens each; `pruning` leaves visual tokens out between the layers. All as in
    `cost.request_flops`.
    """

    Q: Number
    G: Number = 0
    batch: int = 1
    question: Number | None = None
    cached_text: bool = False
    frames: Number = 1
    pruning: Pruning | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one batch needs at once."""

    weights: Number
    cache: Number
    activations: Number

    @property
    def total(self) -> Number:
        """Bytes of all kinds together."""
        return self.weights + self.cache + self.activations


def cache_numbers(llm: LLMSize) -> int:
    """Numbers in the key-value cache per token and sequence."""
    return 2 * llm.depth * llm.kv_heads * llm.head_size


def _encoder_weights(vit: ViTSize) -> int:
    return cost.vit_parameters(dataclasses.replace(vit, depth=max(vit.levels)))


def _given(vit: ViTSize, compressor: Method, request: Request) -> Number:
    """Visual tokens of a row that the LLM is given."""
    return cost.given_tokens(compressor, vit, request.frames, request.pruning)


def request_flops(vit: ViTSize, compressor: Method, llm: LLMSize, request: Request) -> cost.Flops:
    """FLOPs by phase of one request of the batch."""
    return cost.request_flops(
        vit,
        compressor,
        llm,
        Q=request.Q,
        G=request.G,
        question=request.question,
        cached_text=request.cached_text,
        frames=request.frames,
        pruning=request.pruning,
    )


def request_bytes(
    vit: ViTSize,
    compressor: Method,
    llm: LLMSize,
    request: Request,
    *,
    bytes_per_number: int = 2,
    stored: Stored = AS_CHIP,
) -> dict[str, Number]:
    """Bytes that each phase moves to or from memory for a whole batch."""
    flops = request_flops(vit, compressor, llm, request)
    V, batch = _given(vit, compressor, request), request.batch
    V = cost.cached_tokens(V, compressor, llm, request.pruning)
    tables = llm.vocab * llm.width
    body = cost.llm_parameters(llm) - tables * (1 if llm.tied_embeddings else 2)
    weight = BYTES.get(stored.weights, bytes_per_number)
    token = cache_numbers(llm) * batch * BYTES.get(stored.cache, bytes_per_number)
    passes = max(request.G - 1, 0)
    keys = passes * (request.Q + V) + passes * (passes + 1) / 2
    return {
        "encoder": _encoder_weights(vit) * bytes_per_number,
        "compressor": cost.compressor_parameters(compressor, vit, llm) * bytes_per_number
        + (body * weight if compressor.condenses else 0),
        "question": body * weight if flops.question else 0,
        # Cached text is read, everything else is written: one cache entry per token either way.
        "prefill": (body + tables) * weight + token * (request.Q + V),
        "decode": passes * (body + tables) * weight + token * keys,
    }


def passes(compressor: Method, request: Request) -> dict[str, Number]:
    """How often each phase goes through the LLM; phases that do not are left out."""
    asked = not request.cached_text
    return {
        "compressor": int(compressor.condenses),
        "question": int(compressor.query == "separate" and asked),
        "prefill": 1 + int(compressor.reads_prefix and asked),
        "decode": max(request.G - 1, 0),
    }


def communication(
    vit: ViTSize, compressor: Method, llm: LLMSize, request: Request, chip: Chip
) -> dict[str, Number]:
    """Seconds of each phase that several chips spend on sums over heads and hidden units.

    Every block, whose matrices are cut over all chips, adds its output up twice: after attention
    and after the MLP. A sum over a ring sends 2 (count - 1) / count of the array from each chip, in
    2 (count - 1) steps. It is not hidden behind products.
    """
    if chip.count == 1:
        return dict.fromkeys(PHASES, 0.0)
    others = chip.count - 1

    def sums(tokens: Number, width: int, blocks: int) -> Number:
        array = request.batch * tokens * width * chip.bytes_per_number
        ring = 2 * others / chip.count * array / chip.link_bytes_per_s
        return 2 * blocks * (ring + 2 * others * HOP_SECONDS) if tokens else 0.0

    V = cost.read_tokens(_given(vit, compressor, request), llm, request.pruning)
    through = passes(compressor, request)
    text = request.Q if request.question is None else request.question
    rows = request.frames * (compressor.encoded(vit.side) + vit.first)
    return {
        "encoder": sums(rows, vit.width, max(vit.levels)),
        # Small but for a pass of the LLM: every chip computes all of it.
        "compressor": sums(request.frames * compressor.condensed(vit.rows), llm.width, llm.depth),
        "question": through["question"] * sums(text, llm.width, llm.depth),
        "prefill": sums(V + (0 if request.cached_text else request.Q), llm.width, llm.depth),
        "decode": through["decode"] * sums(1, llm.width, llm.depth),
    }


def seconds(
    vit: ViTSize,
    compressor: Method,
    llm: LLMSize,
    request: Request,
    chip: Chip,
    *,
    calibration: Calibration = IDEAL,
    stored: Stored = AS_CHIP,
) -> dict[str, Number]:
    """Seconds of each phase for a whole batch, and "request", the overhead of it, if there is one.

    Raises ValueError for a type of products whose peak is not known.
    """
    flops = dataclasses.asdict(request_flops(vit, compressor, llm, request))
    traffic = request_bytes(
        vit, compressor, llm, request, bytes_per_number=chip.bytes_per_number, stored=stored
    )
    sent, through = communication(vit, compressor, llm, request, chip), passes(compressor, request)
    peak = dict.fromkeys(("question", "prefill", "decode"), chip.peak(stored.products))
    found = {
        phase: max(
            request.batch * flops[phase] / peak.get(phase, chip.peak_flops),
            traffic[phase] / chip.hbm_bytes_per_s,
        )
        / calibration.efficiency.get(phase, 1.0)
        + sent[phase]
        + through.get(phase, 0) * calibration.step_seconds
        for phase in PHASES
    }
    return found | ({"request": calibration.request_seconds} if calibration.request_seconds else {})


def live_bytes(
    vit: ViTSize, compressor: Method, llm: LLMSize, tokens: Number, bytes_per_number: int
) -> tuple[Number, Number]:
    """Bytes of one image's activations before the row, and of the row's `tokens` in prefill.

    Before it are the encoder and, if there is one, the LLM's pass over an image alone. Of a block
    those count that are alive at its peak: its input, its widest inner result and the scores in
    float32, of all pairs of the encoder's rows and of QUERIES at once in the LLM; and the scores of
    the vocabulary.
    """
    rows = compressor.encoded(vit.side) + vit.first
    encode = rows * (2 * vit.width + max(vit.mlp, 4 * vit.width) + len(vit.levels) * vit.width)
    encode = encode * bytes_per_number + 4 * vit.heads * rows**2

    def through(tokens: Number) -> Number:
        numbers = tokens * (2 * llm.width + max(2 * llm.mlp, 2 * llm.heads * llm.head_size))
        return numbers * bytes_per_number + 4 * llm.heads * min(QUERIES, tokens) * tokens

    alone = through(compressor.condensed(vit.rows))
    return max(encode, alone), through(tokens) + 4 * llm.vocab


def memory(
    vit: ViTSize,
    compressor: Method,
    llm: LLMSize,
    request: Request,
    *,
    bytes_per_number: int = 2,
    stored: Stored = AS_CHIP,
) -> Memory:
    """Bytes needed at once: all weights, the full cache, and the larger of `live_bytes`."""
    V, batch = _given(vit, compressor, request), request.batch
    towers = _encoder_weights(vit) + cost.compressor_parameters(compressor, vit, llm)
    weights = towers * bytes_per_number
    weights += cost.llm_parameters(llm) * BYTES.get(stored.weights, bytes_per_number)
    tokens = request.Q + V
    encode, prefill = live_bytes(vit, compressor, llm, tokens, bytes_per_number)
    live = max(request.frames * encode, prefill)
    kept = cache_numbers(llm) * BYTES.get(stored.cache, bytes_per_number)
    cached = request.Q + cost.cached_tokens(V, compressor, llm, request.pruning) + request.G
    return Memory(weights=weights, cache=batch * kept * cached, activations=batch * live)
