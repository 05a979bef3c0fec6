# SPDX-License-Identifier: Apache-2.0
"""A compressor that is written here and entered in the table goes through every verb.

Nothing outside this file knows it: it is described, built, trained, evaluated, reported, converted
out and in, and planned with. The file is a configuration too, of the smallest grid of it.
"""

import ast
import dataclasses
import json
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from test_house import METHODS, MODULES, tree, where

from vlm_jax import mesh as meshes
from vlm_jax.__main__ import main
from vlm_jax.compressors import COMPRESSORS
from vlm_jax.compressors.compressor import Compressor
from vlm_jax.compressors.method import Interface, Method, Products, linear, window_side
from vlm_jax.compressors.tensors import linear as linear_tensors
from vlm_jax.compressors.window import windows
from vlm_jax.layers import Linear
from vlm_jax.models import vlm
from vlm_jax.rows import records
from vlm_jax.training import runs
from vlm_jax.training.workdir import finished
from vlm_jax.weights import folder


@dataclasses.dataclass(frozen=True)
class LoudestMethod(Method):
    """The largest number of each channel in each window, plus the question; one linear layer."""

    kind: ClassVar[str] = "loudest"
    query = "separate"

    @staticmethod
    def module():
        return Loudest

    def parameters(self, interface):
        return linear(interface.width, interface.llm_width) + linear(
            interface.llm_width, interface.llm_width
        )

    def products(self, interface, form):
        return Products(reading=self.tokens * interface.up, other=interface.down)

    def published(self):
        return linear_tensors("loud", "loud") | linear_tensors("asked", "asked")


class Loudest(Compressor):
    """Its module."""

    def __init__(self, method, interface, *, rngs, kernels="auto"):
        super().__init__(method, interface)
        self.window = window_side(self.tokens, self.side)
        width, out = interface.llm_width, ("batch", "len", "feature")
        self.loud = Linear(
            "BVE,ED->BVD", (self.width, width), dims=("embed", "none"), out=out, rngs=rngs
        )
        self.asked = Linear(
            "BD,DF->BF", (width, width), dims=("embed", "none"), out=("batch", "feature"), rngs=rngs
        )

    def __call__(self, levels, question=None):
        loudest = windows(levels[..., -self.width :], self.tokens).max(2)
        return self.loud(loudest) + self.asked(question.astype(levels.dtype))[:, None]


def get_config():
    """One cell of it: 4 tokens of 16 patches, one LLM."""
    c = tiny.get_config()
    c.compressor.kind = "loudest"
    c.encoder.steps, c.align.steps, c.finetune.steps = 1, 0, 2
    with c.unlocked():
        c.grid.llms = ConfigDict(dict(only=dict(depth=1)))
    c.grid.tokens, c.grid.baselines = (4,), ()
    return c


@pytest.fixture(autouse=True)
def entered(monkeypatch):
    """The one line of the table."""
    monkeypatch.setitem(COMPRESSORS, LoudestMethod.kind, LoudestMethod)


def test_a_new_method_goes_through_every_verb(tmp_path, capsys):
    run, model, back = tmp_path / "run", tmp_path / "model", tmp_path / "back"
    assert main(["grid", "--config=tests/test_new_method.py", f"--workdir={run}"]) == 0
    (row,) = records.read(run / "rows.jsonl")
    between = Interface(side=4, width=16, levels=2, llm_width=16)
    described = LoudestMethod(tokens=4)
    assert (row.compressor, row.query, row.V) == ("loudest", "separate", 4)
    assert row.compressor_parameters == described.parameters(between)
    assert row.flops["compressor"] == 4 * between.up + between.down and row.flops["question"] > 0
    assert "loudest" in (run / "report/index.html").read_text()

    cell = run / "cells" / row.cell
    assert main(["convert", f"--from={cell}", f"--to={model}"]) == 0
    made = json.loads((model / "config.json").read_text())["compressor"]
    assert (made["kind"], made["tokens"]) == ("loudest", 4)
    assert main(["convert", f"--from={model}", f"--to={back}"]) == 0
    with jax.set_mesh(meshes.make(devices=jax.devices()[:1])):
        trained = finished(
            runs.of(str(cell), "--from").home, tiny.recipe(runs.of(str(cell), "--from").config)
        )
        ours, theirs = (folder.tensors_of(m) for m in (trained, tiny.model_of(back)))
        assert {"compressor.loud.weight", "compressor.asked.bias"} <= ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)

    law = dict(form="multiplicative", A=0.5, alpha=0.08, beta=0.02, D=0.0)
    (tmp_path / "law.json").write_text(json.dumps(law))
    capsys.readouterr()
    asked = [f"--law={tmp_path / 'law.json'}", "--flops=1e12", "--cost=full", "--text-tokens=20"]
    assert main(["plan", *asked, "--compressors=loudest", "--json"]) == 0
    assert "loudest" in capsys.readouterr().out


def test_its_flops_are_the_compilers(mesh1):
    wide = Interface(side=4, width=256, levels=1, llm_width=512)
    with jax.set_mesh(mesh1):
        module = tiny.compressor("loudest", tokens=4, side=4, width=256, llm_width=512)
        given = jnp.ones((1, 16, 256)), jnp.ones((1, 512))
        compiled = jax.jit(lambda m, *x: m(*x)).lower(module, *given).compile()
    counted = LoudestMethod(tokens=4).products(wide, "built").forward(1)
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.01)
    assert vlm.parameters(module) == LoudestMethod(tokens=4).parameters(wide)


KIND = r"\b(compressor|method|wish)(\.kind\b|\[.kind.\])"  # of a compressor, and no other kind


def strings(node: ast.expr | None) -> set[str]:
    """The strings of a constant, or of a sequence or the keys of a mapping of constants."""
    inside = getattr(node, "elts", None) or getattr(node, "keys", None) or [node]
    return {n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_only_a_methods_own_folder_knows_it_by_name():
    """No comparison with a method's name, no branch and no table by it: a method is asked."""
    own = {home.rsplit(".", 1)[-1] for home in METHODS}
    # Words that mean other things too count where a compressor or its kind is compared.
    names, words = (
        set(COMPRESSORS) - {"none", "pool", "random", "uniform"},
        r"\bkind\b|compressor|method",
    )
    wrong = []
    for path in MODULES:
        if path.parent.name in own and path.parent.parent.name == "compressors":
            continue
        for node in ast.walk(tree(path)):
            sides: list[ast.expr | None] = []
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
            elif isinstance(node, ast.match_case):
                sides = [n.value for n in ast.walk(node.pattern) if isinstance(n, ast.MatchValue)]
            elif isinstance(node, ast.Dict):
                sides = [node]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("with"):
                sides = list(node.args)  # startswith, endswith
            found = set().union(*map(strings, sides)) & set(COMPRESSORS)
            of_kind = isinstance(node, ast.Compare) and re.search(words, ast.unparse(node))
            absent = isinstance(node, ast.Compare) and ast.unparse(node).endswith(" None")
            asked = any(re.search(KIND, ast.unparse(s)) for s in sides if s) and not absent
            if found & names or (found and of_kind) or (asked and isinstance(node, ast.Compare)):
                wrong.append(where(path, node.lineno if hasattr(node, "lineno") else None))
    # Shapes of a picture and ranges of a rope have kinds too, and no compressor.
    elsewhere = ("vlm_jax/data/benchmark", "vlm_jax/data/nlvr", "vlm_jax/models/rope")
    wrong = [line for line in wrong if not line.startswith(elsewhere)]
    assert not wrong, f"ask the method (vlm_jax/compressors/method.py): {wrong}"
