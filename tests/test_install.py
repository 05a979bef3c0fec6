# SPDX-License-Identifier: Apache-2.0
"""Installing: versions that were tried agree with what is allowed, a wheel works anywhere."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlm_jax
from vlm_jax.training import workdir
from vlm_jax.verbs import configuration

PYTHONS = ("3.11", "3.12", "3.13")


# --- What was tried -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def declared():
    """Extra -> requirements of setup.py, "" for those of every installation."""
    given = {}
    setuptools, command = ModuleType("setuptools"), ModuleType("setuptools.command.build_py")
    setuptools.setup, setuptools.find_packages = lambda **k: given.update(k), lambda **k: []
    command.build_py = object
    with pytest.MonkeyPatch.context() as patch:
        for module in (setuptools, ModuleType("setuptools.command"), command):
            patch.setitem(sys.modules, module.__name__, module)
        runpy.run_path(str(tiny.ROOT / "setup.py"))
    groups = {"": given["install_requires"], **given["extras_require"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def pins(python):
    """Package -> version of one file of constraints/; a line of another form is refused."""
    path = tiny.ROOT / "constraints" / f"py{python.replace('.', '')}.txt"
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_declared_dependency_is_pinned_within_its_range(python, declared):
    tried, wrong = pins(python), []
    for extra, requirements in declared.items():
        for one in requirements:
            if one.marker and not one.marker.evaluate({"python_version": python}):
                continue
            version = tried.get(canonicalize_name(one.name))
            if version is None or version not in one.specifier:
                wrong.append(f"{one} ({extra or 'always'}): {version}")
    assert not wrong


def test_pythons_that_setup_tells_apart_have_their_own_pair_and_the_others_share_one():
    pair = {
        python: [pins(python)[name] for name in ("jax", "jaxlib", "flax")] for python in PYTHONS
    }
    assert pair["3.12"] == pair["3.13"] != pair["3.11"]
    assert pins("3.12") == pins("3.13")


def needed(name, extras=("",), seen=()):
    """Distributions that an installed one asks for here, all the way down."""
    found = set()
    for line in metadata.requires(name) or []:
        one = Requirement(line)
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        key = canonicalize_name(one.name)
        if (key, *one.extras) not in seen:
            seen = (*seen, (key, *one.extras))
            found |= {key} | needed(one.name, ("", *one.extras), seen)
    return found


def test_whatever_the_tests_run_with_is_pinned():
    """What a pinned package asks for would otherwise be another release next year."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    every = needed("vlm_jax", ("", "test", "report", "demo", "tensorboard"))
    assert {"jaxlib", "huggingface-hub"} <= every
    assert not every - pins(python).keys()


# --- make -----------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path):
    """Runs make with these programs first on the PATH."""
    (tmp_path / "bin").mkdir()

    def run(*words, **programs):
        for name, script in programs.items():
            program = tmp_path / "bin" / name
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            ["make", *words], cwd=tiny.ROOT, env={"PATH": path}, capture_output=True, text=True
        )

    return run


def python_of(version):
    """A program that passes for a Python of this version."""
    return f'case "$*" in *platform*) echo {version};; *"(3, 11)"*) exit 0;; *) exit 1;; esac'


def test_make_takes_a_python_that_runs_also_among_those_of_pyenv(make, tmp_path):
    inner = tmp_path / "root" / "versions" / "3.13.9" / "bin"
    inner.mkdir(parents=True)
    (inner / "python3.13").write_text(f"#!/bin/sh\n{python_of('3.13.9')}\n")
    (inner / "python3.13").chmod(0o755)
    shim = "echo 'pyenv: command not found' >&2; exit 127"
    programs = {f"python3.{minor}": shim for minor in (11, 12, 13)}
    programs |= {"python3": "exit 1", "pyenv": f"echo {tmp_path}/root"}
    words = ("-n", "venv", f"VENV={tmp_path}/new")
    for asked in ((), ("PYTHON=python3.13",)):
        done = make(*words, *asked, **programs)
        assert f'"{inner}/python3.13" -m venv' in done.stdout, done.stderr
        assert "-c constraints/py313.txt" in done.stdout
    done = make(*words[1:], "PYTHON=python3.12")
    assert done.returncode and "no python3.12 that runs and has venv was found" in done.stderr
    done = make(*words, "LATEST=1")
    assert "pip install" in done.stdout and " -c " not in done.stdout


