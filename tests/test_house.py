# SPDX-License-Identifier: Apache-2.0
"""Holds the house to its plan: who may import whom, where a field is born, what no file says."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from vlm_jax.compressors import COMPRESSORS

HOME = Path(__file__).parent.parent
PACKAGE = HOME / "vlm_jax"
OUTSIDE = {".venv", "runs", "build", "__pycache__", ".git"}

# What a room may import of the package, besides itself. docs/architecture.md draws the same.
GROUND = {
    "arguments", "buckets", "compiled", "cpu", "errors", "files", "heap", "hosts", "mesh",
    "preemption", "progress",
}  # fmt: skip
ARROWS = {
    "errors": set(), "mesh": set(), "preemption": set(), "progress": set(), "arguments": set(),
    "buckets": set(), "heap": set(), "files": {"buckets"}, "sharded": {"mesh"},
    "fetch": {"files", "progress"}, "cpu": {"mesh", "sharded"},
    "compiled": {"progress"},
    "hosts": {"progress", "errors"},
    "evals": {"errors"},
    "law": set(),
    "rows": {"law", "files"},
    "kernels": {"mesh"},
    "layers": {"cpu", "mesh"},
    "compressors": {"kernels", "layers", "cpu", "mesh"},
    "models": {"compressors", "kernels", "layers", "cpu", "sharded", "mesh"},
    "cost": {"errors", "compressors", "models"},  # of the two the descriptions alone, without JAX
    "planning": {"cost", "law", "compressors", "models"},
    "reports": {"files", "cost", "law", "rows", "planning", "compressors", "models"},
    "data": {"mesh", "progress", "errors", "hosts", "files", "compressors"},
    "weights": {"data", "models", "compressors", "layers", "mesh", "progress", "files", "hosts"},
    "training": {"weights", "data", "models", "compressors", "layers", "cost", "rows"} | GROUND,
    "serving": {"training", "weights", "data", "models", "compressors", "layers", "evals"} | GROUND,
    "grids": {"training", "serving", "data", "models", "compressors", "kernels", "evals", "cost",
              "rows", "reports"} | GROUND,
    "aot": {"training", "serving", "models", "layers", "cost", "mesh", "progress"},
    "server": {"serving", "planning", "law", "cost", "data", "models", "compressors"} | GROUND,
    # What `import vlm_jax` names, imported when it is asked for.
    "door": {"cost", "law", "rows", "planning", "serving", "grids"},
}  # fmt: skip
# Rooms of which descriptions alone need no JAX, and where these are.
METHODS = sorted({method.__module__ for method in COMPRESSORS.values()})
DESCRIPTIONS = {"compressors": METHODS, "models": ["vlm_jax.models.sizes"]}
# Rooms that run on a laptop without JAX, and all they import besides the standard library.
LIGHT = {
    "evals": set(),
    "cost": {"numpy", "scipy"},
    "law": {"numpy", "scipy"},
    "rows": {"numpy"},
    "planning": {"numpy", "scipy"},
    "reports": {"numpy", "matplotlib", "jinja2"},
}


def files(*tops: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Every file of ours under these folders, none that a tool made."""
    found = [path for top in tops for path in sorted((HOME / top).rglob("*"))]
    return [
        path
        for path in found
        if path.is_file()
        and path.suffix in suffixes
        # Of a folder's own path only what lies inside the checkout counts.
        and not OUTSIDE & set(path.relative_to(HOME).parts)
        and not any(part.endswith(".egg-info") for part in path.parts)
    ]


OURS = files("vlm_jax", "configs", "benchmarks", "tests") + [HOME / "setup.py"]
MODULES = files("vlm_jax")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """The dotted name of a module of the package."""
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def room(module: str) -> str:
    """The room a module lies in: a folder or a file at the top; what dispatches is a verb."""
    parts = module.split(".")
    if len(parts) == 1:
        return "door"
    return "verbs" if parts[1] == "__main__" else parts[1]


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports, wherever in the file; of our own, the modules."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.append(module if module in NAMES else node.module)
    return found


def where(path: Path, line: int | None = None) -> str:
    return f"{path.relative_to(HOME)}" + (f":{line}" if line else "")


