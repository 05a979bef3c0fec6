# SPDX-License-Identifier: Apache-2.0
"""No file of the package is without a test: one imports it, or names it and goes through it."""

import ast
import re
from pathlib import Path

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.evals.tasks import TASKS
from vlm_jax.verbs.parser import VERBS

TESTS = Path(__file__).parent
HOME = TESTS.parent
# Files that no test imports, by the test that goes through them.
THROUGH = {
    "test_clips.py": "data.clip_facts data.tokens",
    "test_compiled.py": "aot.arrays aot.programs aot.search aot.table",
    "test_files.py": "buckets",
    "test_heap.py": "heap",
    "test_matryoshka.py": "compressors.last_level compressors.matryoshka",
    "test_door.py": "cost.model planning.question",
    "test_cost.py": "cost.parameters",
    "test_synthetic.py": "data.benchmark.questions data.benchmark.balance",
    "test_sources.py": "data.llava data.row_source",
    "test_packing.py": "data.packed_rows",
    "test_fwd2bot.py": "compressors.summary compressors.summary_tokens",
    "test_window_attention.py": "kernels.absorbed_tpu kernels.unprojected_tpu kernels.window_tpu",
    "test_fit.py": "law.families",
    "test_method_laws.py": "reports.method_laws",
    "test_generate.py": "serving.answer",
    "test_law.py": "law.components law.intervals",
    "test_causal_attention.py": "models.segments",
    "test_selected_models.py": "compressors.cdpruner.text weights.text_tower",
    "test_plan.py": "planning.answers planning.choices planning.parsing "
    "reports.plan_figure rows.measured",
    "test_pruning_cost.py": "models.pruning.description models.pruning.fastv "
    "models.pruning.pyramiddrop",
    "test_report.py": "reports.score_tables",
    "test_engine.py": "serving.programs serving.schedule",
    "test_engine_whole.py": "serving.whole",
    "test_server.py": "server.answers server.fields server.metrics",
    "test_server_faults.py": "server.gate",
    "test_score.py": "evals.predictions evals.task",
    "test_checkpoint.py": "training.arrays training.verify",
    "test_optimizer.py": "training.compiler",
    "test_train.py": "training.first_weights training.inputs",
    "test_convert.py": "weights.conversion weights.fitting weights.sizes weights.values",
    "test_layouts.py": "weights.classes weights.layouts",
}


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    return ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file, in programs of a child too."""
    text, found = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for module, names in re.findall(r"from (vlm_jax[\w.]*) import ([\w, ]+)", text):
        found |= {
            module,
            *(f"{module}.{name.split()[0]}" for name in names.split(",") if name.strip()),
        }
    return found


def test_every_file_of_the_package_has_its_test():
    tests = {path.name: path.read_text() for path in sorted(TESTS.glob("*.py"))}
    found = set().union(*(imported(TESTS / name) for name in tests))
    modules = {name_of(path): path for path in sorted(HOME.glob("vlm_jax/**/*.py"))}
    # A room's own file that says no more than what the room is needs none.
    known = {name for name, path in modules.items() if ast.parse(path.read_text()).body[1:]}
    # The tests of compressors take every method from its table.
    assert "COMPRESSORS" in tests["test_compressors.py"]
    found |= {method.__module__ for method in COMPRESSORS.values()}
    found |= {f"{method.__module__}.module" for method in COMPRESSORS.values()}
    # The tests of scores take every benchmark.
    assert "TASKS" in tests["test_score.py"]
    found |= {f"vlm_jax.evals.tasks.{task}" for task in TASKS}
    # A verb is called as a command is.
    found |= {f"vlm_jax.verbs.{verb}" for verb in VERBS
              if any(f'"{verb}"' in text for text in tests.values())}  # fmt: skip
    through = {f"vlm_jax.{name}" for names in THROUGH.values() for name in names.split()}
    untested = sorted(known - found - through)
    assert not untested, f"import it in a test, or say in THROUGH which goes through it: {untested}"
    assert through <= known and THROUGH.keys() <= tests.keys()
