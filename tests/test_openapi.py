# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI description holds: schemathesis sends what it allows and what it does not.

Runs with `pytest -m api` (make test-api), where schemathesis is installed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import made_engine
import pytest
import tiny
from listening import chat, serving

pytestmark = pytest.mark.api

M3 = tiny.size(tiny.config(compressor=dict(kind="m3", tokens=4)))


def test_no_request_that_the_description_gives_rise_to_breaks_the_server(tmp_path):
    """Every documented status and type; requests of the description are never a server error."""
    found = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "schemathesis is not installed: make test-api"
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance",
              "response_schema_conformance")  # fmt: skip
    with serving(made_engine.service(M3, slots=16, queue=64)) as address:
        done = subprocess.run(
            [
                found, "run", f"{address}/openapi.json", f"--checks={','.join(checks)}",
                "--phases=examples,coverage,fuzzing", "--max-examples=150", "--seed=1",
                "--suppress-health-check=all", "--warnings=off", "--no-color",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert chat(address)[0] == 200