def test_every_file_lies_in_a_room_with_arrows():
    assert {path.parent for path in MODULES} == {
        path.parent for path in MODULES if path.stem == "__init__"
    }
    assert {room(name_of(path)) for path in MODULES} == ARROWS.keys() | {"verbs"}


def astray(path: Path, modules: list[str]) -> list[str]:
    """What a file may not import of these modules; verbs import all rooms, and nobody a verb."""
    here = room(name_of(path))
    wrong = []
    for module in modules:
        there = room(module)
        if not module.startswith("vlm_jax") or here in ("verbs", there):
            continue
        # The package itself holds its version and nothing else.
        if there != "door" and there not in ARROWS[here]:
            wrong.append(f"{where(path)} imports {module}: {here} may import {ARROWS[here]}")
    return wrong


def test_imports_follow_the_arrows():
    wrong = [line for path in MODULES for line in astray(path, imports(path))]
    assert not wrong, "\n".join(wrong)


def test_nobody_may_import_a_verb_nor_a_room_above():
    for path in MODULES:
        if room(name_of(path)) != "verbs":
            assert astray(path, ["vlm_jax.verbs.grid", "vlm_jax.__main__"]), path
    order = list(ARROWS)
    for number, (name, below) in enumerate(ARROWS.items()):
        assert below <= set(order[:number]), name  # no room is reached from below it


def test_of_data_only_the_loader_knows_the_mesh():
    knows = {where(p) for p in files("vlm_jax/data") if "vlm_jax.mesh" in imports(p)}
    assert knows <= {"vlm_jax/data/loader.py"}


def test_verbs_do_not_import_the_dispatcher():
    assert not [where(p) for p in MODULES if "vlm_jax.__main__" in imports(p)]


@pytest.mark.parametrize("name", LIGHT)
def test_light_rooms_import_only_what_a_laptop_has(name):
    allowed = LIGHT[name] | sys.stdlib_module_names | {"vlm_jax"}
    wrong = {
        f"{where(path)}: {module}"
        for path in files(f"vlm_jax/{name}")
        for module in imports(path)
        if module.split(".")[0] not in allowed
    }
    assert not wrong


