"""README and docs/evidence.md claim nothing that has no row: their tables stand in benchmarks/results."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / "results" / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def quickstart_line(row: dict[str, str]) -> str:
    """The README's line for a row of quickstart.csv."""

    def percent(name: str) -> str:
        return f"{100 * float(row[name]):.1f}"

    cells = [
        row["seed"],
        f"{percent('sft_avg_at_8')}% ({percent('sft_low')} to {percent('sft_high')})",
        f"{percent('grpo_avg_at_8')}% ({percent('grpo_low')} to {percent('grpo_high')})",
        f"+{percent('gain')} points ({percent('gain_low')} to {percent('gain_high')})",
        f"{float(row['sft_length']):.1f} -> {float(row['grpo_length']):.1f} tokens",
        f"{float(row['seconds']) / 60:.1f} min",
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_quick_start_table_is_what_the_rows_say() -> None:
    table = re.search(r"<!-- seeds -->\n(.*?)<!-- /seeds -->", README, flags=re.DOTALL)
    assert table is not None
    lines = [line for line in table[1].splitlines() if re.match(r"\| \d", line)]
    found = [row for row in rows("quickstart") if not row["settings"]]
    newest = [row for row in found if row["commit"] == found[-1]["commit"]]
    assert lines == [quickstart_line(row) for row in newest]


def measured_lines() -> list[str]:
    """The lines of measured ratios, from the newest row of each comparison."""
    native = {(row["op"], row["size"]): row for row in rows("native")}
    data = {row["impl"]: row for row in rows("data")}
    loader = {(row["what"], row["size"]): row for row in rows("loader")}
    rollout = {row["impl"]: row for row in rows("rollout")}
    packing, counting = native["pack_ffd", "25600"], native["ngram_repetition", "31744"]
    full = {name: float(data[name]["efficiency"]) for name in ("ffd", "next_fit", "one_per_row")}
    read = loader["read", "4096"]
    grading = next(row for row in reversed(rows("verifier")) if row["category"] == "long")
    ours, theirs = rollout["embedded_128_slots"], rollout["transformers"]
    engines = {row["engine"]: row for row in rows("vllm_rl") if not row["settings"]}
    vllm = engines["vllm"]
    runs = [row for row in rows("simulate") if row["commit"] == rows("simulate")[-1]["commit"]]
    simulated = [row for row in runs if row["date"] == runs[-1]["date"]]
    worst = max(abs(float(row["error"])) for row in runs)
    synced = {row["transfer"]: row for row in rows("vllm_sync") if row["model"] == "100m"}
    sync_s = {name: float(row["p50_s"]) for name, row in synced.items()}
    rates = [float(row["tokens_per_second"]) for row in (ours, theirs)]

    def link(name: str) -> str:
        return f"[{name}](../benchmarks/results/{name}.csv)"

    def accuracy(row: dict[str, str]) -> str:
        return f"{float(row['avg_at_8']):.1%} ({float(row['low']):.1%} to {float(row['high']):.1%})"

    def millions(text: str) -> str:
        return f"{float(text) / 1e6:.1f}M tokens/s"

    cells = [
        ("packing 25,600 documents", "C++", "its Python twin", f"{packing['ratio']}x faster", "native"),
        ("n-grams of 31,744 tokens", "C++", "its Python twin", f"{counting['ratio']}x faster", "native"),
        ("rows of 32,768 tokens, long traces", f"{full['ffd']:.1%} full",
         f"in order: {full['next_fit']:.1%}; one document a row: {full['one_per_row']:.1%}",
         f"{full['ffd'] / full['next_fit']:.2f}x; {full['ffd'] / full['one_per_row']:.1f}x", "data"),
        ("reading shards, shuffled, one core", millions(read["tokens_per_s"]),
         f"50 times what a node of 8 H100s trains: {millions(read['needed_per_s'])}",
         f"{float(read['ratio']):.0f}x", "loader"),
        ("sampling 128 answers of 32 tokens, tiny, one core", f"{rates[0]:,.0f} tokens/s",
         f"transformers' generate: {rates[1]:,.0f}", f"{rates[0] / rates[1]:.2f}x", "rollout"),
        (f"GRPO on the quick start's problem, answers from {vllm['servers']} vLLM servers, one killed after"
         f" {vllm['killed_at']} of {vllm['steps']} steps", accuracy(vllm),
         f"embedded engine: {accuracy(engines['embedded'])}",
         f"sampler and trainer {float(vllm['mean_gap']):.0e} nats a token apart", "vllm_rl"),
        (f"new weights of {int(synced['gloo']['parameters']) / 1e6:.0f}M parameters to"
         f" {synced['gloo']['servers']} vLLM servers, proved", f"broadcast: {sync_s['gloo']:.1f} s",
         f"files: {sync_s['files']:.1f} s", f"{sync_s['files'] / sync_s['gloo']:.2f}x", "vllm_sync"),
        ("seconds of a GRPO step with 1 or 2 vLLM servers, simulated: "
         + ", ".join(f"{row['mode'].split(',')[0]} {row['servers']}" for row in simulated),
         ", ".join(f"{float(row['step_predicted_s']):.2f}" for row in simulated),
         "measured: " + ", ".join(f"{float(row['step_s']):.2f}" for row in simulated),
         f"at most {worst:.1%} off in {len(runs) // len(simulated)} runs", "simulate"),
        (f"grading {grading['cases']} responses of 14,000 tokens, {grading['workers']} workers",
         f"{float(grading['seconds']):.1f} s",
         f"their second opinion: {float(grading['audit_seconds']):.1f} s",
         f"{float(grading['accuracy']):.1%} as a person labels", "verifier"),
    ]  # fmt: skip
    return [
        f"| {what} | {ours} | {instead} | {ratio} | {link(name)} |"
        for what, ours, instead, ratio, name in cells
    ]


def test_the_measured_ratios_are_what_the_rows_say() -> None:
    table = re.search(r"<!-- measured -->\n(.*?)<!-- /measured -->", EVIDENCE, flags=re.DOTALL)
    assert table is not None
    assert table[1].splitlines()[2:] == measured_lines()


def test_the_differences_between_layouts_are_what_the_rows_say() -> None:
    newest = {(row["stage"], row["layout"]): row for row in rows("layouts") if not row["settings"]}
    assert set(newest) == {(stage, layout) for stage in ("sft", "rl") for layout in ("tp 2", "pp 2")}
    for (stage, layout), row in newest.items():
        name = {"sft": "SFT", "rl": "GRPO"}[stage]
        assert f"{row['loss_difference']} ({name}, {layout})" in " ".join(EVIDENCE.split())
        assert float(row["loss_difference"]) <= 1e-4


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 1800


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
