# SPDX-License-Identifier: Apache-2.0
"""Memory is estimated before it is taken, near what the compiler counts, and refused with a way."""

import re

import jax
import pytest
import tiny
from flax import nnx

from configs import sizes
from vlm_jax import mesh as meshes
from vlm_jax.__main__ import main
from vlm_jax.models import lora, vlm
from vlm_jax.models.sizes import LoRASize
from vlm_jax.training import memory, objective, optimizer
from vlm_jax.training.memory import Need

GB = 10**9


def small(**changes):
    """A model that is small, and large enough that its arrays are what its step takes."""
    c = tiny.config(**changes)
    c.vit.update(dict(image_size=64, depth=2, width=64, mlp=256, heads=4, levels=(2,)))
    c.llm.update(dict(vocab=2048, depth=4, width=128, mlp=344, kv_heads=4, head_size=32))
    c.compressor.update(dict(kind="none", tokens=64) | changes.get("compressor", {}))
    c.data.update(dict(text_length=128))
    return c


def compiled(c, name):
    """What the compiler says that a step of a stage takes: arguments and temporaries, bytes."""
    tx, graphs = optimizer.optimizer(tiny.stage(c[name])), []

    def made():
        model = vlm.build(tiny.size(c), nnx.Rngs(0))
        model = lora.adapt(model, LoRASize.of(c.lora), seed=0) if name == "finetune" else model
        graph, state = optimizer.start(model, name, tx)
        graphs.append(graph)
        return state

    mesh = jax.sharding.get_mesh()
    state = memory.placed(jax.eval_shape(made))
    rows = tiny.batch(c, rows=c[name].batch, levels=False)
    batch = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh, "batch"))
        for k, x in rows.items()
    }
    step = optimizer.make_step(graphs[0], tx, objective.next_token, accumulate=c[name].accumulate)
    changed = (state.step, state.trained, state.optimizer)
    found = step.compiled.lower(changed, state.frozen, batch).compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.parametrize("changes, name, axes, most", [
    (dict(remat="full"), "finetune", (1, 1, 1), 1.15),
    (dict(remat="none"), "finetune", (1, 1, 1), 1.15),
    (dict(remat="dots"), "finetune", (2, 2, 2), 1.15),
    (dict(remat="full"), "align", (1, 1, 1), 1.4),  # no weight of the LLM has a gradient
    (dict(compressor=dict(kind="llava_mini", heads=4)), "finetune", (1, 1, 1), 1.25),
    (dict(compressor=dict(kind="fwd2bot")), "finetune", (1, 1, 1), 1.25),
])  # fmt: skip
def test_the_estimate_is_near_the_compilers_count(changes, name, axes, most, mesh1, mesh8):
    c = small(**changes)
    with jax.set_mesh(mesh1 if axes == (1, 1, 1) else mesh8):
        need = memory.of_stage(tiny.recipe(c), name)
        arguments, temporary = compiled(c, name)
    kept = need.parameters + need.optimizer
    # The batch is an argument too, and no part of the estimate.
    assert kept <= arguments <= 1.2 * kept
    assert 0.85 < (need.gradients + need.activations) / temporary < most


def test_each_device_has_its_shard_of_what_is_kept(mesh1, mesh8):
    c = small()
    with jax.set_mesh(mesh1):
        whole, shapes = memory.of_stage(tiny.recipe(c), "finetune"), vlm.shapes(tiny.size(c))
    with jax.set_mesh(mesh8):  # 2 x 2 x 2: fsdp and tensor cut weights, data and fsdp the batch
        part = memory.of_stage(tiny.recipe(c), "finetune")
    assert whole.parameters == 4 * vlm.parameters(shapes)
    assert whole.parameters / 4 <= part.parameters < whole.parameters / 3
    assert part.optimizer < whole.optimizer / 3 and part.activations < whole.activations / 3
    # Adam keeps two numbers for each that is trained.
    learnt = whole.gradients
    assert 2 * learnt <= whole.optimizer < 2.01 * learnt


def test_what_makes_a_training_smaller_makes_its_estimate_smaller(mesh1):
    with jax.set_mesh(mesh1):
        plain = memory.of_stage(tiny.recipe(small(remat="none")), "finetune")
        for changes in (
            dict(remat="full"), dict(remat="dots"), dict(remat="none", lora=dict(rank=4)),
            dict(remat="none", finetune=dict(accumulate=4)),
            dict(remat="none", finetune=dict(batch=4)),
        ):  # fmt: skip
            assert memory.of_stage(tiny.recipe(small(**changes)), "finetune").total < plain.total, (
                changes
            )


