"""`phi4r serve`: a vLLM server for a trainer on other nodes.

Waits for the trainer's order in the registry, starts a server at the address by which the trainer's node is
reached, announces it when it is healthy, and starts it again at the same address when it dies or hangs. The
trainer itself gives it newer weights. Ends on SIGTERM or SIGINT.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from pathlib import Path
from types import FrameType

import httpx

from phi4r.configs.sections import VLLMConfig
from phi4r.core.errors import UserError
from phi4r.sampling.vllm.inside.phi4r_wire import own_address
from phi4r.sampling.vllm.registry import POLL_S, Announcement, Order, Registry, attempt_name
from phi4r.sampling.vllm.server import (
    HEALTH_EVERY_S,
    HEALTH_TIMEOUT_S,
    UNHEALTHY_CHECKS,
    ServerProcess,
    free_port,
)


def listening_address(trainer: str) -> str:
    """The address by which this machine reaches the trainer's node `trainer` ("": itself alone)."""
    try:
        return own_address(trainer or "127.0.0.1")
    except OSError as error:
        raise UserError(f"serve: no way to the trainer's node {trainer} (MASTER_ADDR): {error}") from None


def own_devices(visible: str, num_sharing: int, local: int) -> str:
    """The part of the GPUs `visible` ("0,1,2,3") of the server `local` of the `num_sharing` on this node."""
    names = [name for name in visible.split(",") if name]
    if not names or len(names) % num_sharing:
        raise UserError(
            f"serve: {num_sharing} servers cannot share {len(names)} GPUs of this node (CUDA_VISIBLE_DEVICES"
            f" is {visible!r})"
        )
    size = len(names) // num_sharing
    return ",".join(names[local * size : (local + 1) * size])


class Service:
    """One server, started as often as it takes. node: its name in messages; host: address to listen on."""

    def __init__(self, config: VLLMConfig, registry: Registry, number: int, host: str, log: Path) -> None:
        self.config, self.registry, self.number, self.host, self.log = config, registry, number, host, log
        self.node = os.environ.get("SLURMD_NODENAME", platform.node())
        self.num_failures = 0

    def say(self, text: str) -> None:
        """A line in this task's own log."""
        print(f"serve: server {self.number} on {self.node}: {text}", flush=True)

    def run(self) -> None:
        """Serve one session after the other; returns only by an exception."""
        while True:
            self.say("waiting for a trainer")
            order = self._wait_for_order()
            try:
                self._serve(order)
            except (UserError, RuntimeError) as error:  # the trainer need not wait for it any longer
                self.registry.announce(Announcement(order.session, self.number, "", self.node, str(error)))
                raise

    def _wait_for_order(self) -> Order:
        until = time.monotonic() + self.config.start_timeout_s
        while (order := self.registry.order()) is None:
            if time.monotonic() > until:
                raise UserError(
                    f"{self.registry.folder / 'order.json'}: no trainer has asked for servers within"
                    f" {self.config.start_timeout_s:g} s (vllm.start_timeout_s)"
                )
            time.sleep(POLL_S)
        return order

    def _devices(self, order: Order) -> str:
        """CUDA_VISIBLE_DEVICES of this server: its part of what SLURM gave to the tasks of the node. "" where
        there are none, or vllm.devices says it."""
        if order.on_cpu or self.config.devices or not attempt_name():
            return ""
        num_tasks, num_nodes = (int(os.environ[f"SLURM_STEP_NUM_{what}"]) for what in ("TASKS", "NODES"))
        visible, local = os.environ.get("CUDA_VISIBLE_DEVICES", ""), int(os.environ["SLURM_LOCALID"])
        return own_devices(visible, num_tasks // num_nodes, local)

    def _serve(self, order: Order) -> None:
        """Keep a server up until another session begins."""
        process = ServerProcess(
            self.number, self.config, order.dtype, order.max_model_len, order.on_cpu, self.log,
            host=self.host, key=self.registry.key(), devices=self._devices(order),
            transfer=order.transfer,
        )  # fmt: skip
        is_announced = False
        try:
            while (newest := self._newest(order)) is not None:
                if not is_announced:  # until then its port may change
                    process.port = free_port(self.host)
                if not self._start(process, newest):
                    continue
                if not is_announced:
                    self.registry.announce(Announcement(order.session, self.number, process.url, self.node))
                    is_announced = True
                self._watch(process, order)
        finally:
            self.registry.withdraw(self.number)
            process.stop()

    def _newest(self, order: Order) -> Order | None:
        """The session's order as it is now, None once another session has begun."""
        found = self.registry.order()
        if found is None:  # not to be seen just now, on a shared file system: no reason to end a server
            return order
        return found if found.session == order.session else None

    def _start(self, process: ServerProcess, order: Order) -> bool:
        """Start it; whether it has become healthy."""
        process.start(Path(order.weights))
        self.say(f"starting at {process.url} with {order.weights}, log in {self.log}")
        limit_s = self.config.start_timeout_s
        until = time.monotonic() + limit_s
        while process.is_alive and self._newest(order) is not None:
            if self._is_healthy(process):
                self.say("healthy")
                return True
            if time.monotonic() > until:
                self._failed(process, f"was not healthy within {limit_s:g} s (vllm.start_timeout_s)")
                return False
            time.sleep(POLL_S)
        if not process.is_alive:
            self._failed(process, "ended while it started")
        return False

    def _watch(self, process: ServerProcess, order: Order) -> None:
        """Look after the server until it has failed or its session is over."""
        failed, asked = 0, time.monotonic()
        while process.is_alive and self._newest(order) is not None:
            time.sleep(POLL_S)
            if time.monotonic() - asked < HEALTH_EVERY_S:
                continue
            failed, asked = 0 if self._is_healthy(process) else failed + 1, time.monotonic()
            if failed >= UNHEALTHY_CHECKS:
                self._failed(process, f"is not healthy ({failed} checks in a row)")
                return
        if not process.is_alive:
            self._failed(process, "has ended")

    def _is_healthy(self, process: ServerProcess) -> bool:
        try:
            answer = httpx.get(process.url + "/health", timeout=HEALTH_TIMEOUT_S, trust_env=False)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    def _failed(self, process: ServerProcess, how: str) -> None:
        """Note the failure; too many of them are the end."""
        self.num_failures += 1
        text = f"{how}: {process.last_words() or 'it said nothing'} (log: {self.log})"
        process.stop()
        if self.num_failures > self.config.max_restarts:
            raise RuntimeError(
                f"{text}; given up after {self.num_failures} failures"
                f" (vllm.max_restarts {self.config.max_restarts})"
            )
        self.say(f"warning: {text}")


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(config: VLLMConfig, run_dir: Path, number: int, host: str) -> None:
    """Serve until a signal comes. host: address to listen on ("": the one that $MASTER_ADDR is reached
    by)."""
    signal.signal(signal.SIGTERM, _end)
    registry = Registry(Path(config.registry) if config.registry else (run_dir / "servers").resolve())
    host = host or listening_address(os.environ.get("MASTER_ADDR", ""))
    service = Service(config, registry, number, host, run_dir / "logs" / f"vllm_{number}.log")
    try:
        service.run()
    except KeyboardInterrupt:
        service.say("ended")
