"""Two real vLLM servers on the CPU, started once for all tests of this folder (about a minute on one core).

They need an environment of their own: `make vllm-deps`, or PHI4R_VLLM_PYTHON names its interpreter. Without
one these tests are skipped, but not with CI=true.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor

from phi4r.configs.load import load_stage, split_overrides
from phi4r.configs.sections import ModelConfig, ParallelConfig, SamplingConfig, TrainConfig, VLLMConfig
from phi4r.configs.stages import RLConfig
from phi4r.convert.live import export_form
from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.sampling.vllm.engine import VLLMEngine
from phi4r.sampling.vllm.server import ServerProcess
from phi4r.train.engine import Engine
from phi4r.train.session import open_tokenizer, resolve_model

VOCAB, STOP_IDS, TEMPERATURE = 64, (3, 4), 0.8
START_S = 300
MODEL = ModelConfig.from_preset("tiny", vocab_size=VOCAB, max_position_embeddings=256)


def peaked_weights(seed: int) -> object:
    """Random weights with a head so large that some tokens are much likelier than others."""

    def get_tensor(name: str) -> Tensor:
        return random_weights(MODEL, seed)(name) * (20.0 if name == "lm_head.weight" else 1.0)

    return get_tensor


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    try:
        return optional.vllm_python()
    except UserError as error:
        if os.environ.get("CI"):  # where a skipped test would be taken for a passed one
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def trainer() -> Engine:
    """The trainer's model; who needs weights loads them."""
    return Engine(MODEL, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())


def open_engine(trainer: Engine, run_dir: Path, **settings: Any) -> VLLMEngine:
    """The rollout engine of a run in `run_dir`, with `settings` of the section vllm."""
    config = VLLMConfig(start_timeout_s=300, **settings)
    sampling = SamplingConfig(engine="vllm", max_in_flight=8, temperature=TEMPERATURE)
    return VLLMEngine(
        trainer, STOP_IDS, config, sampling, run_dir, max_model_len=256, probe_prompts=[(5, 6, 7), (9, 10)],
    )  # fmt: skip


@pytest.fixture(scope="session")
def servers(
    vllm_python: str, trainer: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMEngine]:
    """The engine with two servers that hold the trainer's weights as version 0."""
    load_weights(trainer.models, MODEL, peaked_weights(7), 0, 1)  # type: ignore[arg-type]
    run_dir = Path(tmp_path_factory.mktemp("vllm"))
    engine = open_engine(trainer, run_dir, num_servers=2, python=vllm_python)
    try:
        engine.sync(0)
        yield engine
    finally:
        engine.close()


@contextmanager
def serving(weights: Path, python: str, logs: Path, longest: int, transfer: str) -> Iterator[str]:
    """Two servers that hold the Hugging Face folder `weights`; their addresses, as in vllm.addresses."""
    config = VLLMConfig(num_servers=2, python=python, transfer=transfer)  # type: ignore[arg-type]
    servers = [
        ServerProcess(number, config, "float32", longest, True, logs / f"{number}.log") for number in range(2)
    ]
    try:
        for server in servers:
            server.start(weights)
        until = time.monotonic() + START_S
        for server in servers:
            while not _is_healthy(server):
                assert server.is_alive, server.last_words()
                assert time.monotonic() < until, f"not healthy within {START_S} s"
                time.sleep(0.5)
        yield ",".join(server.url for server in servers)
    finally:
        for server in servers:
            server.stop()


@contextmanager
def persistent_servers(words: list[str], python: str, folder: Path) -> Iterator[str]:
    """Two servers with random weights for the model of the runs `phi4r WORDS`, ready for either way of
    transfer."""
    run = load_stage("rl", "tiny", split_overrides(words)[1]).config
    assert isinstance(run, RLConfig)
    export_form(resolve_model(run.model, open_tokenizer(run.tokenizer)), folder / "form", (0,), None)
    longest = run.rollout.max_prompt_tokens + run.sampling.max_new_tokens
    with serving(folder / "form", python, folder, longest, "gloo") as found:
        yield found


def _is_healthy(server: ServerProcess) -> bool:
    try:
        return httpx.get(server.url + "/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
