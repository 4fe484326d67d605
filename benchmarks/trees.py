"""Source trees of other commits, run by the interpreter and the C++ module that are installed here."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Python imports sitecustomize at its start, after the editable installation has put its finder first.
SITECUSTOMIZE = """\
import os, sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
if os.environ.get("PHI4R_NATIVE_FOLDER"):
    import phi4r_kernels
    phi4r_kernels.__path__.append(os.environ["PHI4R_NATIVE_FOLDER"])
"""


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of `commit` in a temporary folder."""
    command = ["git", "archive", commit]
    archive = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory(prefix="phi4r-tree-") as folder:
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")
        yield Path(folder)


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Variables with which Python, its children too, imports phi4r from `tree`, whatever tree is installed.
    A file for it is written to `folder`."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    native = importlib.util.find_spec("phi4r_kernels._native")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, tree, tree / "kernels"))),
        "PHI4R_NATIVE_FOLDER": str(Path(native.origin).parent) if native and native.origin else "",
        "OMP_NUM_THREADS": "1",
    }
