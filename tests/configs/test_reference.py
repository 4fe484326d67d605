"""docs/settings.md is what the dataclasses say."""

from __future__ import annotations

from pathlib import Path

from phi4r.configs.reference import reference_markdown
from phi4r.configs.schema import reference
from phi4r.configs.stages import STAGES

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_of_settings_is_current() -> None:
    current = PAGE.read_text(encoding="utf-8")
    assert current == reference_markdown(), "run: python -m phi4r.configs.reference > docs/settings.md"


def test_every_setting_of_every_stage_is_on_the_page_with_a_meaning() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for stage in STAGES.values():
        for _, _, entries in reference(stage):
            for entry in entries:
                assert entry.doc, entry.key
                assert f"| `{entry.key}` |" in page
