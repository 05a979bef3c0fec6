# SPDX-License-Identifier: Apache-2.0
"""A grid that is killed and repeated ends as one that was not, and its rows say what was run."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.__main__ import main
from vlm_jax.cost import flops as cost
from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor, RowFormat, load_tokenizer
from vlm_jax.data.sources import Origin
from vlm_jax.evals import embedded
from vlm_jax.grids import details, phases
from vlm_jax.grids import run as grid_run
from vlm_jax.models import vlm
from vlm_jax.reports import figures
from vlm_jax.rows import records
from vlm_jax.training.cells import cells_of, describe
from vlm_jax.training.features import blind_to
from vlm_jax.training.stages import Inputs
from vlm_jax.training.workdir import claim, digest

# Three cells: two token counts and the blind one, which is the smallest that has every part.
SMALL = ("--config=tests/one_size.py", "--config.finetune.steps=3", "--config.align.steps=2",
         '--config.grid.baselines=(("blind", 1),)')  # fmt: skip
NAMES = ["only-v1-token_packer-s0", "only-v4-token_packer-s0", "only-v1-blind-s0"]

# In the middle of the second cell: its row was computed and is being written.
IN_A_ROW = """
from vlm_jax import files
replace = files.os.replace
class Os:
    def __getattr__(self, name):
        return getattr(os, name)
    def replace(self, old, new):
        if "v4" in str(new) and str(new).endswith("row.json"):
            os.truncate(old, 100)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
files.os = Os()
"""

# Says on stderr, for each program, whether XLA compiled it or it was read from the cache.
COUNTED = """
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
read = []
jax.monitoring.register_event_listener(
    lambda event, **_: read.append(event) if event.endswith("/cache_hits") else None)
def note(event, seconds, fun_name="", **_):
    if event.endswith("/backend_compile_duration"):
        print("program", "read" if read else "compiled", fun_name, file=sys.stderr)
        read.clear()
jax.monitoring.register_event_duration_secs_listener(note)
"""


def programs(done, how):
    """The names of the programs of a counted run that were "compiled", or "read"."""
    return re.findall(rf"^program {how} (.*)$", done.stderr, re.MULTILINE)


def run(folder, before="", flags=()):
    return tiny.run("grid", *SMALL, f"--workdir={folder}", *flags, before=before)


def rows_of(folder):
    return {row.cell: row for row in records.read(folder / "rows.jsonl")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "run"
    done = run(folder, COUNTED)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def repeated(unbroken, tmp_path_factory):
    """A grid killed while it writes its second row, and what stood there then and in the end."""
    del unbroken  # first: it fills the cache
    folder = tmp_path_factory.mktemp("grid") / "killed"
    seen = []
    for before in (IN_A_ROW, ""):
        done = run(folder, COUNTED + tiny.UNDRAWN + before)
        assert done.returncode == (-9 if before else 0), done.stderr
        rows = (folder / "rows.jsonl").read_text()
        whole = {p.parent.name: (p.read_text(), p.stat().st_mtime_ns)
                 for p in folder.glob("cells/*/row.json")}  # fmt: skip
        seen.append((rows, whole, done.stderr))
    return folder, seen, done


def test_a_killed_grid_ends_with_the_scores_of_an_unbroken_one(unbroken, repeated):
    ours, theirs = rows_of(repeated[0]), rows_of(unbroken[0])
    assert sorted(ours) == sorted(theirs) == sorted(NAMES)
    for name, row in theirs.items():
        assert ours[name].tasks == row.tasks and ours[name].families == row.families
        assert ours[name].config_hash == row.config_hash and ours[name].data_hash == row.data_hash
        for stage in ("align", "finetune"):
            assert tiny.losses(repeated[0] / "cells" / name / stage) == tiny.losses(
                unbroken[0] / "cells" / name / stage
            )
        assert (repeated[0] / "cells" / name / "predictions.jsonl").read_text() == (
            unbroken[0] / "cells" / name / "predictions.jsonl"
        ).read_text()


def test_finished_cells_are_not_done_again(repeated):
    _, seen, _ = repeated
    (_, before, first), (_, after, second) = seen
    assert before.items() <= after.items()
    assert (sorted(before), sorted(after)) == (NAMES[:1], sorted(NAMES))
    # The encoder and two finetuned models were made by the first run, the third by the second.
    assert "encoder 3/3" in first and "encoder 3/3" not in second
    assert first.count("finetune 3/3") == 2 and second.count("finetune 3/3") == 1


def test_cells_of_one_shape_are_compiled_once_in_a_process_and_once_on_a_machine(
    unbroken, repeated
):
    # The blind cell has the shapes of the first one: of three cells two are compiled.
    first, again = unbroken[1], repeated[2]
    gradients = [programs(first, how).count("jit(gradient)") for how in ("compiled", "read")]
    # Each cell has two stages; the encoder is a seventh.
    assert sum(gradients) == 7 and gradients[1] >= 2, gradients
    # All cells have the same weights: one update for each stage, and the encoder's.
    updates = [programs(first, how).count("jit(apply)") for how in ("compiled", "read")]
    assert sum(updates) == 3, updates
    # The repeated command trained the last cell in another process.
    assert programs(again, "read").count("jit(gradient)") == 2
    steps = {"jit(gradient)", "jit(apply)", "jit(first)", "jit(following)"}
    assert not steps & set(programs(again, "compiled"))


def test_rows_are_whole_and_single_at_every_time(repeated):
    for rows, whole, _ in repeated[1]:
        assert rows.endswith("\n")
        cells = [json.loads(line)["cell"] for line in rows.splitlines()]
        assert sorted(cells) == sorted(set(cells)) and set(cells) <= set(whole)


def test_a_finished_grid_repeated_changes_no_row(repeated, capsys, monkeypatch):
    monkeypatch.setattr(figures, "run_figures", lambda *given, **more: [])
    folder, seen, _ = repeated
    assert main(["grid", *SMALL, f"--workdir={folder}"]) == 0
    assert (folder / "rows.jsonl").read_text() == seen[-1][0]
    assert "finetune 3/3" not in capsys.readouterr().err
    for name, (text, time) in seen[-1][1].items():
        path = folder / "cells" / name / "row.json"
        assert (path.read_text(), path.stat().st_mtime_ns) == (text, time)


@pytest.mark.slow
def test_jobs_with_cells_of_their_own_make_the_grid_together(unbroken, tmp_path):
    """Two at once, one cell in both: each cell is trained once, the rows are the grid's."""
    jobs = [(NAMES[1], NAMES[0]), (NAMES[1], NAMES[2])]
    with ThreadPoolExecutor() as pool:
        done = list(
            pool.map(lambda names: run(tmp_path, flags=[f"--cell={n}" for n in names]), jobs)
        )
    assert [job.returncode for job in done] == [0, 0], [job.stderr for job in done]
    said = done[0].stderr + done[1].stderr
    assert said.count("encoder 3/3") == 1 and said.count("finetune 3/3") == 3
    assert f"{NAMES[1]} was finished by another job" in said
    ours, theirs = rows_of(tmp_path), rows_of(unbroken[0])
    assert list(ours) == list(theirs) == sorted(NAMES)
    for name, row in theirs.items():
        assert ours[name].tasks == row.tasks and ours[name].config_hash == row.config_hash
    assert json.loads(done[0].stdout)["report"] == str(tmp_path / "report/index.html")
    spent = json.loads((tmp_path / "run.json").read_text())["phases"]
    assert list(spent) == ["cells", "data", "encoder", "features", "law and report"]


