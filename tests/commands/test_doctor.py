"""`phi4r doctor`: a line for bug reports that says what is installed, and what "auto" takes of it."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest

from phi4r.cli.main import main


def test_one_line_names_the_whole_stack(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert not stopped.value.code
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("stack: ")]
    for name in ("torch", "triton", "megatron-core", "numpy", "transformers"):
        assert f"{name} {metadata.version(name)}," in line
    assert f"Python {platform.python_version()}," in line
    assert "Triton kernels" in said
