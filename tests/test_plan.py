# SPDX-License-Identifier: Apache-2.0
"""The verb prints one JSON object, says what it assumed, and turns wrong flags into one line."""

import csv
import dataclasses
import json
import subprocess
import sys

import made_rows
import pytest

from vlm_jax.__main__ import main
from vlm_jax.cost import described
from vlm_jax.law import published
from vlm_jax.law.law import fit
from vlm_jax.planning import costs
from vlm_jax.rows import records

DEMO = f"--config={described.CONFIGS / 'demo.py'}"
QWEN = "--llms=qwen1.5-0.5b,qwen1.5-1.8b,qwen1.5-4b,qwen1.5-7b,qwen1.5-14b"


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    """law.json of each published family, and one file that holds both."""
    folder = tmp_path_factory.mktemp("laws")
    fitted = {name: fit(published.points(name), bootstrap=200) for name in ("reasoning", "ocr")}
    for name, law in fitted.items():
        (folder / f"{name}.json").write_text(law.to_json())
    both = fitted["reasoning"].to_dict() | {
        "families": {n: law.to_dict() for n, law in fitted.items()}
    }
    (folder / "both.json").write_text(json.dumps(both))
    return folder


@pytest.fixture
def run(laws, capsys):
    """Runs the verb on a law by name; returns (exit status, parsed stdout or None, stderr)."""

    def call(law, *flags):
        status = main(["plan", f"--law={laws / law}.json", *flags])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else None, err

    return call


def test_the_stable_flags_give_the_papers_optimum(run):
    """Published reasoning points, Q = 50: V* = 13.5 whatever the budget, and N takes the rest of
    it.
    """
    for flops in (1e11, 1e12):
        flags = [f"--flops={flops}", "--text-tokens=50", "--continuous"]
        status, answer, err = run("reasoning", *flags)
        law = answer["law"]["laws"]["all"]
        assert status == 0
        assert answer["V"] == pytest.approx(
            50 * law["beta"] / (law["alpha"] - law["beta"]), rel=0.01
        )
        assert 2e9 * answer["N"] * (50 + answer["V"]) == pytest.approx(flops)
        assert answer["cost_model"] == "paper" and answer["budget"]["limit"] == flops
        low, high = answer["interval"]
        assert low < answer["predicted_error"] < high
        assert "visual tokens" in err
    assert any(
        "extrapolates N" in warning for warning in answer["warnings"]
    )  # 7.9 of at most 7 billion


def test_text_reading_takes_every_token(run):
    assert run("ocr", "--flops=1e12", "--text-tokens=50", "--continuous")[1]["V"] == 576


def test_what_is_offered_can_be_built_and_is_near_what_was_fitted(run, laws):
    """By default a described LLM and a V of the method; in theory at most twice the range."""
    _, answer, _ = run("reasoning", "--flops=1e12", "--text-tokens=50")
    assert (answer["llm"], answer["V"]) == ("qwen1.5-7b", 16) and answer["schema"] == 1
    _, sure, err = run("reasoning", "--flops=1e12", "--text-tokens=50", "--next")
    assert sure["next"] == [] and "no cell is expected to change the choice" in err
    _, theory, _ = run("reasoning", "--flops=1e12", "--text-tokens=0", "--continuous")
    assert (theory["N"], theory["V"]) == (pytest.approx(14.0), pytest.approx(35.7, rel=0.01))
    assert any("N is capped at 14 billion" in w for w in theory["warnings"])
    fields = json.loads((laws / "reasoning.json").read_text())
    (laws / "narrow.json").write_text(
        json.dumps(fields | {"domain": {"N": [1.0, 3.0], "V": [4.0, 36.0], "Q": [0.0, 0.0]}})
    )
    _, near, _ = run("narrow", "--flops=1e13", "--text-tokens=50")
    assert (near["llm"], near["V"]) == ("qwen1.5-4b", 64)
    assert any("fitted N: qwen1.5-7b, qwen1.5-14b" in w for w in near["warnings"])
    assert any("fitted V: 1, 144, 576" in w for w in near["warnings"])
    (laws / "tiny.json").write_text(json.dumps(fields | {"domain": {"N": [1e-5, 1e-3]}}))
    status, _, err = run("tiny", "--flops=1e13", "--text-tokens=50")
    assert status == 2 and "add --config" in err


