"""Every family against transformers, document by document: log-probs, every gradient, two optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from phi4r.configs.sections import ModelConfig
from phi4r.models.names import read, weight_table
from phi4r.parallel.launch import run_ranks
from phi4r.train.folders import read_model_config
from tests.families.models import CASES, SIZES, SWITCH, make
from tests.families.parity_ranks import LR, OPTIMIZER

transformers_logging.disable_progress_bar()

pytestmark = pytest.mark.multiprocess

TWO_RANKS: dict[str, dict[str, Any]] = {
    "tp 2": {"tp": 2},
    "tp 2 with sp": {"tp": 2, "sp": True},
    "pp 2": {"pp": 2},
    "cp 2": {"cp": 2},
}
LAYOUTS = ("one rank", *TWO_RANKS)

# The models are float64, but transformers computes norms and rotary angles in float32 (eps 1.2e-7): a few
# dozen such roundings on the way to a value, relative to the largest value of its tensor.
ROUNDING = 64 * torch.finfo(torch.float32).eps

Documents = list[tuple[np.ndarray, np.ndarray]]


def documents() -> Documents:
    """Odd lengths, on both sides of the length at which longrope changes its factors."""
    random = np.random.default_rng(0)
    lengths = (1, 2, 7, 19, SWITCH, SWITCH + 1, 33, 45)
    return [
        (random.integers(0, SIZES["vocab_size"], n).astype(np.int32), np.arange(n) >= n // 3) for n in lengths
    ]


def reference_logprobs(model: nn.Module, tokens: np.ndarray) -> Tensor:
    """Log-probs [n - 1] of the tokens of a document but the first."""
    ids = torch.from_numpy(tokens).long()[None]
    return model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def reference_loss(model: nn.Module) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, mask in documents():
        total = total - reference_logprobs(model, tokens)[torch.from_numpy(mask[1:])].sum()
        count += int(mask[1:].sum())
    return total / count


class Case:
    """A family's model, what transformers makes of it, and what every layout made of it."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self.model = model
        self.config: ModelConfig = read_model_config(folder / "hf")
        self.found = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in LAYOUTS}

    def full(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """transformers' tensors, joined where megatron-core has one weight for several."""
        return {weight.hf: read(weight, tensors.__getitem__) for weight in weight_table(self.config)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("families")
    models = {name: make(name, folder / name / "hf") for name in CASES}
    torch.save(documents(), folder / "documents.pt")
    folders = [str(folder / name) for name in CASES]
    payload = {"folders": folders, "documents": str(folder / "documents.pt")}
    run_ranks("tests.families.parity_ranks:run", payload | {"layouts": {"one rank": {}}}, 1)
    run_ranks("tests.families.parity_ranks:run", payload | {"layouts": TWO_RANKS}, 2, folder)
    return {name: Case(folder / name, model) for name, model in models.items()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= ROUNDING * scale, f"{what}: {error / scale:.1e}"


@pytest.mark.proves(
    "Every family's log-probs equal transformers'", how="packed rows", layouts=", ".join(LAYOUTS)
)
def test_logprobs_of_packed_rows_equal_transformers(case: Case) -> None:
    for layout in LAYOUTS:
        found, seen = case.found[layout], 0
        for row, logprobs in zip(found["rows"], found["logprobs"], strict=True):
            for index in np.unique(row.doc_index[row.doc_index >= 0]):
                tokens, _ = documents()[index]
                if len(tokens) == 1:
                    continue
                [start] = np.flatnonzero(row.doc_index == index)[:1]
                ours = torch.from_numpy(logprobs[start : start + len(tokens) - 1]).double()
                assert_close(
                    ours, reference_logprobs(case.model, tokens).detach(), f"{layout}, document {index}"
                )
                seen += 1
        assert seen == len(documents()) - 1


@pytest.mark.proves(
    "Every family's gradients equal transformers'", how="every weight", layouts=", ".join(LAYOUTS)
)
def test_loss_and_every_gradient_equal_transformers(case: Case) -> None:
    case.model.zero_grad()
    loss = reference_loss(case.model)
    loss.backward()
    expected = case.full({n: p.grad for n, p in case.model.named_parameters() if p.grad is not None})
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
    for layout in LAYOUTS:
        found = case.found[layout]
        assert found["loss"] == pytest.approx(loss.item(), rel=ROUNDING)
        assert found["grad_norm"] == pytest.approx(norm, rel=ROUNDING), layout
        assert found["grads"].keys() == expected.keys()
        for name, copies in found["grads"].items():
            is_shared = name == "model.embed_tokens.weight" and case.config.tie_embeddings
            assert len(copies) == (2 if is_shared and layout == "pp 2" else 1)
            for grad in copies:
                assert_close(grad, expected[name], f"{layout}, {name}")


def test_two_adamw_steps_equal_torch(case: Case) -> None:
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    matrices = [p for p in case.model.parameters() if p.dim() == 2]
    norms = [p for p in case.model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    for _ in range(2):
        optimizer.zero_grad()
        reference_loss(case.model).backward()
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
    expected = case.full({name: p.detach().clone() for name, p in case.model.named_parameters()})
    case.model.load_state_dict(before)
    for layout in LAYOUTS:
        for name, copies in case.found[layout]["weights"].items():
            for value in copies:
                # A step of Adam changes by at most LR / eps times as much as the gradient.
                error = (value - expected[name]).abs().max().item()
                assert error <= 2 * ROUNDING * LR / OPTIMIZER.eps, f"{layout}, {name}: {error:.1e}"
                assert torch.equal(value, copies[0]), f"{layout}: the copies of {name} differ"


def test_weights_for_servers_are_those_in_training(case: Case) -> None:
    for layout in LAYOUTS:
        served = case.full(case.found[layout]["served"])
        for name, copies in case.found[layout]["weights"].items():
            assert torch.equal(served[name], copies[0].to(torch.float32)), f"{layout}, {name}"
