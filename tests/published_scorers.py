# SPDX-License-Identifier: Apache-2.0
"""Runs functions of lmms-eval and VLMEvalKit, installed without what they depend on.

A program for a child process: reads {"peers": folder, "cases": {name: [arguments, ...]}} from stdin
and writes {name: [result, ...]}. Packages are entered without their own __init__, which imports
torch.
"""

import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock


def enter(folder):
    """Makes the peers' modules importable, with stand-ins for loggers and registries."""
    for name in (
        "lmms_eval", "lmms_eval.api", "lmms_eval.tasks", "vlmeval", "vlmeval.utils",
    ):  # fmt: skip
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    registry = types.ModuleType("lmms_eval.api.registry")
    registry.register_metric = registry.register_aggregation = lambda *_, **__: lambda f: f
    logging = types.ModuleType("vlmeval.smp.log")
    logging.get_logger = lambda _: MagicMock()
    sys.modules |= {
        "loguru": MagicMock(),
        "sacrebleu": MagicMock(),
        "lmms_eval.api.registry": registry,
        "vlmeval.smp": types.ModuleType("vlmeval.smp"),
        "vlmeval.smp.log": logging,
    }


def functions():
    """Name of a peer's rule -> function of text and accepted answers (or options)."""
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.mme.utils import parse_pred_ans
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results
    from vlmeval.utils.matching_util import can_infer

    def vqav2(text, answers):
        golds = [{"answer": a, "answer_id": i} for i, a in enumerate(answers)]
        doc = {"question_id": 1, "answers": golds}
        return vqav2_process_results(doc, [text])["exact_match"]

    def ocrbench(text, answers):
        doc = {"answer": list(answers), "dataset": "", "question_type": ""}
        return ocrbench_process_results(doc, [text])["ocrbench_accuracy"]["score"]

    def soft(function):
        return lambda text, answers: function({"question_id": 1, "answers": list(answers)}, [text])[
            "exact_match"
        ]

    return {
        "vqav2": vqav2,
        "textvqa": soft(textvqa_process_results),
        "vizwiz": soft(vizwiz_vqa_process_results),
        "docvqa": lambda text, answers: anls(answers, [text])["anls"],
        "chartqa": lambda text, answers: float(relaxed_correctness(text, answers[0])),
        "mme": lambda text, _: parse_pred_ans(text),
        "ocrbench": ocrbench,
        "mmbench": lambda text, options: can_infer(text, dict(options)),
    }


def main():
    asked = json.load(sys.stdin)
    enter(Path(asked["peers"]))
    peers = functions()
    print(json.dumps({
        name: [peers[name](*arguments) for arguments in cases]
        for name, cases in asked["cases"].items()
    }))  # fmt: skip


if __name__ == "__main__":
    main()
