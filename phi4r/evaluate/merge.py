"""`phi4r merge`: the parts of an evaluation that a job array did, as if one job had done them all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from phi4r.configs.load import load_stage
from phi4r.configs.stages import EvalConfig
from phi4r.core.console import console
from phi4r.core.errors import UserError
from phi4r.core.io import atomic_write_json
from phi4r.evaluate.results import (
    Results,
    SummarySettings,
    read_results,
    summarise,
    summary_table,
    write_results,
)


def main(folder: Path) -> None:
    """D/part_*/results.jsonl -> D/results.jsonl and D/summary.json.

    Runs keep the numbers that their seeds say. UserError where a part is missing or the parts are not of one
    checkpoint with one set of settings.
    """
    parts = sorted(path.parent for path in folder.glob("part_*/config.json"))
    if not parts:
        raise UserError(f"{folder}: no part_*/ of an evaluation there")
    records, known = [], set()
    for part in parts:
        if not (part / "summary.json").exists():
            raise UserError(f"{part}: has no summary.json: this part is not finished")
        settings = _settings(part)
        known.add(json.dumps(settings, sort_keys=True))
        if len(known) > 1:
            raise UserError(f"{part}: has other settings, or another checkpoint, than {parts[0]}")
        for record in read_results(part / "results.jsonl").records():
            records.append(dataclasses.replace(record, run=record.seed))
    try:
        results = Results(records)
    except ValueError as error:
        raise UserError(f"{folder}: the parts do not fit together: {error}") from None
    config = load_stage("eval", parts[0] / "config.json").config
    assert isinstance(config, EvalConfig)
    summary = summarise(results, SummarySettings(bootstrap=config.eval.bootstrap, seed=config.seed))
    checkpoint = _settings(parts[0])["checkpoint"]
    write_results(folder / "results.jsonl", results)
    atomic_write_json(folder / "summary.json", {"checkpoint": checkpoint, **summary})
    console().print(summary_table({Path(checkpoint).name: summary}), soft_wrap=False)


def _settings(part: Path) -> dict[str, Any]:
    """What all parts must share: the settings, but for which part they are, and the checkpoint."""
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))["config"]
    config["eval"].pop("part")
    summary = json.loads((part / "summary.json").read_text(encoding="utf-8"))
    return {"config": config, "checkpoint": summary["checkpoint"]}
