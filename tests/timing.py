"""What every run of the suite ends with: where its time went, in seconds of the clock and of CPU time."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import preloaded

NUM_FOLDERS, NUM_FILES, NUM_TESTS = 30, 15, 12


def cpu_s(children: bool = True) -> float:
    """CPU seconds of this process and, if asked, of the children it has waited for."""
    whose = [resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN] if children else [resource.RUSAGE_SELF]
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, whose))


@dataclass
class Spent:
    """Seconds of the clock and of CPU, in the preparation (fixtures) and in all."""

    fixtures: float = 0.0
    clock: float = 0.0
    cpu: float = 0.0

    def add(self, report: pytest.TestReport) -> None:
        """Count one phase of a test."""
        self.clock += report.duration
        self.cpu += getattr(report, "cpu_s", 0.0)
        if report.when != "call":
            self.fixtures += report.duration

    def line(self, name: str) -> str:
        """One line of a table."""
        return f"{self.clock:8.1f} {self.cpu:8.1f} {self.fixtures:9.1f}  {name}"


@dataclass(eq=False)
class Timing:
    """A pytest plugin. Workers measure, the process that prints adds up."""

    began: float = field(default_factory=time.monotonic)
    phase: float = field(default_factory=cpu_s)
    collected: float = 0.0
    groups: dict[str, dict[str, Spent]] = field(
        default_factory=lambda: {name: defaultdict(Spent) for name in ("folder", "file", "test")}
    )
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Give each phase's report its CPU seconds."""
        report = yield
        now = cpu_s()
        report.cpu_s = now - self.phase
        self.phase = now
        return report

    def pytest_collection_finish(self) -> None:
        """What collecting, and the imports of all test files, took."""
        self.phase = cpu_s()
        self.collected = self.phase

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase to its folder, file and test."""
        path = report.nodeid.partition("::")[0]
        names = {"folder": path.rpartition("/")[0], "file": path, "test": report.nodeid}
        for group, name in names.items():
            self.groups[group][name].add(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker hands its totals over; the process that prints adds its own."""
        spread = session.config.pluginmanager.hasplugin("dsession")  # the children are workers, who report
        found = {"cpu": cpu_s(not spread), "collection": self.collected, **preloaded.counts}
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["timing"] = found
        else:
            self._add(found)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add the totals of a worker."""
        self._add(getattr(node, "workeroutput", {}).get("timing", {}))

    def _add(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            self.totals[name] += value

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The tables, slowest first."""
        if not self.groups["test"]:
            return
        write = terminalreporter.write_line
        terminalreporter.section("where the time went")
        write("   clock      CPU  fixtures  (seconds)")
        for group, count in (("folder", NUM_FOLDERS), ("file", NUM_FILES), ("test", NUM_TESTS)):
            found = sorted(self.groups[group].items(), key=lambda entry: -entry[1].clock)
            for name, spent in found[:count]:
                write(spent.line(name))
            write("")
        total = self.totals
        write(
            f"{time.monotonic() - self.began:.0f} s; {total['cpu']:.0f} s of CPU, {total['collection']:.0f}"
            f" of them for collecting; Python processes: {total['forked']:.0f} forked,"
            f" {total['fresh']:.0f} started"
        )
