"""What README, docs/install.md and install.py say of sizes is what the newest installation measured."""

from __future__ import annotations

import csv
import re
import runpy

from tests.install.commands import ROOT


def between(page: str, name: str) -> str:
    """The words of a page between the marks of `name`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->(.*?)<!-- /{name} -->", text, flags=re.DOTALL)
    assert found, f"{page}: no <!-- {name} -->"
    return " ".join(found[1].split())


def test_sizes_are_those_of_the_row() -> None:
    with open(ROOT / "benchmarks" / "results" / "install.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "install"]
    row = [row for row in rows if row["environment"] == "uv-cuda"][-1]
    download, disk = round(float(row["download_gb"]), 1), round(float(row["disk_gb"]), 1)
    assert between("README.md", "download") == f"{download} GB with the CUDA build of torch"
    said = f"{row['packages']} packages, {download} GB to download, {disk} GB on disk"
    assert between("docs/install.md", "sizes") == said
    assert runpy.run_path(str(ROOT / "install.py"))["CUDA_GB"] == (download, disk)
