# SPDX-License-Identifier: Apache-2.0
"""lmms-eval itself asks a server, and its score is that of `vlm-jax evaluate` (make test-api).

Its ChartQA, with the published prompt, client and scorer, on the local files of the example.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from listening import serving
from test_benchmarks import EXAMPLES, evaluated, lines, made

from vlm_jax import VLM
from vlm_jax.server.auto import Auto
from vlm_jax.server.budget import Chooser
from vlm_jax.server.choices import Choices
from vlm_jax.server.options import Limits
from vlm_jax.server.service import Service
from vlm_jax.serving import benchmarks
from vlm_jax.serving.engine import Engine
from vlm_jax.weights import folder

pytestmark = pytest.mark.api

CLIENTS = Path(os.environ.get("CLIENTS", Path(sys.prefix) / "clients"))
TASK = """
include: {published}
task: chartqa_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
doc_to_visual: !function local.visual
"""
LOCAL = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def model_folder(trained, tmp_path_factory):
    return made(tmp_path_factory.mktemp("client") / "made", trained)


@pytest.fixture(scope="module")
def asked(model_folder, tmp_path_factory, mesh1):
    """ChartQA's files with answers of which some are right, and the report of `evaluate`."""
    place = tmp_path_factory.mktemp("asked")
    annotations = shutil.copytree(EXAMPLES / "chartqa" / "annotations", place / "annotations")
    opened = benchmarks.opened(model_folder, dtype=None, mesh=mesh1)

    def report(out):
        given = dict(tasks=("chartqa",), annotations=annotations, protocol="lmms-eval")
        (found,) = evaluated(opened, place / out, max_new_tokens=None, **given)
        return found, {row["question_id"]: row["text"] for row in lines(found["file"])}

    _, texts = report("first")
    # What the model says becomes the right answer of every other question.
    for file in annotations.rglob("test_*.json"):
        rows = json.loads(file.read_text())
        for number, row in enumerate(rows[::2]):
            row["label"] = texts[f"{file.stem}/{2 * number}"]
        file.write_text(json.dumps(rows))
    return annotations, *report("second")


@pytest.fixture(scope="module")
def address(model_folder, asked, mesh1):
    model, size = VLM.from_checkpoint(model_folder, mesh=mesh1), folder.read(model_folder).size()
    service = Service(
        Engine(model, slots=4, queue=60, index_bytes=10**7),
        Chooser(Choices.of(size), Auto(size)),
        "made",
        model.processor.template,
        Limits(requests=64),
    )
    with serving(service) as found:
        yield found
    service.engine.drain(10.0)


def test_its_score_of_the_server_is_that_of_evaluate(address, asked, tmp_path):
    annotations, report, texts = asked
    assert CLIENTS.is_dir(), "make test-api installs it"
    docs = []
    for file in sorted(annotations.rglob("test_*.json")):
        for number, row in enumerate(json.loads(file.read_text())):
            docs.append(
                dict(
                    id=f"{file.stem}/{number}",
                    image=str(next(annotations.rglob(row["imgname"]))),
                    question=row["query"],
                    answer=row["label"],
                    type=f"{file.stem.removeprefix('test_')}_test",
                )
            )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    published = CLIENTS / "lmms_eval" / "tasks" / "chartqa" / "chartqa.yaml"
    (tasks / "local.py").write_text(LOCAL)
    text = TASK.format(published=published, data=tasks / "docs.jsonl")
    (tasks / "chartqa_local.yaml").write_text(text)
    argv = [
        "--model=openai", f"--model_args=model_version=made,base_url={address}/v1,api_key=none",
        "--tasks=chartqa_local", f"--include_path={tasks}", f"--output_path={tmp_path / 'out'}",
        "--log_samples", "--batch_size=1",
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(CLIENTS), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *argv],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = list((tmp_path / "out").rglob("*results.json"))
    assert found, done.stdout[-1000:] + done.stderr[-3000:]  # its exit status is 0 in any case
    (results,) = found
    score = json.loads(results.read_text())["results"]["chartqa_local"]["relaxed_overall,none"]
    (samples,) = (tmp_path / "out").rglob("*samples*.jsonl")
    said = {docs[row["doc_id"]]["id"]: row["filtered_resps"].strip() for row in lines(samples)}
    assert said == texts and len(set(texts.values())) > 1
    assert 0 < report["score"]["value"] < 100
    assert 100 * score == pytest.approx(report["score"]["value"])
