"""A module that takes for ever to import."""

import time
from typing import Any

time.sleep(600)


def never(job: dict[str, Any]) -> None:
    """Is never reached."""
