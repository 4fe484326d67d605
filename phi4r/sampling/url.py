"""Any server with OpenAI's API: a teacher, a judge, a model that phi4r has no weights of.

A request with messages goes to /chat/completions, where the server renders it; one with tokens to
/completions, which vLLM and others take as token ids. The answer is text. What is busy or broken for a moment
is asked again until `timeout_s` is over; the key comes from the environment (PHI4R_API_KEY), never from a
recipe.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import httpx
import tenacity
from numpy.random import SeedSequence

from phi4r.configs.sections import SamplingConfig
from phi4r.core.console import say
from phi4r.core.errors import UserError
from phi4r.parallel.heartbeat import beat
from phi4r.sampling.types import Completion, OnAnswer, SampleRequest, SamplingOptions

KEY_VARIABLE = "PHI4R_API_KEY"
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
BEAT_S = 10.0


class URLError(Exception):
    """A request that failed for good."""


def seed_of(key: tuple[int, ...]) -> int:
    """The seed, 31 bits (the most that every server takes), of the sample named by the counters `key`."""
    return int(SeedSequence(list(key)).generate_state(1, "uint32")[0] >> 1)


async def post(http: httpx.AsyncClient, url: str, body: dict[str, Any], timeout_s: float) -> httpx.Response:
    """The server's final response: repeated while it is busy or the connection breaks, at most `timeout_s` in
    all. URLError where there is none."""
    patient = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_result(lambda response: response.status_code in BUSY)
        | tenacity.retry_if_exception_type(httpx.TransportError),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=20.0),
        stop=tenacity.stop_after_delay(timeout_s),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    try:
        async with asyncio.timeout(timeout_s):
            response: httpx.Response = await patient(http.post, url, json=body, timeout=timeout_s)
    except TimeoutError:
        raise URLError(f"{url} gave no answer within {timeout_s:g} s") from None
    except httpx.HTTPError as error:
        raise URLError(f"{url}: {type(error).__name__} {error}") from None
    return response


def headers(variable: str = KEY_VARIABLE) -> dict[str, str]:
    """What requests carry: the key that the environment has in `variable`, if any."""
    key = os.environ.get(variable, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


class URLSampler:
    """The model `config.model` behind `config.url`."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.url = config.url.rstrip("/")
        self.failures: list[str] = []

    def generate(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, on_answer: OnAnswer
    ) -> list[Completion]:
        """See `Sampler`. A failed request has no answer; UserError after more than sampling.max_failures of
        them, and at the end where there was any."""
        self.failures = []
        found: dict[int, Completion] = {}

        def keep(index: int, answer: Completion, server: str) -> None:
            found[index] = answer
            on_answer(index, answer, server)

        asyncio.run(self._generate(requests, options, keep))
        if self.failures:
            raise UserError(
                f"{self.url}: {len(self.failures)} of {len(requests)} requests have no answer (the same"
                f" command asks for them again); the last: {self.failures[-1]}"
            )
        return [found[index] for index in range(len(requests))]

    async def _generate(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, on_answer: OnAnswer
    ) -> None:
        waiting = iter(enumerate(requests))
        lanes = self.config.max_in_flight
        limits = httpx.Limits(max_connections=lanes, max_keepalive_connections=lanes)

        async def lane(http: httpx.AsyncClient) -> None:
            for index, request in waiting:
                try:
                    on_answer(index, await self._ask(http, request, options), self.url)
                except URLError as error:
                    self._failed(str(error))

        async with httpx.AsyncClient(headers=headers(), limits=limits) as http:
            tasks = [asyncio.create_task(lane(http)) for _ in range(min(lanes, len(requests)))]
            try:
                while not all(task.done() for task in tasks):
                    done, _ = await asyncio.wait(tasks, timeout=BEAT_S, return_when=asyncio.FIRST_EXCEPTION)
                    beat()
                    for task in done:
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _failed(self, text: str) -> None:
        self.failures.append(text)
        say(f"warning: {text}")
        if len(self.failures) > self.config.max_failures:
            raise UserError(
                f"{self.url}: {len(self.failures)} requests failed (sampling.max_failures"
                f" {self.config.max_failures}); the last: {text}"
            )

    async def _ask(
        self, http: httpx.AsyncClient, request: SampleRequest, options: SamplingOptions
    ) -> Completion:
        body: dict[str, Any] = {
            "model": self.config.model,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": seed_of(request.key),
            "n": 1,
        }
        if options.top_k:
            body["top_k"] = options.top_k  # not OpenAI's, but of every open server
        if request.messages:
            path = "/chat/completions"
            body["messages"] = [{"role": role, "content": content} for role, content in request.messages]
        else:
            path, body["prompt"] = "/completions", list(request.prompt_tokens)
        response = await post(http, self.url + path, body, self.config.request_timeout_s)
        if response.status_code != 200:
            text = f"{self.url}{path}: HTTP {response.status_code} {response.text[:300]}"
            if response.status_code in (401, 403, 404):  # no other request would fare better
                hint = f" (its key: {KEY_VARIABLE})" if response.status_code in (401, 403) else ""
                raise UserError(text + hint)
            raise URLError(text)
        return _completion(self.url + path, response)


def _completion(url: str, response: httpx.Response) -> Completion:
    try:
        found = response.json()
        choice = found["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason, count = choice["finish_reason"], int(found["usage"]["completion_tokens"])
        if not isinstance(text, str):
            raise TypeError(f"its text is {text!r}")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise URLError(f"{url}: not a completion: {type(error).__name__} {error}") from None
    if reason not in ("stop", "length"):
        raise URLError(f"{url}: a completion ended by {reason!r}")
    return Completion([], [], reason == "stop", [(0, count)], text)
