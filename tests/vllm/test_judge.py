"""The judge at a real vLLM server: a tiny Phi-3 whose weights make it say one word, whatever it reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from phi4r.configs.sections import RewardConfig, VLLMConfig
from phi4r.core.problem import Problem
from phi4r.sampling.vllm.server import ServerProcess
from phi4r.tasks import grade_responses
from phi4r.verify.judge import judge_counts
from phi4r.verify.pool import VerifierPool

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

WORD, END = "CORRECT", "<|im_end|>"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}<|im_sep|>{{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)


class ChatServer(ServerProcess):
    """A server with the endpoints that people use, instead of the one for tokens."""

    def command(self, weights: Path, port: int) -> list[str]:
        return [word for word in super().command(weights, port) if word != "--tokens-only"]


def write_model(folder: Path) -> None:
    """A Phi-3 whose layers add nothing: after `CORRECT` it ends, after anything else it says `CORRECT`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_sep|>", END])
    tokenizer.add_tokens([WORD])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(folder)
    config = Phi3Config(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
        eos_token_id=wrapped.eos_token_id, bos_token_id=None, pad_token_id=wrapped.eos_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Phi3ForCausalLM(config)
    word = wrapped.convert_tokens_to_ids(WORD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 0], embedding[word, 0], embedding[word, 1] = 1.0, 0.0, 1.0
        head[word, 0] = head[wrapped.eos_token_id, 1] = 10.0
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def url(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("judge")
    write_model(folder / "model")
    server = ChatServer(
        0, VLLMConfig(python=vllm_python), "float32", 4096, not torch.cuda.is_available(), folder / "log"
    )
    server.start(folder / "model")
    try:
        until = time.monotonic() + 300
        while not answers(server.url):
            assert server.is_alive, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, "the server did not get ready"
            time.sleep(1)
        yield f"{server.url}/v1"
    finally:
        server.stop()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_real_server_is_asked_and_its_word_counts(url: str) -> None:
    problem = Problem(id="p", problem="How many apples?", answer="7")
    responses = [r"<think></think>\boxed{8}", *(f"<think></think>There are {n} apples." for n in range(20))]
    settings = RewardConfig(judge_url=url, judge_model="policy", judge_timeout_s=60)
    with VerifierPool(1) as pool:
        verdicts = grade_responses([(problem, text) for text in responses], pool, settings)
        assert [(v.outcome, v.method) for v in verdicts] == [
            ("wrong", "rational"), *[("correct", "judge")] * 20
        ]  # fmt: skip
        assert judge_counts(verdicts)["judge_asked"] == 20
        unknown = RewardConfig(judge_url=url, judge_model="another model")
        (verdict,) = grade_responses([(problem, responses[1])], pool, unknown)
        assert (verdict.outcome, verdict.method) == ("no_answer", "judge_refused")