def test_a_mix_leans_from_one_family_to_the_other(run, laws):
    V = [
        run(
            "both",
            "--flops=1e12",
            "--text-tokens=50",
            f"--mix=reasoning:{1 - w},ocr:{w}",
            "--continuous",
        )[1]["V"]
        for w in (0.0, 0.1, 0.3, 1.0)
    ]
    assert V == sorted(V) and V[0] == pytest.approx(13.5, rel=0.01) and V[-1] == 576
    files = f"--law=reasoning:{laws / 'reasoning.json'},ocr:{laws / 'ocr.json'}"
    apart = run("both", files, "--flops=1e12", "--text-tokens=50", "--mix=reasoning:7,ocr:3",
                "--continuous")[1]  # fmt: skip
    assert apart["V"] == pytest.approx(V[2]) and apart["law"]["weights"] == {
        "reasoning": 0.7,
        "ocr": 0.3,
    }


def test_forty_milliseconds_on_one_v5e_chip(run):
    """The worked example of docs/planning.md, and what it says would change the answer."""
    flags = ["--mix=reasoning:0.3,ocr:0.7", "--ms=40", "--chip=v5e", "--text-tokens=50", QWEN]
    _, answer, _ = run("both", *flags, "--new-tokens=5", "--efficiency=0.6")
    assert (answer["llm"], answer["V"], answer["cost_model"]) == ("qwen1.5-1.8b", 144, "full")
    assert answer["cost"]["amount"] == pytest.approx(sum(answer["cost"]["ms"].values()))
    assert answer["cost"]["ms"]["decode"] > 0.7 * answer["cost"]["amount"]
    assert sum(answer["cost"]["hbm"].values()) < answer["budget"]["also"]["hbm"]
    assert [(c["N"], c["V"]) for c in answer["runner_ups"]] == [(0.5, 576)]
    assert answer["new_tokens"] == 5
    assert not answer["warnings"]
    for change, expected in (
        (["--new-tokens=5", "--efficiency=0.65"], ("qwen1.5-1.8b", 576)),
        (["--new-tokens=1", "--efficiency=0.6"], ("qwen1.5-4b", 576)),
        (["--new-tokens=5", "--efficiency=0.6", "--batch=8"], ("qwen1.5-0.5b", 64)),
    ):
        _, other, _ = run("both", *flags, *change)
        assert (other["llm"], other["V"]) == expected
    _, ideal, _ = run("both", *flags, "--new-tokens=5")
    assert any("roofline" in warning for warning in ideal["warnings"])


def test_shares_of_text_lengths_and_cached_text_reach_the_search(run):
    budget = ["--flops=1e12", "--continuous"]
    one = run("reasoning", *budget, "--text-tokens=62.5")[1]
    two = run("reasoning", *budget, "--text-tokens=25:1,100:1")[1]
    assert two["V"] == pytest.approx(one["V"]) and two["text_tokens"] == 62.5
    assert run("reasoning", "--text-tokens=50", *budget, "--cached-text")[1]["V"] > 30


def test_every_budget_buys_something_within_it(run):
    for flags in (
        ["--hbm-gb=9"],
        ["--ms=80", "--chip=v6e", "--batch=8", "--efficiency=0.5", "--new-tokens=1"],
        ["--dollars-per-million=5", "--chip=v5e", "--price-per-hour=1.2", "--new-tokens=1"],
        [
            "--ms=80",
            "--chip=v5e",
            "--chips=4",
            "--efficiency=prefill:0.6,decode:0.8",
            "--new-tokens=1",
        ],
        ["--flops=3e12", "--cost=full", "--compressors=quecc,token_packer,mqt,none"],
    ):
        status, answer, err = run("reasoning", "--text-tokens=50", *flags)
        assert status == 0, err
        spent = answer["cost"]
        assert spent["amount"] <= answer["budget"]["limit"] * (1 + 1e-9)
        unit = next(u for u, words in costs.UNITS.items() if words == spent["unit"])
        assert spent["amount"] == pytest.approx(sum(spent[unit].values()))


def test_a_failure_is_json_too(laws, capsys):
    """Of a flag and of a plan: schema, status and the message of stderr."""
    flags = ["plan", f"--law={laws / 'both.json'}", "--json", "--text-tokens=50"]
    for more, words in (
        (["--ms=4", "--chip=v9"], "unknown chip"),
        (["--flops=x"], "invalid float"),
    ):
        try:
            status = main([*flags, *more, "--new-tokens=1"])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        failure = json.loads(out)
        assert status == 2 == failure["status"] and failure["schema"] == 1
        assert words in failure["error"] and words in err