def test_cells_are_listed_one_a_line_and_a_wrong_one_is_named(tmp_path, capsys):
    assert main(["grid", "--config=tests/one_size.py", "--list-cells"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == grid_run.cell_names("tests/one_size.py")
    given = ["grid", "--config=tests/one_size.py", f"--workdir={tmp_path}/run"]
    assert main([*given, "--cell=only-v9"]) == 2
    assert f"cell='only-v9': choose one of {names[0]}" in capsys.readouterr().err
    assert main([*given, f"--cell={names[0]}", "--list-cells"]) == 2
    assert "drop it, or drop --dry-run and --list-cells" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_answer_of_a_grid_is_one_object_and_its_times_are_said(unbroken):
    folder, done = unbroken
    made = json.loads(done.stdout)
    assert made["cells"] == 3 and made["report"] == str(folder / "report/index.html")
    page = (folder / "report/index.html").read_text()
    assert all(name in page or name.split("-")[0] in page for name in NAMES)
    spent = json.loads((folder / "run.json").read_text())["phases"]
    assert list(spent) == ["cells", "data", "encoder", "features", "law and report"]
    assert re.search(r"seconds per phase: .*total \d+", done.stderr)
    assert json.loads((folder / "run.json").read_text())["command"].startswith(
        "vlm-jax grid --config="
    )


def test_a_row_says_what_its_model_is_and_cost(unbroken, mesh1):
    folder, _ = unbroken
    c = tiny.config(finetune=dict(steps=3), align=dict(steps=2))
    test = sources.open_source(Origin.of(c), "test")
    processor = Processor(load_tokenizer(folder / "tokenizer"), RowFormat.of(c))
    lengths = [[int(processor.text(test[i], answer=a)["length"]) for a in (False, True)]
               for i in range(len(test))]  # fmt: skip
    Q, G = np.mean([p for p, _ in lengths]), np.mean([w - p for p, w in lengths])
    for name, row in rows_of(folder).items():
        c.llm.depth, c.compressor.tokens = 1, row.V
        with jax.set_mesh(mesh1):
            shapes = vlm.shapes(tiny.size(c))
        size = tiny.size(c)
        vit, compressor, llm = size.vit, size.compressor, size.llm
        assert row.llm_parameters == vlm.parameters(shapes.llm) == cost.llm_parameters(llm)
        assert row.vit_parameters == vlm.parameters(shapes.vit)
        assert row.compressor_parameters == vlm.parameters(shapes.compressor)
        assert (row.Q, row.G) == (pytest.approx(Q), pytest.approx(G)) and row.query == "none"
        assert row.flops == pytest.approx(vars(cost.request_flops(vit, compressor, llm, Q=Q, G=G)))
        assert row.blind == ("blind" in name) and row.train["steps"] == 5
        assert row.timing["batch"] == c.evaluate.batch and row.timing["seconds_per_example"] > 0
        assert row.train["examples"] == 5 * 8 and row.data_hash == test.data_hash
        predictions = [
            json.loads(x) for x in (folder / "cells" / name / "predictions.jsonl").open()
        ]
        assert row.tasks == embedded.score("embedded", predictions)
        assert row.families == records.families_of(row.tasks)


def test_request_lengths_are_those_of_prompts_answers_and_what_is_asked(unbroken):
    folder, _ = unbroken
    c = tiny.config()
    test = sources.open_source(Origin.of(c), "test")
    inputs = Inputs(test, Processor(load_tokenizer(folder / "tokenizer"), RowFormat.of(c)))
    made = [inputs.processor.text(test[i], answer=False) for i in range(len(test))]
    for prefix, field in ((False, "question_length"), (True, "image_at")):
        Q, G, question = details.request_lengths(inputs, prefix=prefix)
        assert Q == pytest.approx(np.mean([m["length"] for m in made])) and G >= 1
        assert question == pytest.approx(np.mean([m[field] for m in made])) and question <= Q


@pytest.mark.parametrize(
    "fields, method",
    [
        (dict(kind="pool"), "pool"),
        (dict(kind="quecc", query="separate"), "quecc, query separate"),
        (dict(kind="quecc", query="none", downsample="pool"), "quecc, pool"),
    ],
)
def test_a_method_is_named_by_what_tells_its_models_apart(fields, method):
    c = tiny.config(compressor=fields)
    assert records.method_of(**details.method_of(tiny.size(c))) == method


# --- What the cells share -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(unbroken, mesh1, tmp_path_factory):
    """What a restart of the finished grid finds, in this process, and its configuration."""
    folder, _ = unbroken
    c = tiny.config(finetune=dict(steps=3), align=dict(steps=2))
    with jax.set_mesh(mesh1), claim(folder, c, grid=True) as claimed:
        phase = grid_run.Phases(tmp_path_factory.mktemp("phases") / "run.json", {})
        return c, grid_run.prepare(claimed, phase)


def test_cached_features_are_the_encoders_levels_of_every_image(shared, mesh1):
    c, found = shared
    (kept,) = found.features.values()
    with jax.set_mesh(mesh1):
        encode = jax.jit(lambda v, x: v(x))
        for inputs, features in ((found.train, kept.train), (found.test, kept.test)):
            assert len(features) == len(inputs.source.images)
            for i in (0, len(features) - 1):
                pixels = inputs.processor.pixels(inputs.source.images[i])
                levels = encode(found.encoder, tiny.placed(pixels[None]))
                np.testing.assert_allclose(features[i], levels[0], atol=1e-5)
        # The blind image is the mean color: nearly zero once normalized, and the same for all.
        gray = np.full((32, 32, 3), (122, 116, 104), np.uint8)
        levels = encode(found.encoder, tiny.placed(found.train.processor.pixels(gray)[None]))
        np.testing.assert_allclose(kept.blind, levels, atol=1e-5)


def test_every_row_of_a_blind_cell_shows_the_same_image(shared, mesh1):
    c, found = shared
    (kept,) = found.features.values()
    levels = blind_to(kept.test, kept.blind)
    batch = next(loader.evaluation_batches(found.test.source, found.test.processor, batch=8,
                                           features=levels))  # fmt: skip
    assert np.ptp(batch["levels"], axis=0).max() == 0 and len(set(batch["index"])) == 8


def test_an_image_that_could_not_be_read_is_none_for_a_blind_model_either():
    seen, blind = np.ones((3, 2, 4), np.float32), np.full((1, 2, 4), 7, np.float32)
    seen[1] = np.nan
    shown = blind_to(seen, blind)
    assert np.isnan(shown[1]).all() and (shown[[0, 2]] == 7).all() and shown.shape == seen.shape


# --- Cells, before anything is run ----------------------------------------------------------------


def test_cells_are_every_size_and_count_then_the_baselines_for_each_seed():
    c = tiny.config(grid=dict(seeds=(0, 7)))
    cells = cells_of(c)
    kinds = [("token_packer", 1), ("token_packer", 4), ("blind", 1), ("pool", 16)]
    assert [cell.name for cell in cells] == [
        f"{llm}-v{tokens}-{kind}-s{seed}"
        for seed in (0, 7) for kind, tokens in kinds for llm in ("small", "large")]  # fmt: skip
    for cell in cells:
        llm, tokens, kind, seed = re.fullmatch(r"(\w+)-v(\d+)-(\w+)-s(\d)", cell.name).groups()
        of = cell.config
        assert of.llm.depth == {"small": 1, "large": 2}[llm] and of.compressor.tokens == int(tokens)
        assert of.compressor.kind == ("token_packer" if kind == "blind" else kind)
        assert cell.blind == of.data.blind == (kind == "blind") and cell.seed == int(seed)
        assert "grid" not in of
    # Nothing of the configuration itself was changed.
    assert c.to_dict() == tiny.config(grid=dict(seeds=(0, 7))).to_dict()
    # Rows of one cell and two seeds differ in their seed alone.
    assert digest(cells[0].config) == digest(cells[8].config) != digest(cells[1].config)


def test_a_baseline_may_change_other_fields_of_the_compressor():
    baselines = (("quecc", 4, dict(query="none", downsample="pool")), ("blind", 1))
    c = tiny.config(grid=dict(tokens=(1,), baselines=baselines), compressor=dict(query="prefix"))
    _, cell, blind = (cell for cell in cells_of(c) if cell.llm == "small")
    assert cell.name == "small-v4-quecc-none-pool-s0"
    of = cell.config.compressor
    assert (of.kind, of.tokens, of.query, of.downsample) == ("quecc", 4, "none", "pool")
    assert blind.config.compressor.query == c.compressor.query == "prefix"
    c.grid.baselines = (("quecc", 4, dict(qery="none")),)
    with pytest.raises(ValueError, match=r"no \['qery'\] in compressor \[.*'query'"):
        cells_of(c)


def test_a_cell_that_has_no_question_to_read_is_found_before_any_is_trained(mesh1):
    # The template of tests/tiny.py puts the image first.
    c = tiny.config(grid=dict(baselines=(("quecc", 4, dict(query="prefix")),)))
    with jax.set_mesh(mesh1):
        *_, cell = cells_of(c)
        with pytest.raises(ValueError, match="data.template='bare' has none there"):
            describe(cell)


def test_no_sizes_are_refused_with_the_way_out():
    from configs import base

    with pytest.raises(ValueError, match="grid.llms is empty: name at least one LLM size"):
        cells_of(base.get_config())


def test_a_dry_run_prints_every_cell_and_writes_nothing(tmp_path, capsys, mesh1):
    arguments = ["--config=tests/tiny.py", f"--workdir={tmp_path}/run", "--dry-run"]
    assert main(["grid", *arguments]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    with jax.set_mesh(mesh1):
        for cell in cells_of(tiny.get_config()):
            line = next(line for line in out.splitlines() if line.startswith(cell.name + " "))
            n, parts, flops = describe(cell)
            assert f"{n:,}" in line and f"{parts['compressor']:,}" in line
            assert f"{flops / 1e9:,.0f}" in line
    assert "8 cells, about" in out and re.search(r"memory: at most about .* of large-v16-pool", out)


@pytest.mark.parametrize("override, words", [
    ("--config.grid.tokens=(1, 9)", "cannot make 9 visual tokens from a 4x4 patch grid: choose"),
    ("--config.grid.baselines=(('poll', 4),)", "compressor.kind='poll': choose one of"),
    ("--config.finetune.batch=12", "finetune.batch=12 .*multiple of 8"),
    ("--config.mesh.fsdp=3", "does not fit 8 devices"),
])  # fmt: skip
def test_an_impossible_cell_is_found_before_anything_is_made(override, words, tmp_path, capsys):
    assert main(["grid", "--config=tests/tiny.py", f"--workdir={tmp_path}/run", override]) == 2
    assert re.search(words, err := capsys.readouterr().err) and "Traceback" not in err
    assert not (tmp_path / "run/encoder").exists() and not (tmp_path / "run/cells").exists()


def test_a_grid_needs_a_folder(capsys):
    assert main(["grid", "--config=tests/tiny.py"]) == 2
    assert "--workdir is missing" in capsys.readouterr().err


def test_phases_add_up_over_restarts(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.5])
    monkeypatch.setattr(phases.time, "monotonic", lambda: next(clock))
    for name in ("cells", "cells", "data"):
        with phases.Phases(tmp_path / "run.json", {"command": "c"})(name):
            pass
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "command": "c", "phases": {"cells": 5.0, "data": 4.5}}  # fmt: skip
