# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a server counts what clients really got, and shows what it measured."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import http_load, serving_engine, serving_http, serving_load
from vlm_jax.cost import queue
from vlm_jax.data.word_tokenizer import train_tokenizer

PAUSE = 0.02


class Handler(BaseHTTPRequestHandler):
    """Streams "a b"; the third request gets status 500, and one without a budget another text."""

    asked = 0

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked += 1
        if self.asked == 3:
            return self.send_error(500)
        self.send_response(200)
        self.end_headers()
        said = ("", "a", " b" if "visual_tokens" in given else " c")
        for text in said:
            event = {"choices": [{"delta": {"role": "assistant", "content": text}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
            time.sleep(PAUSE)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *given):
        pass


@pytest.fixture
def address():
    Handler.asked = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def target(address, *, V=4):
    image = http_load.picture(0, 4)
    bodies = [http_load.body("is it?", image, "made", V)] * 2
    expected = [http_load.Expected("a b", 2)] * 2
    return http_load.Target("made", 4, address, bodies, expected)


def test_every_answer_is_compared_and_every_fault_is_counted(address):
    line = http_load.closed(target(address), 2, 0.5)
    assert (line["wrong"], line["failed"]) == (0, 1) and "status 500" in line["errors"][0]
    assert line["asked"] == Handler.asked > 6 and line["answers"] == line["asked"] - 1 - 4
    # Three pauses: behind the first piece of text come two.
    assert line["first_token"]["p50_ms"] >= 1e3 * PAUSE
    assert line["response"]["p50_ms"] >= line["first_token"]["p50_ms"] + 2e3 * PAUSE
    other = http_load.closed(target(address, V=None), 1, 0.2)
    assert other["wrong"] == other["asked"] > 0 == other["failed"]
    nobody = http_load.closed(target("http://127.0.0.1:9"), 1, 0.01)
    assert nobody["failed"] == nobody["asked"] > 0 and nobody["answers"] == 0


def test_a_rate_is_of_the_answers_between_those_that_fill_and_empty_the_queue():
    began = time.monotonic() - 10
    inner, seconds = serving_engine.steady([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], float, 1, began)
    assert (inner, seconds) == ([2.0, 3.0, 4.0, 5.0], 4.0)
    few, seconds = serving_engine.steady([3.0, 1.0, 2.0], float, 1, began)
    assert few == [1.0, 2.0, 3.0] and seconds == pytest.approx(10, abs=1)


def test_requests_that_come_by_themselves_wait_from_when_they_were_due(address):
    Handler.asked = 3
    line = http_load.poisson(target(address), 40.0, 0.5, most=1)
    assert line["asked"] > 5 and (line["wrong"], line["failed"]) == (0, 0)
    # One at a time: later ones have waited for all before them.
    assert line["response"]["p95_ms"] > 3 * 3e3 * PAUSE


def test_the_plan_is_that_of_the_queue_between_known_batches():
    seconds = {1: 0.1, 4: 0.25, 16: 0.85}
    every = [0.1 + 0.05 * k for k in range(16)]
    expected = 1e3 * queue.response_seconds(every, 5.0)
    assert serving_http.predicted(seconds, 16, 5.0) == pytest.approx(expected, rel=1e-3)
    assert serving_http.predicted(seconds, 16, 100.0) is None
    line = dict(requests_per_second=5.0, response=dict(p95_ms=2 * expected))
    serving_http.beside_plan(line, dict(known=seconds), 16)
    assert line["plan"]["known"]["measured_over_predicted"] == pytest.approx(2, rel=1e-3)


def made(side, V, clients, per_second, p95, **more):
    times = dict(p50_ms=p95 / 2, p95_ms=p95, p99_ms=p95 + 1)
    return dict(
        size="demo", side=side, visual_tokens=V, clients=clients, requests_per_second=per_second,
        first_token=times, token=times, response=times, asked=9, wrong=0, failed=1,
    ) | more  # fmt: skip


def test_a_picture_and_a_table_are_made_of_the_result(tmp_path):
    plan = dict(cost_model=dict(p95_ms=None, measured_over_predicted=None),
                measured_batches=dict(p95_ms=10.0, measured_over_predicted=1.5))  # fmt: skip
    rows = [
        made("vlm_jax", V, clients, 10.0 * clients / V, 20.0 * V, plan=plan)
        for V in (1, 4)
        for clients in (1, 8)
    ]
    rows.append(made("vlm_jax, Poisson", 1, 0, 5.0, 30.0, rate=5.0, plan=plan))
    rows.append(made("transformers serve", 4, 1, 2.0, 99.0))
    saved = serving_http.saved(rows, 1, 4)
    assert [one["clients"] for one in saved] == [1, 8] and saved[1]["ratio"] == 4.0
    assert saved[0]["prompt_tokens_saved"] == round(3 / (serving_http.PROMPT + 4), 4)
    assert saved[0]["seconds_saved"] == 0.03
    results = dict(
        machine=dict(cpu="made", threads=2), created="2026-01-02T03", seconds=1.0,
        prompt=64, new=64, rows=rows, sizes=dict(demo=dict(saved=saved)),
    )  # fmt: skip
    lines = serving_load.table(results)
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert "overload, 1.5" in lines[2] and "| 5 by themselves |" in lines[6]
    page = serving_load.on_page(serving_load.PAGE.read_text(), results, "a.png")
    assert lines[3] in page and "4 times the requests" in page
    assert serving_load.on_page(page, results, "a.png") == page
    with pytest.raises(ValueError, match="between marks, not 0"):
        serving_load.on_page("nothing", results, "a.png")
    serving_load.drawn(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    # Runs of two sizes are one result, if they are of one machine.
    runs = [
        results | dict(versions={}, slots=slots, sizes={name: 1}) for name, slots in
        (("demo", 16), ("185M", 16), ("more", 8))
    ]  # fmt: skip
    paths = [str(tmp_path / f"{k}.json") for k in range(3)]
    for path, run in zip(paths, runs, strict=True):
        Path(path).write_text(json.dumps(run))
    both = serving_load.together(paths[:2])
    assert len(both["rows"]) == 2 * len(rows) and list(both["sizes"]) == ["demo", "185M"]
    with pytest.raises(ValueError, match="differ in machine, versions, slots or seconds"):
        serving_load.together(paths)


def test_words_are_as_many_as_a_vocabulary_needs_and_all_different():
    some = serving_http.words(32000)
    assert len(set(some)) == 32000 and all(re.fullmatch("[a-z]{4}", word) for word in some)
    # A token for each of the first ones, of which prompts are made.
    tokenizer = train_tokenizer(some[:512], 511)
    assert len(tokenizer) == 511
    assert len(tokenizer(" ".join(some[: 512 - 100])).input_ids) == 1 + 412