def test_make_notices_another_python_and_refuses_one_without_constraints(make, tmp_path):
    words = ("-q", "venv", f"VENV={tmp_path}", "PYTHON=any")
    (tmp_path / "installed-3.12.1").touch()
    assert make(*words, any=python_of("3.12.1")).returncode == 0
    assert make(*words, any=python_of("3.13.0")).returncode == 1
    assert make(*words, "LATEST=1", any=python_of("3.12.1")).returncode == 1
    os.utime(tmp_path / "installed-3.12.1", (0, 0))
    assert make(*words, any=python_of("3.12.1")).returncode == 1
    done = make(*words[1:], any=python_of("3.14.0"))
    assert done.returncode and "Python 3.14 was not tried" in done.stderr
    assert "LATEST=1" in done.stderr
    # What is there already and is no virtual environment stays as it is.
    done = make(*words[1:], any=python_of("3.13.0"))
    assert done.returncode and "choose another folder" in done.stderr


# --- A wheel --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which a wheel, built from what a checkout has, was installed alone."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "installed"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(tiny.ROOT / name, source)
    for name in ("vlm_jax", "configs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(tiny.ROOT / name, source / name, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    for words in (
        ["wheel", "--no-build-isolation", *offline, f"--wheel-dir={folder}", str(source)],
        ["install", *offline, f"--target={folder}/here", f"--find-links={folder}", "vlm_jax"],
    ):
        done = subprocess.run([*pip, *words], capture_output=True, text=True)
        assert done.returncode == 0, f"make venv installs what this needs\n{done.stderr}"
    return folder / "here"


def away(installed, folder, *argv):
    """`vlm-jax ARGV` of the wheel, in a folder with nothing of the checkout on the path."""
    program = (
        "import sys; from pathlib import Path\n"
        f"ours = Path({str(tiny.ROOT)!r})\n"
        "sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ours]\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        "from vlm_jax import __main__\n"
        f"assert Path(__main__.__file__).is_relative_to({str(installed)!r}), __main__.__file__\n"
        "sys.exit(__main__.main(sys.argv[1:]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_wheel_has_the_package_its_configurations_and_nothing_else(installed):
    files = {path.relative_to(installed) for path in installed.rglob("*.py")}
    package = {path.relative_to(tiny.ROOT) for path in (tiny.ROOT / "vlm_jax").rglob("*.py")}
    configs = {Path("vlm_jax/shipped/configs", p.name) for p in tiny.ROOT.glob("configs/*.py")}
    assert configs and files == package | configs
    assert (installed / "vlm_jax" / "py.typed").is_file()
    templates = "vlm_jax/reports/templates"
    shipped, ours = (
        {p.name for p in (top / templates).iterdir()} for top in (installed, tiny.ROOT)
    )
    assert shipped == ours


def test_a_wheel_fits_and_plans_with_published_sizes_and_with_its_own_configuration(
    installed, tmp_path
):
    done = away(installed, tmp_path, "fit", "--published=reasoning", "--out=law", "--bootstrap=0")
    assert done.returncode == 0, done.stderr
    plan = ("plan", "--law=law/law.json", "--text-tokens=50", "--flops=1e12")
    for more in ((), ("--config=configs/demo.py", "--continuous")):
        done = away(installed, tmp_path, *plan, *more)
        assert done.returncode == 0 and '"N"' in done.stdout, done.stderr


@pytest.mark.slow
def test_a_configuration_beside_a_wheel_is_built_on_those_of_the_wheel(installed, tmp_path):
    mine = tmp_path / "configs" / "mine.py"
    mine.parent.mkdir()
    mine.write_text(
        "from configs import demo\n\n\ndef get_config():\n    c = demo.get_config()\n"
        "    c.grid.tokens = (9,)\n    return c\n"
    )
    words = ("--config=configs/mine.py", "--workdir=runs", "--dry-run")
    done = away(installed, tmp_path, "grid", *words)
    assert done.returncode == 0 and "10k-v9-" in done.stdout, done.stderr


@pytest.mark.parametrize("way", [("--config=configs/demo.py",), ("--config", "configs/demo.py")])
def test_a_configuration_that_is_not_here_is_the_one_of_the_package(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = ("--workdir=x", "--config.seed=1")
    ours = f"--config={tiny.ROOT}/configs/demo.py"
    assert configuration.located([*way, *others]) == [ours, *others]
    for kept in ("--config=configs/nowhere.py", "--config=tests/tiny.py", "--config="):
        assert configuration.located([kept, *others]) == [kept, *others]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").touch()
    assert configuration.located([*way, *others]) == [*way, *others]


def test_the_version_is_said_without_a_heavy_import(installed, tmp_path):
    done = away(installed, tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"vlm-jax {vlm_jax.__version__}\n"), done.stderr
    program = (
        "import sys; from vlm_jax.__main__ import main; main(['--version']); "
        "assert not {'jax', 'numpy', 'absl'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT).returncode == 0


def test_a_package_inside_another_repository_names_its_version_not_that_commit(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "other")
    (tmp_path / "site-packages").mkdir()
    version = f"vlm_jax {vlm_jax.__version__}"
    assert workdir.commit(tmp_path / "site-packages") == version
    assert re.fullmatch("[0-9a-f]{12}", workdir.commit(tmp_path))
