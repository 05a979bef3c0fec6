# SPDX-License-Identifier: Apache-2.0
"""A LLaVA of transformers behind its own server, `transformers serve`, without a network.

Source: transformers 5.24, src/transformers/cli/serve.py: one request is computed after another,
for models that read images.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[2]
# The image stands before the text, behind <bos>, as in our template "bare".
CHAT = (
    "<bos>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """A folder for both sides: weights, tokenizer without an image token, CLIP's preprocessing."""
    from transformers import CLIPImageProcessor

    side = model.config.vision_config.image_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)


def add_processor(folder: Path, *, patch: int) -> None:
    """What the server of transformers needs besides: an image token, which comes last in the
    vocabulary, and a chat template."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(folder),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@contextlib.contextmanager
def process(argv: list[str], address: str, health: str, *, seconds: float) -> Iterator[None]:
    """A server while the body runs, from when it answers at `health`.

    Raises:
      RuntimeError: if it ends, or does not answer in so many seconds.
    """
    environment = os.environ | dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    said = tempfile.TemporaryFile()  # a line for every answer, in some servers
    child = subprocess.Popen(argv, env=environment, cwd=HOME, stdout=said, stderr=said)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        until = time.monotonic() + seconds
        while True:
            if child.poll() is not None or time.monotonic() > until:
                said.seek(0)
                raise RuntimeError(
                    f"{argv[:4]} does not answer: exit status {child.poll()}, "
                    f"{said.read()[-2000:].decode(errors='replace')}"
                )
            try:
                with opener.open(address + health, timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def free_port() -> int:
    """A port of the loopback that nobody has."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def serving(folder: Path, *, threads: int, seconds: float = 300.0) -> Iterator[str]:
    """The address of `transformers serve` with the model of a folder, on the CPU in float32."""
    port = free_port()
    code = (
        f"import sys, torch; torch.set_num_threads({threads}); "
        "from transformers.cli.transformers import app; sys.exit(app())"
    )
    argv = [sys.executable, "-c", code, "serve", str(folder), "--device", "cpu", "--dtype",
            "float32", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with process(argv, address, "/health", seconds=seconds):
        yield address
