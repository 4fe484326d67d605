"""How a trainer and the vLLM servers on other nodes find each other: small files in a folder that all see.

    key             what requests to the servers must carry; only its owner may read it
    order.json      from the trainer: what a server is to be started with
    server_0.json   from a server that is healthy: where it is; or that was given up: why

Each start of the trainer is a session with a name and a key of its own, and files of another session are as
good as absent: what an earlier start left behind is never used.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from phi4r.core.io import atomic_write_json
from phi4r.parallel.attempt import FOLDER

Kind = TypeVar("Kind")

POLL_S = 0.5
"""Seconds between looks into the folder."""


@dataclass(frozen=True)
class Order:
    """What servers are started with. weights: a Hugging Face folder; dtype: vLLM's name of the compute type;
    max_model_len: longest prompt and response in tokens; transfer: vllm.transfer."""

    session: str
    weights: str
    dtype: str
    max_model_len: int
    on_cpu: bool
    transfer: str = "files"


@dataclass(frozen=True)
class Announcement:
    """A server that is healthy, or one that was given up (`error`)."""

    session: str
    number: int
    url: str
    node: str
    error: str = ""


def attempt_name() -> str:
    """The name of this attempt of a job, which all its steps share; "" outside our job scripts."""
    return Path(os.environ.get(FOLDER, "")).name


class Registry:
    """The files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- the trainer

    def begin(self) -> tuple[str, str]:
        """Start a session: what older ones left is removed. Returns (its name, its key)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [self.folder / "order.json", *self.folder.glob("server_*.json")]:
            path.unlink(missing_ok=True)
        key = secrets.token_hex(32)
        temporary = self.folder / f".key.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.folder / "key")
        return attempt_name() or secrets.token_hex(8), key

    def publish(self, order: Order) -> None:
        """Say what servers are to be started with."""
        atomic_write_json(self.folder / "order.json", asdict(order))

    async def wait_for_servers(self, session: str, count: int, seconds: float) -> list[Announcement]:
        """The servers of a session once `count` are there. RuntimeError where one was given up and, naming
        those that are there, past the deadline."""
        until = time.monotonic() + seconds
        while len(found := self.announcements(session)) < count or any(one.error for one in found):
            for one in found:
                if one.error:
                    raise RuntimeError(f"vLLM server {one.number} on {one.node}: {one.error}")
            if time.monotonic() > until:
                there = ", ".join(f"{one.url} on {one.node}" for one in found) or "none"
                raise RuntimeError(
                    f"{self.folder}: waited {seconds:g} s (vllm.start_timeout_s) for {count} vLLM servers to"
                    f" announce themselves (vllm.num_servers), and {len(found)} did ({there}); see their logs"
                )
            await asyncio.sleep(POLL_S)
        return found

    def announcements(self, session: str) -> list[Announcement]:
        """The servers of a session that are there, by number."""
        found = []
        for path in self.folder.glob("server_*.json"):
            announcement = _read(path, Announcement)
            if announcement is not None and announcement.session == session:
                found.append(announcement)
        return sorted(found, key=lambda one: one.number)

    # --- a server

    def order(self) -> Order | None:
        """What servers are to be started with, None while nobody has said it (for this attempt of the job,
        where there is one)."""
        order = _read(self.folder / "order.json", Order)
        return order if order is None or attempt_name() in ("", order.session) else None

    def key(self) -> str:
        """The session's key; it is there before the order is."""
        return (self.folder / "key").read_text(encoding="ascii").strip()

    def announce(self, announcement: Announcement) -> None:
        """Say that a server is healthy, and where."""
        atomic_write_json(self.folder / f"server_{announcement.number}.json", asdict(announcement))

    def withdraw(self, number: int) -> None:
        """Take the announcement back."""
        (self.folder / f"server_{number}.json").unlink(missing_ok=True)


def _read(path: Path, kind: type[Kind]) -> Kind | None:
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
