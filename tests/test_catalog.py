# SPDX-License-Identifier: Apache-2.0
"""A file of chips and LLMs is read as written, and what is wrong in it is named with its place."""

import json

import pytest

from vlm_jax.cost import catalog, chips
from vlm_jax.cost.lifetime import LLAVA, paper_training_flops
from vlm_jax.cost.parameters import llm_parameters

CHIP = {"peak_tflops": {"bf16": 100, "int8": 200}, "gb_per_s": 900, "memory_gib": 22.5,
        "source": "a data sheet"}  # fmt: skip
LLM = {"vocab": 32000, "depth": 32, "width": 4096, "mlp": 11008, "heads": 32}


def written(folder, fields):
    (folder / "mine.json").write_text(json.dumps(fields))
    return catalog.read(folder / "mine.json")


def test_what_is_written_is_read(tmp_path):
    found = written(tmp_path, {"chips": {"mine": CHIP}, "llms": {"seven": LLM}})
    mine = found.chips["mine"]
    assert (mine.peak_flops, mine.peak("int8"), mine.hbm_bytes_per_s) == (1e14, 2e14, 9e11)
    assert mine.hbm_bytes == 22.5 * chips.GIB and mine.source == "a data sheet"
    billions, llm = found.llms["seven"]
    assert billions == llm_parameters(llm) / 1e9 == pytest.approx(6.738, abs=1e-3)
    assert (llm.kv_heads, llm.head_size) == (32, 128)
    # The page's example is one that can be read.
    lines = (catalog.__doc__ or "").split("file.\n\n")[1].split("\n\nThe fields")[0]
    (tmp_path / "page.toml").write_text("\n".join(line.strip() for line in lines.splitlines()))
    assert list(catalog.read(tmp_path / "page.toml").llms) == ["mine-3b"]


@pytest.mark.parametrize("fields, words", [
    ({"chip": {}}, "unknown field chip, did you mean chips"),
    ({"chips": {"a": {**CHIP, "bandwidth": 3}}}, "chips.a: unknown field bandwidth"),
    ({"chips": {"a": {"gb_per_s": 3}}}, "peak_tflops, memory_gib, source missing"),
    ({"chips": {"a": {**CHIP, "gb_per_s": "900"}}}, "chips.a gb_per_s: '900' is not a number"),
    ({"chips": {"a": {**CHIP, "peak_tflops": {"int8": 4}}}}, "bf16 missing"),
    ({"chips": [1]}, "a table of tables"),
    ({"llms": {"b": {"vocab": 3}}}, "llms.b: depth, width, mlp, heads missing"),
    ({"llms": {"b": {**LLM, "kv_heads": 5}}}, "kv_heads=5 does not divide"),
])  # fmt: skip
def test_what_is_wrong_is_named(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        written(tmp_path, fields)


def test_a_file_that_is_neither_is_named(tmp_path):
    (tmp_path / "mine.toml").write_text("{")
    with pytest.raises(ValueError, match="neither TOML nor JSON"):
        catalog.read(tmp_path / "mine.toml")


def test_training_in_the_papers_terms_is_near_all_its_products():
    """LLaVA-1.5-7B at 576 tokens: 6 N per trained token; FLOPs of all phases within a fifth."""
    from configs import base, sizes
    from vlm_jax import compressors
    from vlm_jax.cost import lifetime
    from vlm_jax.models.sizes import LLMSize, ViTSize

    method = compressors.describe(dict(kind="none", tokens=576, heads=8, query="none"))
    llm = LLMSize.of(sizes.LLM["vicuna-1.5-7b"])
    whole = lifetime.training_flops(ViTSize.of(base.get_config().vit), method, llm, LLAVA)
    paper = paper_training_flops(llm_parameters(llm) / 1e9, 576, LLAVA)
    assert whole == pytest.approx(paper, rel=0.2) and 3e19 < whole < 4e19
