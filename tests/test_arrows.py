"""Who may import whom (CONTRIBUTING.md), read off the source, and which modules start without torch, seen by
starting."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package -> the phi4r packages its files may import, besides `core`, which every package may use.
ARROWS = {
    "core": set(),
    "slurm": {"configs", "plan"},
    "configs": set(),
    "tasks": {"configs", "data", "verify"},
    "verify": {"configs", "data"},
    "rewards": {"data"},
    "data": {"configs", "tasks"},
    "parallel": {"configs"},
    "models": {"configs", "parallel"},
    "train": {"configs", "data", "models", "parallel", "plan"},
    "sampling": {"configs", "convert", "data", "models", "parallel", "train"},
    "objectives": set(),
    "rl": {
        "configs", "data", "models", "objectives", "parallel", "rewards", "sampling", "tasks", "train",
        "verify",
    },
    "curate": {"configs", "data", "parallel", "rl", "sampling", "tasks", "train", "verify"},
    "evaluate": {"configs", "data", "parallel", "rl", "sampling", "tasks", "train", "verify"},
    "convert": {"configs", "data", "models", "parallel", "train"},
    "plan": {"configs"},
    "commands": {
        "configs", "curate", "data", "evaluate", "models", "parallel", "plan", "rewards", "rl", "sampling",
        "tasks", "train", "verify",
    },
    "cli": {"commands", "configs", "parallel", "plan", "slurm"},
    "__main__": {"cli"},
    "__version__": set(),
}  # fmt: skip
MEGATRON = {"models", "parallel", "train", "convert"}

# Files and folders that may not name torch at all: they run on a login node.
NO_TORCH = [
    "cli", "commands/dryrun.py", "commands/bench.py", "core", "configs", "tasks", "curate", "plan",
    "evaluate", "data/records.py", "data/render.py", "data/tokenizer.py", "data/packing.py", "data/native.py",
    "rewards", "rl/types.py", "parallel/launch.py", "parallel/attempt.py", "slurm",
]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, at its top or inside functions: "from a import b" counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    """The Python files under ROOT/folder, or the file itself."""
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "phi4r").with_suffix("").parts[0]


def test_every_package_imports_only_what_its_arrows_allow() -> None:
    wrong = defaultdict(set)
    for path in files("phi4r"):
        package = package_of(path)
        if package in ("__init__", "recipes"):
            continue
        assert package in ARROWS, f"{path} belongs to no package with arrows: add it to ARROWS"
        for name in imports_of(path):
            parts = name.split(".")
            if (
                parts[0] == "phi4r"
                and len(parts) > 1
                and parts[1] not in ARROWS[package] | {"core", package, "__version__"}
            ):
                wrong[str(path.relative_to(ROOT))].add(name)
    assert not wrong, dict(wrong)


def test_train_never_imports_rl_and_arrows_have_no_other_way_there() -> None:
    reachable, queue = set(), ["train"]
    while queue:
        package = queue.pop()
        reachable.add(package)
        # tasks <-> data and verify <-> rl.rewards are pairs of leaf modules, not ways into the loops.
        queue += [p for p in ARROWS[package] - reachable if p not in ("tasks", "verify")]
    assert "rl" not in reachable
    for path in files("phi4r/train"):
        assert not any(name.startswith("phi4r.rl") for name in imports_of(path)), path


def test_only_four_packages_import_megatron() -> None:
    for path in files("phi4r"):
        if any(name.split(".")[0] == "megatron" for name in imports_of(path)):
            assert package_of(path) in MEGATRON, path


def test_kernels_never_import_phi4r_and_nothing_imports_tests_or_benchmarks() -> None:
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
