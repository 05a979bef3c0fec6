# SPDX-License-Identifier: Apache-2.0
"""The server's page: one file that loads nothing; in a browser it chats at two budgets."""

import base64
import json
import re
import shutil
import subprocess
import threading

import made_engine
import pytest
import tiny
from listening import picture, send, serving
from made_engine import said
from starlette.responses import HTMLResponse, Response

from vlm_jax.reports import chat_page
from vlm_jax.server.app import POLICY

M3 = tiny.size(tiny.config(compressor=dict(kind="m3", tokens=4)))


def page(**more):
    options = {"auto": "by <the law>", "with_key": False} | more
    return chat_page.build("made", [1, 4, 16], 4, **options)


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere():
    html = page()
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", html)
    assert "by &lt;the law&gt;" in html and 'id="key"' not in html
    assert 'id="key"' in page(with_key=True)
    data = re.search(r'<script type="application/json" id="chat-data">(.*?)</script>', html)[1]
    assert json.loads(data) == {"model": "made", "supported": [1, 4, 16], "default": 4}


def test_the_server_sends_it_with_a_policy_that_allows_nothing_else():
    with serving(made_engine.service(M3), page=page()) as address:
        status, headers, body = send(address, "/")
        assert status == 200 and body.decode() == page()
        assert headers["content-security-policy"] == POLICY
        assert headers["content-type"].startswith("text/html")


# --- In Chromium ----------------------------------------------------------------------------------

# Uses the page in a frame as a person would, and sends what it sees to the test.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><iframe id="frame" src="/"
style="width:WIDTHpx;height:1200px;border:0"></iframe>
<script>
const frame = document.getElementById("frame");
const wait = async (true_, what) => {
  for (let k = 0; k < 400; k++) { if (true_()) return; await new Promise(d => setTimeout(d, 50)); }
  throw new Error("waited for " + what);
};
frame.onload = async () => {
  const page = frame.contentDocument, view = frame.contentWindow, found = {};
  const find = id => page.getElementById(id);
  const change = (id, value, event) => {
    const input = find(id);
    if (input.type === "checkbox") input.checked = value; else input.value = value;
    input.dispatchEvent(new view.Event(event, {bubbles: true}));
  };
  const texts = selector => [...page.querySelectorAll(selector)].map(e => e.textContent);
  const ask = async question => {
    const before = page.querySelectorAll(".numbers").length;
    change("question", question, "input");
    find("send").click();
    const answered = () => page.querySelectorAll(".numbers").length > before;
    await wait(() => answered() && !find("send").disabled, question);
  };
  try {
    const bytes = Uint8Array.from(atob("PICTURE"), letter => letter.charCodeAt(0));
    const files = new view.DataTransfer();
    files.items.add(new view.File([bytes], "a.png", {type: "image/png"}));
    find("image").files = files.files;
    find("image").dispatchEvent(new view.Event("change"));
    await wait(() => !find("preview").hidden && find("preview").naturalWidth, "the preview");
    change("compare", true, "change");
    change("first", 2, "input");
    found.budgets = [find("first-said").value, find("second-said").value];
    await ask("what is this?");
    found.first = [texts(".answer .text"), texts(".answer .numbers")];
    await ask("are you sure?");
    found.second = [texts(".answer .text").slice(2), texts(".answer .numbers").slice(2)];
    change("tokens", "100000", "input");
    await ask("too long");
    found.refused = [texts(".failed .numbers"), find("said").textContent, find("question").value];
    const inputs = [...page.querySelectorAll("#ask input, #ask textarea, #ask button")]
      .filter(e => e.offsetParent && !e.disabled);
    const bare = e => e.localName !== "button" && !e.labels.length && !e.ariaLabel;
    found.bare = inputs.filter(bare).map(e => e.id);
    const unfocused = e => { e.focus(); return page.activeElement !== e; };
    found.unfocused = inputs.filter(unfocused).map(e => e.id);
    found.inputs = inputs.length;
    found.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
    found.wide = [...page.querySelectorAll("body *")]
      .filter(e => e.getBoundingClientRect().right > page.documentElement.clientWidth + 1)
      .map(e => e.tagName + e.id);
    found.ink = view.getComputedStyle(page.body).color;
  } catch (problem) { found.problem = String(problem); }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
};
</script>"""


def seen(tmp_path, *, width, flags=()):
    """What the browser found on the page of a made engine, and the engine."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    assert chromium, "no Chromium found: apt-get install chromium"
    probe = PROBE.replace("WIDTH", str(width)).replace(
        "PICTURE", base64.b64encode(picture(side=24)).decode()
    )
    found, arrived = [], threading.Event()

    def wrap(app):
        async def with_probe(scope, receive, send_):
            if scope["type"] == "http" and scope["path"] == "/probe":
                await HTMLResponse(probe)(scope, receive, send_)
            elif scope["type"] == "http" and scope["path"] == "/found":
                body = b""
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if not message.get("more_body"):
                        break
                found.append(json.loads(body))
                await Response()(scope, receive, send_)
                arrived.set()
            else:
                await app(scope, receive, send_)

        return with_probe

    service = made_engine.service(M3, seconds=0.01)
    with serving(service, page=page(), wrap=wrap) as address:
        browser = subprocess.Popen(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--no-proxy-server", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=1400,1400", "--remote-debugging-port=0", *flags, f"{address}/probe",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert arrived.wait(90), "the browser found nothing"
        finally:
            browser.kill()
            browser.wait()
    return found[0], service.engine


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_two_budgets_answer_side_by_side_with_their_numbers(tmp_path, width):
    flags = ["--blink-settings=preferredColorScheme=0"] if width == 400 else []
    found, engine = seen(tmp_path, width=width, flags=flags)
    assert "problem" not in found, found
    assert found["budgets"] == ["V = 16", "V = 1"]
    (handle,) = engine.index
    texts, numbers = found["first"]
    assert texts == [" ".join(said(["what is this?"], [handle]))] * 2
    assert numbers[0].startswith("V = 16") and numbers[1].startswith("V = 1 ")
    assert all("tokens/s" in one and "FLOP" in one and "image +" in one for one in numbers)
    # Each side goes on with its own answer, and the picture is sent by its handle.
    assert sorted(ask.visual_tokens for ask in engine.asks) == [1, 1, 16, 16]
    assert [isinstance(ask.images[0], str) for ask in engine.asks] == [False, False, True, True]
    assert found["second"][0][0] and len(found["second"][1]) == 2
    words, status, question = found["refused"]
    assert "this model was made for" in words[0] and "Not answered" in status
    assert question == "too long"
    assert found["bare"] == [] == found["unfocused"] and found["inputs"] > 8
    assert found["overflow"] == 0 and found["wide"] == []
    assert found["ink"] == ("rgb(232, 234, 238)" if width == 400 else "rgb(27, 29, 33)")
