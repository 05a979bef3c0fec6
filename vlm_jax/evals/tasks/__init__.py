# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks; each is described in its own file."""

from vlm_jax.evals.task import Task
from vlm_jax.evals.tasks import chartqa, docvqa, mme, ocrbench, own, scienceqa

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ocrbench.TASK,
        docvqa.DOCVQA,
        docvqa.INFOVQA,
        chartqa.TASK,
        mme.TASK,
        scienceqa.TASK,
        own.TASK,
    )
}
