"""The paper's two runs on 32, 128 and 512 GPUs, as `phi4r plan` sees them: `python -m phi4r.plan.scale`
prints the table of docs/plan.md.

Made with the published anchors and not with rows of benchmarks/results, so that the table is the same on
every checkout.
"""

from __future__ import annotations

from phi4r.configs.load import load_stage
from phi4r.configs.stages import RLConfig, SFTConfig
from phi4r.plan.command import DAY_S, num_steps
from phi4r.plan.hardware import GPUS, load_rates
from phi4r.plan.search import Candidate, Cluster, layout_text, search
from phi4r.plan.speed import Work

SFT_TOKENS = 16e9
DOCUMENT_TOKENS = 5929
"""8.3B unique tokens over 1.4M documents."""
RESPONSE_TOKENS = 8000
"""Between the 4k and 14k tokens that the paper's mean response goes through."""
NODES = (4, 16, 64)
GPUS_PER_NODE = 8
HEADER = (
    "| run | GPUs | layout | recompute | GiB per GPU | s per step | tokens/s/GPU | MFU | days |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def best(stage: str, recipe: str, gpu: str, nodes: int) -> tuple[Candidate, float] | None:
    """(the fastest layout that fits, days of the whole run), None where nothing fits."""
    config = load_stage(stage, recipe, ["parallel.tp=1", "parallel.pp=1", "parallel.cp=1", "parallel.dp=1",
                                        "parallel.sp=false"]).config  # fmt: skip
    assert isinstance(config, SFTConfig | RLConfig)
    cluster = Cluster(nodes, GPUS_PER_NODE, load_rates(GPUS[gpu], results=None))
    is_sft = isinstance(config, SFTConfig)
    work = Work(DOCUMENT_TOKENS, 0) if is_sft else Work(RESPONSE_TOKENS, RESPONSE_TOKENS)
    found = search(config, cluster, work).fitting
    if not found:
        return None
    steps = num_steps(config, work, SFT_TOKENS if is_sft else 0.0)
    return found[0], found[0].time.total * steps / DAY_S


def table() -> str:
    """The table in Markdown."""
    lines = [HEADER, "| SFT, the paper's report | 32 H100 | - | - | - | 14 | 2,300 | - | 2.5 |"]
    for name, stage, recipe in (
        ("SFT, 16B tokens", "sft", "phi4_sft"),
        ("GRPO, 90 steps", "rl", "phi4_grpo"),
    ):
        for gpu in GPUS:
            for nodes in NODES:
                gpus = f"{nodes * GPUS_PER_NODE} {GPUS[gpu].name}"
                found = best(stage, recipe, gpu, nodes)
                if found is None:
                    lines.append(f"| {name} | {gpus} | none fits | | | | | | |")
                    continue
                c, days = found
                lines.append(
                    f"| {name} | {gpus} | {layout_text(c.config.parallel)} | {c.config.train.recompute}"
                    f" | {c.memory.total / 2**30:.0f} | {c.time.total:.1f} | {c.tokens_per_gpu_s:,.0f}"
                    f" | {c.mfu:.0%} | {days:.2f} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
