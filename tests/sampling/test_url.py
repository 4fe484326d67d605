"""A server with OpenAI's API: what is asked, what is asked again, and when sampling stops."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from phi4r.configs.sections import SamplingConfig
from phi4r.core.errors import ConfigError, UserError
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.sampling.url import KEY_VARIABLE, URLSampler

Reply = Callable[[int, str, dict[str, Any]], tuple[int, Any]]
"""(number of the call, path, body) -> (status, body)."""


@contextmanager
def server(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its base URL, and the calls that came: path, headers, body."""
    calls: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                calls.append({"path": self.path, "headers": dict(self.headers), **body})
                number = len(calls)
            status, found = reply(number, self.path, body)
            if status == 0:  # the connection breaks
                self.connection.close()
                return
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}/v1", calls
    finally:
        found.shutdown()
        found.server_close()
        thread.join(10)


def said(text: str, reason: str = "stop", count: int = 3) -> dict[str, Any]:
    choice = {"message": {"content": text}, "text": text, "finish_reason": reason}
    return {"choices": [choice], "usage": {"completion_tokens": count}}


def ask(
    url: str, requests: list[SampleRequest], options: SamplingOptions | None = None, **settings: Any
) -> tuple[list[Completion], list[int]]:
    """The answers, and the order in which they came."""
    config = SamplingConfig(engine="openai", url=url, model="teacher", request_timeout_s=20.0, **settings)
    order: list[int] = []
    sampler = URLSampler(config)
    found = sampler.generate(
        requests, options or SamplingOptions(50), lambda index, answer, name: order.append(index)
    )
    return found, order


CHAT = [SampleRequest((), (4, number), (("user", f"question {number}"),)) for number in range(9)]


def test_messages_and_tokens_are_asked_for_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with server(lambda number, path, body: (200, said("so"))) as (url, calls):
        found, _ = ask(url, [CHAT[0], SampleRequest((5, 6), (9,))], SamplingOptions(50, 0.8, 0.95, 40))
    assert found == [Completion([], [], True, [(0, 3)], "so")] * 2
    assert found[0].num_tokens == 3
    chat, tokens = sorted(calls, key=lambda call: call["path"])
    assert (chat["path"], tokens["path"]) == ("/v1/chat/completions", "/v1/completions")
    assert chat["messages"] == [{"role": "user", "content": "question 0"}]
    assert tokens["prompt"] == [5, 6]
    for call in calls:
        assert (call["temperature"], call["top_p"], call["top_k"], call["max_tokens"]) == (0.8, 0.95, 40, 50)
        assert call["headers"]["Authorization"] == "Bearer secret"
    assert chat["seed"] != tokens["seed"]


def test_a_busy_or_broken_server_is_asked_again() -> None:
    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return {1: (503, {}), 2: (429, {}), 3: (0, {})}.get(
            number, (200, said(body["messages"][0]["content"]))
        )

    with server(reply) as (url, calls):
        found, order = ask(url, CHAT[:4], max_in_flight=2)
    assert [answer.text for answer in found] == [f"question {number}" for number in range(4)]
    assert sorted(order) == [0, 1, 2, 3]
    assert len(calls) == 7


def test_a_failed_request_leaves_the_others_their_answers() -> None:
    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][0]["content"]
        return (400, {"error": "too long"}) if text == "question 2" else (200, said(text))

    answered: list[int] = []
    with server(reply) as (url, _):
        config = SamplingConfig(engine="openai", url=url, model="teacher")
        with pytest.raises(UserError, match=r"1 of 9 requests have no answer \(the same command asks"):
            URLSampler(config).generate(
                CHAT, SamplingOptions(50), lambda index, answer, name: answered.append(index)
            )
    assert sorted(answered) == [0, 1, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"choices": []}, "not a completion: IndexError"),
        (said("cut", "content_filter"), "ended by 'content_filter'"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "not a completion"),
    ],
)
def test_too_many_failures_stop_sampling(body: dict[str, Any], what: str) -> None:
    with (
        server(lambda number, path, _: (200, body)) as (url, calls),
        pytest.raises(UserError, match=r"3 requests failed \(sampling\.max_failures 2\)") as caught,
    ):
        ask(url, CHAT, max_failures=2, max_in_flight=1)
    assert what in str(caught.value)
    assert len(calls) == 3


def test_a_wrong_key_stops_at_once() -> None:
    with (
        server(lambda number, path, body: (401, {"error": "no"})) as (url, calls),
        pytest.raises(UserError, match=f"HTTP 401 .*its key: {KEY_VARIABLE}"),
    ):
        ask(url, CHAT, max_in_flight=1)
    assert len(calls) == 1


def test_url_and_model_belong_to_the_engine() -> None:
    for settings in (
        {"url": "http://h/v1"}, {"engine": "openai", "url": "http://h/v1"}, {"engine": "vllm", "model": "m"},
        {"engine": "openai", "model": "m", "url": "h:80"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            SamplingConfig(**settings)  # type: ignore[arg-type]
