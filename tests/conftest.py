# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices, quick compilation, and shapes checked at the borders."""

import fcntl
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Models here are tiny: optimizing their programs takes far longer than running them, and the newer
# fusion emitters compile for twice as long as the older ones. One program is not split in parts
# either: both cores have a process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What all processes of a session share; the first one makes the folder and removes it.
if "VLM_JAX_TESTS" not in os.environ:
    SHARED = tempfile.TemporaryDirectory(prefix="vlm-jax-tests-", ignore_cleanup_errors=True)
    os.environ["VLM_JAX_TESTS"] = SHARED.name
# Compiling is most of the time of the tests: a program is compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{os.environ['VLM_JAX_TESTS']}/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Checking shapes takes a fifth of the time: the newest Python of .ci/run does it, for both.
if sys.version_info >= (3, 13):
    install_import_hook("vlm_jax", "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import tiny  # noqa: E402

from vlm_jax import mesh as meshes  # noqa: E402

# Tracing makes many objects and few cycles: looking for them takes a twentieth of the time.
gc.set_threshold(100_000, 50, 50)

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

PUBLISHED = Path(__file__).parent / "published"


def pytest_addoption(parser):
    parser.addoption(
        "--published-dir",
        default=str(PUBLISHED),
        help="folder of cases computed by the published code (*.npz, metrics.json)",
    )


def pytest_configure(config):
    if jax.device_count() != 8:
        raise pytest.UsageError(
            f"the tests need 8 devices and see {jax.device_count()}: run them on the CPU "
            "(JAX_PLATFORMS=cpu) in a process that has not started jax before"
        )
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def mesh1():
    """A mesh of one device."""
    return meshes.make(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def mesh8():
    """Eight devices as 2 data x 2 fsdp x 2 tensor."""
    return meshes.make(2, 2, 2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of one unbroken run of tests/tiny.py, in a process of its own with one device.

    It is made once; each process of the tests has a copy.
    """
    made = Path(os.environ["VLM_JAX_TESTS"], "trained")
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "finetune/6").is_dir():
            done = tiny.run("train", "--config=tests/tiny.py", f"--workdir={made}")
            assert done.returncode == 0, done.stderr
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("trained") / "run"))
