# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks; each is described in its own file."""

from vlm_jax.evals.task import Task
from vlm_jax.evals.tasks import (
    ai2d,
    chartqa,
    docvqa,
    gqa,
    mathvista,
    mmbench,
    mme,
    mmmu,
    nlvr,
    ocrbench,
    own,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
    vqav2,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        gqa.TASK,
        vqav2.TASK,
        textvqa.TASK,
        textvqa.TASK_OCR,
        vizwiz.TASK,
        pope.TASK,
        nlvr.TASK,
        ocrbench.TASK,
        docvqa.DOCVQA,
        docvqa.INFOVQA,
        chartqa.TASK,
        mme.TASK,
        scienceqa.TASK,
        ai2d.TASK,
        mmbench.TASK,
        mmmu.TASK,
        mathvista.TASK,
        own.TASK,
    )
}