def test_a_vicuna_on_a_laptop_is_refused_before_anything_is_allocated(tmp_path, capsys):
    argv = ["--config=configs/finetune.py", f"--workdir={tmp_path}/run"]
    assert main(["train", *argv, "--config.data.path=none.json"]) == 2
    err = capsys.readouterr().err
    kinds = "parameters .*, gradients .*, optimizer .*, activations .*"
    words = (
        rf"finetune needs about \d+\.\d GB \({kinds}\) and \d+\.\d GB are free .*: train adapters"
    )
    assert re.search(words, err)
    assert "mesh.fsdp=8" in err and "choose a smaller llm" in err and err.count("\n") == 1


def test_what_may_not_fit_is_said_and_what_cannot_is_refused():
    need = Need("align", parameters=4 * GB, optimizer=2 * GB, activations=4 * GB)
    assert need.total == 10 * GB and need.sure == 8.4 * GB
    assert memory.check(need, "less", free=lambda: (12 * GB, "here")) == ""
    told = memory.check(need, "less", free=lambda: (9 * GB, "here"))
    assert "align needs about 10.0 GB" in told and "of the 9.0 GB that are free here" in told
    words = r"align needs about 10.0 GB \(parameters 4.0 GB, optimizer 2.0 GB, activations 4.0 GB\)"
    with pytest.raises(ValueError, match=f"{words} and 8.0 GB are free here: less"):
        memory.check(need, "less", free=lambda: (8 * GB, "here"))


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path):
    proc, group = tmp_path / "proc", tmp_path / "group"
    for path in (proc, group / "memory"):
        path.mkdir(parents=True)
    machine = memory.host(proc, group)
    (proc / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable:    3000000 kB\n")
    assert memory.host(proc, group) == 3_000_000 * 1024 < machine
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000000\n")
    assert memory.host(proc, group) == 3_000_000 * 1024  # a group without a limit
    (group / "memory.max").write_text("2000000000\n")
    assert memory.host(proc, group) == GB
    # Pages of files count for the group and are given back when they are wanted.
    (group / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    assert memory.host(proc, group) == 1.5 * GB
    (group / "memory.max").unlink()
    (group / "memory/memory.limit_in_bytes").write_text("1500000000\n")
    (group / "memory/memory.usage_in_bytes").write_text("1200000000\n")
    assert memory.host(proc, group) == 0.3 * GB


def test_sizes_are_written_for_people():
    assert [memory.gigabytes(n) for n in (1_200_000, 99_999_999, 28_314_582_592)] == [
        "1.2 MB", "100.0 MB", "28.3 GB"]  # fmt: skip


# --- A dry run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "grid_nlvr", "finetune_lora", "align"])
def test_a_dry_run_says_what_a_training_takes_and_makes_nothing(name, tmp_path, capsys):
    argv = [f"--config=configs/{name}.py", f"--workdir={tmp_path}/run", "--dry-run"]
    assert main(["train", *argv]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    if name == "align":
        assert f"llm {sizes.LLM_PARAMETERS['vicuna-1.5-7b']:,}" in out
        assert f"vit {sizes.VIT_PARAMETERS['clip-vit-large-patch14-336']:,}" in out
    stages = dict(demo={"encoder", "align", "finetune"}, grid_nlvr={"encoder", "align", "finetune"},
                  finetune_lora={"finetune"}, align={"align"})[name]  # fmt: skip
    assert {
        line.split()[0] for line in out.splitlines() if " MB" in line or " GB" in line
    } >= stages
    assert re.search(r"memory      of each device \(mesh data=8 x fsdp=1 x tensor=1\); ", out)
    assert re.search(r"time        about .* for .* FLOPs at .* GFLOP/s: 15% of what a product", out)


def test_the_rest_of_a_run_is_not_needed_for_its_forecast(capsys):
    assert (
        main(["train", "--config=tests/tiny.py", "--config.data.path=none.json", "--dry-run"]) == 0
    )
    assert float(re.search(r"for (\S+) FLOPs", capsys.readouterr().out)[1]) > 1e6
    assert main(["train", "--config=tests/tiny.py"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    "template=nonsense", "image_fit=cover", "image_resample=best", "image_mean=(.5,)",
    "image_resize=(1, 2, 3)", "source=coco", "image_exif=turn", "on_bad_example=drop",
])  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "grid"])
def test_a_dry_run_refuses_what_the_run_would_refuse(verb, words, capsys):
    assert main([verb, "--config=tests/tiny.py", f"--config.data.{words}", "--dry-run"]) == 2
    assert f"data.{words.partition('=')[0]}=" in capsys.readouterr().err
