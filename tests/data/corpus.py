"""A corpus for the tests of building and loading: problems with traces of many lengths, made from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from phi4r.configs.load import load_stage
from phi4r.configs.stages import SFTConfig


def rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """`count` rows of three sources; every tenth asks what its predecessor asks."""
    drawn = random.Random(seed)
    made: list[dict[str, Any]] = []
    for index in range(count):
        text = "".join(drawn.choice("0123456789+-*") for _ in range(drawn.randint(3, 9))) + "?"
        made.append(
            {
                "id": f"p{index}",
                "problem": made[-1]["problem"] if index % 10 == 9 else text,
                "answer": str(index % 10),
                "trace": "1+2=3;" * drawn.randint(1, 14),
                "solution": "\\boxed{3}",
                "source": drawn.choice(["math", "code", "web"]),
            }
        )
    return made


def write_jsonl(path: Path, content: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def config(path: Path, *words: str) -> SFTConfig:
    """The tiny recipe on the files at `path`, rows of 128 tokens, 8 documents held out."""
    settings = [f"data.path={path}", "data.seq_length=128", "data.heldout=8", *words]
    loaded = load_stage("sft", "tiny", settings).config
    assert isinstance(loaded, SFTConfig)
    return loaded