def test_configs_import_only_ml_collections_and_each_other():
    allowed = {"ml_collections", "configs"} | sys.stdlib_module_names
    wrong = [
        f"{where(path)}: {module}"
        for path in files("configs")
        for module in imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert not wrong


HOMES = {"flax": {"layers", "compressors", "models", "training"}} | dict.fromkeys(
    ("fastapi", "pydantic", "starlette", "sse_starlette", "uvicorn", "prometheus_client"),
    {"server"},
)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_own_rooms_alone(library):
    found = {p: {module.split(".")[0] for module in imports(p)} for p in MODULES}
    assert {room(name_of(p)) for p, names in found.items() if library in names} <= HOMES[library]


def test_the_package_never_imports_torch_or_tensorflow():
    wrong = [
        f"{where(path)}: {module}"
        for path in MODULES
        for module in imports(path)
        if module.split(".")[0] in {"torch", "torchvision", "tensorflow"}
    ]
    assert not wrong


def test_no_import_by_a_computed_name_and_no_star():
    wrong = []
    for path in OURS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                wrong.append(where(path, node.lineno))
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                computed = not (node.args and isinstance(node.args[0], ast.Constant))
                if called in {"import_module", "__import__", "run_module"} and computed:
                    wrong.append(where(path, node.lineno))
    assert not wrong


def test_no_compiler_is_given_an_option_that_it_was_not_asked_about():
    wrong = []
    for path in files("vlm_jax", "benchmarks"):
        asked = {
            target.id
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Assign) and "mesh.known(" in ast.unparse(node.value)
            for target in ast.walk(node)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg == "compiler_options":
                given = ast.unparse(node.value)
                if given not in asked and not given.startswith("mesh.known("):
                    wrong.append(where(path, node.value.lineno))
    assert not wrong, f"mesh.known(options) leaves out what a release has dropped: {wrong}"


@pytest.mark.parametrize(
    "name, absent",
    [
        ("cost", ("jax", "flax", "matplotlib")),
        ("law", ("jax", "flax", "matplotlib")),
        ("rows", ("jax", "flax", "matplotlib")),
        ("planning", ("jax", "flax", "matplotlib")),
        ("evals", ("jax", "numpy")),
        ("reports", ("jax", "flax")),
        ("compressors", ("jax", "flax")),
        ("models", ("jax", "flax")),
    ],
)
def test_importing_a_light_room_leaves_the_heavy_libraries_alone(name, absent):
    modules = [name_of(path) for path in files(f"vlm_jax/{name}")]
    modules = DESCRIPTIONS.get(name, modules)
    program = (
        f"import {', '.join(['sys', *modules])}; print([m for m in {absent} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, str]:
    """Path of each field that holds a value -> its name; an empty section counts as a value."""
    found = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = name
    return found


def read_names(module: ast.Module) -> set[str]:
    """What a file reads as `.name` or `["name"]`, and the parameters that it uses."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.add(node.slice.value)
        if isinstance(node, ast.FunctionDef):
            given = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= given & used
    return names


def test_no_config_field_is_dead():
    read = set().union(*(read_names(tree(path)) for path in MODULES))
    dead = [path for path, name in leaves(base.get_config()).items() if name not in read]
    assert not dead, f"declared in configs/base.py, read nowhere in vlm_jax: {dead}"


def test_no_config_field_has_a_second_default():
    wrong = []
    for path in files("vlm_jax", "benchmarks"):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            # config.get("x", 3), getattr(config.llm, "x", 3)
            get = re.search(r"\b(config|cfg)\b[\w.]*\.get$", called)
            attribute = called == "getattr" and len(node.args) == 3
            if get or (attribute and re.match(r"(config|cfg)\b", ast.unparse(node.args[0]))):
                wrong.append(where(path, node.lineno))
    assert not wrong, f"read the field itself, its default is in configs/base.py: {wrong}"


def test_every_file_begins_with_a_license_and_a_promise_and_a_long_one_says_why():
    wrong = []
    for path in OURS:
        text, docstring = path.read_text(), ast.get_docstring(tree(path)) or ""
        if not text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
            wrong.append(f"{where(path)}: no license")
        # An __init__.py may say nothing.
        if tree(path).body and not docstring.split("\n\n")[0].endswith((".", "?", ":")):
            wrong.append(f"{where(path)}: its docstring begins with no sentence")
        if (count := len(text.splitlines())) > 400 and "400 lines" not in docstring:
            wrong.append(f"{where(path)}: {count} lines: say why, or split the file")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "helpers", "common", "misc", "core"}
    assert not [where(path) for path in OURS if path.stem in drawers]


# Spelled in pieces, or this file would hold them.
UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]))
MACHINE = re.compile(r"(?<![\w.+/~$}-])/(?:wo[r]k|tm[p]|home|root|opt|Users)/[\w.]")
WORDS = files(
    "vlm_jax",
    "configs",
    "benchmarks",
    "tests",
    "launch",
    "docs",
    suffixes=(".py", ".md", ".sh", ".json", ".jsonl", ".html"),
) + [
    HOME / name
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "setup.py",
        "pyproject.toml",
        ".gitignore",
        ".ci/run",
    )
]


def test_no_unfinished_word_and_no_path_of_a_machine():
    found = [
        f"{where(path, number)}: {match.group()}"
        for path in WORDS
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for match in [UNFINISHED.search(line) or MACHINE.search(line)]
        if match
    ]
    assert not found


PAGES = [path for path in WORDS if path.suffix == ".md"]
TOPS = "vlm_jax|configs|constraints|docs|launch|benchmarks|tests"


def test_what_a_page_points_at_exists():
    missing = []
    for path in PAGES:
        text = path.read_text()
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
        named = re.findall(rf"`((?:{TOPS})/[\w./-]*)`", text)
        named += re.findall(r"tests/test_\w+\.py", text)
        missing += [f"{where(path)}: {x}" for x in links if not (path.parent / x).exists()]
        missing += [f"{where(path)}: {x}" for x in named if not (HOME / x).exists()]
    assert not missing


def test_a_verb_that_a_page_uses_exists():
    used = {
        (verb, where(path))
        for path in PAGES
        for verb in re.findall(r"\bvlm-jax ([a-z]+) --", path.read_text())
    }
    assert not [pair for pair in sorted(used) if not (PACKAGE / f"verbs/{pair[0]}.py").exists()]
