"""Who may import whom (CONTRIBUTING.md), read off the source, and which modules start without torch, seen by
starting."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package -> the phi4r packages its files may import, besides `core`, which every package may use. Arrows
# point down: whatever stands in a set is a later key.
ARROWS = {
    "__main__": {"cli"},
    "cli": {
        "commands", "configs", "convert", "curate", "data", "evaluate", "parallel", "plan", "rl", "sampling",
        "slurm", "train",
    },
    "commands": {
        "configs", "curate", "data", "evaluate", "families", "models", "objectives", "parallel", "plan",
        "rewards", "rl", "sampling", "tasks", "train", "verify",
    },
    "slurm": {"configs", "plan"},
    "curate": {"configs", "data", "parallel", "rl", "sampling", "tasks", "train", "verify"},
    "evaluate": {"configs", "data", "parallel", "rl", "sampling", "tasks", "train", "verify"},
    "rl": {
        "configs", "data", "models", "objectives", "parallel", "rewards", "sampling", "tasks", "train",
        "verify",
    },
    "objectives": {"configs"},
    "sampling": {"configs", "convert", "data", "models", "parallel", "train"},
    "convert": {"configs", "data", "families", "models", "parallel", "train"},
    "train": {"configs", "data", "families", "models", "parallel", "plan", "tasks"},
    "plan": {"configs", "families"},
    "rewards": {"configs", "data", "verify"},
    "tasks": {"configs", "verify"},
    "verify": {"configs", "families"},
    "data": {"configs", "families"},
    "models": {"configs", "families", "parallel"},
    "parallel": {"configs"},
    "configs": {"families"},
    "families": set(),
    "core": set(),
    "__version__": set(),
}  # fmt: skip
MEGATRON = {"models", "parallel", "train", "convert"}
# "package.module:function": what the command line and the launcher import when it is called.
TARGET = re.compile(r"phi4r(\.\w+)+:\w+")

# Files and folders that may not name torch at all: they run on a login node.
NO_TORCH = [
    "cli", "commands/dryrun.py", "commands/bench.py", "core", "families", "configs", "tasks", "curate",
    "plan", "evaluate", "data/records.py", "data/render.py", "data/tokenizer.py", "data/packing.py",
    "data/native.py", "rewards", "sampling/types.py", "parallel/launch.py", "parallel/attempt.py", "slurm",
]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at its top, inside functions or for types only, or by name (TARGET,
    `import_module`): "from a import b" counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and TARGET.fullmatch(node.value):
            found.add(node.value.replace(":", "."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cycle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """A way from a node back to itself, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def files(folder: str, pattern: str = "*.py") -> list[Path]:
    """The files under ROOT/folder (Python's by default), or the file itself."""
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob(pattern))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "phi4r").with_suffix("").parts[0]


def packages() -> dict[str, set[str]]:
    """Package -> the phi4r packages that its files import."""
    graph = defaultdict[str, set[str]](set)
    for path in files("phi4r"):
        package = package_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "phi4r" and len(parts) > 1 and parts[1] != package:
                graph[package].add(parts[1])
    return graph


def test_every_package_imports_only_what_its_arrows_allow() -> None:
    wrong = defaultdict(set)
    for package, imported in packages().items():
        if package in ("__init__", "recipes"):
            continue
        assert package in ARROWS, f"{package} has no arrows: add it to ARROWS"
        wrong[package] |= imported - ARROWS[package] - {"core", "__version__"}
    assert not any(wrong.values()), dict(wrong)


def test_no_package_reaches_itself_through_others() -> None:
    assert not cycle_in(packages())
    floor = list(ARROWS)
    for package, allowed in ARROWS.items():
        assert allowed <= set(floor[floor.index(package) + 1 :]), f"{package}: an arrow that points up"


def test_no_file_reaches_itself_through_others() -> None:
    modules = {module_of(path): path for path in files("phi4r")}
    graph = {}
    for module, path in modules.items():
        # "from a import b" is the module a.b where there is one, else a.
        named = {name if name in modules else name.rpartition(".")[0] for name in imports_of(path)}
        graph[module] = (named & modules.keys()) - {module}
    assert not cycle_in(graph)


def test_a_cycle_is_seen(tmp_path: Path) -> None:
    assert cycle_in({"data": {"tasks"}, "tasks": {"verify"}, "verify": {"data"}})
    lazy = tmp_path / "lazy.py"
    lazy.write_text(
        "def f():\n    from phi4r.tasks import get_task\n    run('phi4r.rl.train:main')\n"
        "    importlib.import_module('phi4r.curate.run')\n"
    )
    assert imports_of(lazy) == {"phi4r.tasks.get_task", "phi4r.rl.train.main", "phi4r.curate.run"}


def test_train_never_imports_rl_by_any_way() -> None:
    graph, reachable, queue = packages(), set[str](), ["train"]
    while queue:
        reachable.add(package := queue.pop())
        queue += graph.get(package, set()) - reachable
    assert "rl" not in reachable


def test_only_four_packages_import_megatron() -> None:
    for path in files("phi4r"):
        if any(name.split(".")[0] == "megatron" for name in imports_of(path)):
            assert package_of(path) in MEGATRON, path


def test_kernels_never_import_phi4r_and_nothing_imports_tests() -> None:
    for path in files("kernels"):
        assert not any(name.split(".")[0] == "phi4r" for name in imports_of(path)), path
    for path in files("phi4r") + files("kernels"):
        assert not any(name.split(".")[0] in ("tests", "benchmarks") for name in imports_of(path)), path


@pytest.mark.parametrize("place", NO_TORCH)
def test_login_node_code_does_not_name_torch(place: str) -> None:
    for path in files(f"phi4r/{place}"):
        named = {name.split(".")[0] for name in imports_of(path)} & {"torch", "megatron"}
        assert not named, f"{path} imports {named}"


def test_login_node_code_starts_without_torch() -> None:
    modules = []
    for place in NO_TORCH:
        for path in files(f"phi4r/{place}"):
            if path.name in ("run.py", "pass_rate.py"):  # these run inside a rank, where the model is
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    code = f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
    code += "    bad = {'torch', 'megatron'} & set(sys.modules)\n    assert not bad, (name, bad)\n"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_every_package_says_what_lives_in_it() -> None:
    for path in files("phi4r"):
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"
    for folder in (ROOT / "phi4r").iterdir():
        if folder.is_dir() and list(folder.glob("*.py")):
            assert (folder / "__init__.py").exists(), f"{folder} is no package"


# Documents that are not in the repository: a reader can look up none of these.
ABSENT = re.compile(r"reference\s+section|design\s+contract|\bdesign\.md|\bspikes/|\bspikes\.md|style\.md")


def test_nothing_cites_a_document_that_is_not_in_the_repository() -> None:
    places = [
        path for name in ("phi4r", "kernels", "launch", "docs", "benchmarks") for path in files(name, "*")
    ]
    places += [path for path in ROOT.glob("*.*") if path.suffix in (".md", ".toml")]
    cited = {}
    for path in places:
        if path.suffix in (".py", ".md", ".toml", ".sh", ".sbatch", ".cpp", ".h"):
            found = ABSENT.search(path.read_text(encoding="utf-8"))
            if found:
                cited[str(path.relative_to(ROOT))] = found[0]
    assert not cited