def test_without_matplotlib_the_answer_comes_without_its_figure(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--flops=1e12", "--text-tokens=50", f"--out={tmp_path}"]
    status, answer, err = run("reasoning", *flags)
    assert status == 0 and answer["figures"] == [] and "figures need matplotlib: pip install" in err


def test_the_page_begins_with_the_flags_and_loads_nothing(run, tmp_path):
    """With --mix and without; what no page can do is refused before it is made."""
    path = tmp_path / "new" / "plan.html"
    flags = ["--ms=40", "--chip=v5e", "--new-tokens=5", "--text-tokens=50", f"--page={path}"]
    status, answer, _ = run("both", *flags, "--mix=ocr:3,reasoning:1")
    assert status == 0 and answer["page"] == str(path)
    html = path.read_text()
    assert "http" not in html and "<link" in html and "url(" not in html
    data = json.loads(html.partition('id="planner-data">')[2].partition("</script>")[0])
    start = data["start"]
    assert start["limits"] == [["ms", 40.0]] and start["chip"] == "v5e" and start["G"] == 5
    assert dict(start["mix"]) == {"reasoning": 0.25, "ocr": 0.75}
    assert run("both", *flags)[0] == 0
    html = path.read_text()
    assert '"mix":null' in html and len(html) < 300_000
    path.unlink()
    status, _, err = run("both", *flags, "--continuous")
    assert status == 2 and "leave --continuous out" in err and not path.exists()


def test_a_law_written_by_hand_works_and_says_what_it_lacks(run, laws):
    (laws / "hand.json").write_text(
        '{"form": "multiplicative", "A": 0.6, "alpha": 0.08, "beta": 0.02, "D": 0}'
    )
    status, answer, _ = run("hand", "--flops=1e12", "--text-tokens=30", "--continuous")
    assert status == 0 and answer["V"] == pytest.approx(10, rel=0.01) and answer["interval"] is None
    assert any("does not say on which" in warning for warning in answer["warnings"])


def test_own_configurations_bring_their_sizes(run):
    """The demo's LLMs have thousands of parameters, its images 36 patches."""
    _, answer, _ = run(
        "reasoning",
        "--flops=1e8",
        "--cost=full",
        DEMO,
        "--text-tokens=12",
        "--llms=10k,30k,110k",
    )
    assert answer["llm"] in ("10k", "30k", "110k") and answer["V"] in (1, 4, 9, 36)
    assert answer["cost"]["llm_parameters"] == pytest.approx(answer["N"] * 1e9)


def test_measured_rows_replace_the_roofline(run, tmp_path):
    """Rows that reach a 1000th of the chip's peak leave a plan that much less of the same time."""
    records.write(tmp_path / "rows.jsonl", made_rows.rows())
    flags = [
        DEMO,
        "--llms=10k",
        "--tokens=4",
        "--chip=v5e",
        "--text-tokens=12",
        "--new-tokens=2",
    ]
    measured = f"--measured={tmp_path / 'rows.jsonl'}"
    slow = run("reasoning", "--ms=1e9", measured, *flags)[1]
    ideal = run("reasoning", "--ms=1e9", *flags)[1]
    assert slow["cost"]["amount"] > 1000 * ideal["cost"]["amount"]
    assert any("no times of single batches" in w for w in slow["warnings"])
    assert any("--calibration or --measured" in w for w in ideal["warnings"])
    timed = [
        dataclasses.replace(row, machine="1 x cpu (x86_64)")
        for row in made_rows.rows(sizes=(2_000_000,), timing=True)
    ]
    records.write(tmp_path / "timed.jsonl", timed)
    wrong = run("reasoning", "--ms=1e9", f"--measured={tmp_path / 'timed.jsonl'}", *flags)[1]
    assert not any("single batches" in w for w in wrong["warnings"])
    assert any("on 1 x cpu (x86_64), not on v5e" in w for w in wrong["warnings"])
    status, _, err = run("reasoning", "--ms=1e-2", measured, *flags)
    assert status == 2 and "nothing meets the budget: the cheapest is N=9.808e-06 billion" in err


def test_the_figure_shows_the_choice_and_its_numbers(run, tmp_path):
    _, answer, _ = run(
        "reasoning", "--flops=1e12", "--text-tokens=50", f"--out={tmp_path}", "--continuous"
    )
    names = [path.rsplit("/", 1)[1] for path in answer["figures"]]
    assert names == ["plan.png", "plan.svg", "plan.csv"] and all(
        (tmp_path / n).stat().st_size for n in names
    )
    rows = list(csv.DictReader((tmp_path / "plan.csv").open()))
    chosen = [row for row in rows if row["series"] == "chosen"]
    assert [float(row["V"]) for row in chosen] == pytest.approx([answer["V"]])
    assert min(float(row["y"]) for row in rows if row["kind"] == "line") == pytest.approx(
        answer["predicted_error"]
    )


BAD = [
    (["--text-tokens=50"], "0 budgets: give one of flops"),
    (["--text-tokens=50", "--flops=1e12", "--ms=4", "--new-tokens=1"], "needs --chip"),
    (["--text-tokens=50", "--ttft-ms=9"], "needs --chip"),
    (["--text-tokens=50", "--tpot-ms=9", "--new-tokens=1"], "at least 2 tokens"),
    (["--text-tokens=50", "--p95-ms=9", "--chip=v5e", "--new-tokens=4"], "needs --rate"),
    (["--text-tokens=50", "--lifetime-flops=1e21"], "needs --requests"),
    (["--text-tokens=50", "--flops=1e12", "--weights=int8"], "add --cost=full"),
    (["--text-tokens=50", "--ttft-ms=9", "--catalog=nowhere.toml"], "nowhere.toml"),
    (
        ["--text-tokens=50", "--p95-ms=900", "--chip=v5e", "--new-tokens=4", "--rate=1e4"],
        "no server keeps up with 10000 requests per second",
    ),
    (["--text-tokens=-1", "--flops=1e12"], "'-1' is not a number of at least 0"),
    (["--text-tokens=25:x", "--flops=1e12"], "expected name:weight"),
    (["--text-tokens=50", "--flops=nan"], "FLOPs per request: 'nan' is not a number"),
    (["--text-tokens=50", "--ms=40", "--new-tokens=1"], "needs --chip"),
    (["--text-tokens=50", "--ms=40", "--chip=v5e"], "needs --new-tokens"),
    (["--text-tokens=50", "--dollars-per-million=4", "--chip=v5e"], "needs --new-tokens"),
    (["--text-tokens=50", "--ms=40", "--chip=v9", "--new-tokens=1"], "unknown chip 'v9'"),
    (["--text-tokens=50", "--hbm-gb=40", "--chip=v5e"], "more than v5e can use, 1.691e+10 bytes"),
    (
        ["--text-tokens=50", "--ms=40", "--chip=v5e", "--efficiency=2", "--new-tokens=1"],
        "efficiency must be in (0, 1]",
    ),
    (["--text-tokens=50", "--ms=40", "--cost=paper", "--new-tokens=1"], "needs --cost=full"),
    (["--text-tokens=50", "--flops=1e12", "--chip=v5e"], "add --cost=full"),
    (
        ["--text-tokens=50", "--dollars-per-million=5", "--chip=v5e", "--new-tokens=1"],
        "needs --price-per-hour",
    ),
    (
        ["--text-tokens=50", "--ms=1", "--chip=v5e", "--new-tokens=1"],
        "the cheapest is N=0.5 billion, V=1, token_packer",
    ),
    (
        ["--text-tokens=50", "--flops=1e12", "--mix=charts:1"],
        "no law for charts; there are reasoning, ocr",
    ),
    (["--text-tokens=50", "--flops=1e12", "--llms=qwen9"], "qwen9 unknown; there are"),
    (
        ["--text-tokens=50", "--flops=1e12", "--llms=vicuna-1.5-7b,qwen1.5-7b"],
        "two LLMs with one N",
    ),
    (
        ["--text-tokens=50", "--flops=1e12", "--compressors=zip"],
        "kind='zip': choose one of",
    ),
    (
        ["--text-tokens=50", "--flops=9e12", "--cost=full", "--tokens=5"],
        "none is supported; allowed are token_packer [1, 4",
    ),
    (["--text-tokens=50", "--flops=1e12", "--config=nowhere.py"], "no configuration at nowhere.py"),
    (["--text-tokens=50", "--flops=1e12", "--law=nowhere.json"], "nowhere.json"),
    (["--text-tokens=50", "--flops=1e12", "--measured=rows.jsonl"], "add --cost=full"),
]


@pytest.mark.parametrize("flags, message", BAD)
def test_wrong_flags_are_one_line_and_status_2(flags, message, laws, capsys):
    try:
        status = main(["plan", f"--law={laws / 'both.json'}", *flags])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and message in err.splitlines()[-1]


def test_a_file_that_is_no_law_is_named(laws, capsys):
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds a list"),
        ("\udcff", "is not JSON"),
        ('{"schema": 3, "form": "multiplicative"}', "has schema 3, and 1 to 2 are read"),
        ('{"form": "cubic"}', "form is 'cubic'"),
        ('{"form": "multiplicative", "A": 1}', "alpha, beta, D missing"),
    ):
        (laws / "bad.json").write_text(text, errors="surrogateescape")
        assert main(["plan", f"--law={laws / 'bad.json'}", "--flops=1e12", "--text-tokens=5"]) == 2
        assert message in capsys.readouterr().err


def test_a_plan_is_made_without_jax(laws):
    """In a process of its own: stdout is one JSON object, and jax is never imported."""
    code = (
        "import sys; from vlm_jax.__main__ import main; status = main(['plan', *sys.argv[1:]]); "
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            f"--law={laws / 'both.json'}",
            "--ms=40",
            "--chip=v5e",
            "--text-tokens=50",
            "--new-tokens=1",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cost_model"] == "full"
