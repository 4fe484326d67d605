"""One vLLM server over HTTP: sampling by token ids, loading weights, saying what it holds.

POST /inference/v1/generate       tokens in, tokens out (--tokens-only)
POST /collective_rpc              reload_weights on every worker (VLLM_SERVER_DEV_MODE=1, as all below)
POST /reset_prefix_cache          without it, cached keys and values of older weights would be used
POST /update_weight_version       a label, returned with every token
POST /weight_checker              SHA-256 of each parameter
POST /abort_requests              running requests end with the tokens that they have
POST /init_weight_transfer_engine and what follows it: see `transfer`
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import tenacity
from numpy.random import SeedSequence

from phi4r.configs.sections import VLLMConfig
from phi4r.core.errors import UserError
from phi4r.core.seeds import Stream
from phi4r.sampling.types import Completion, SampleRequest, SamplingOptions
from phi4r.sampling.vllm.server import HEALTH_TIMEOUT_S, INSIDE, RECEIVES

BUSY = (429, 503)
CONNECTIONS = 3
"""Connections tried for one call: a server closes one that was idle just when it is used again."""
UNPREPARED = ("Weight transfer not configured", "Invalid init_info")
"""What vLLM says where it was started without our transfer engine."""


class ServerError(Exception):
    """A server failed, hangs or holds the wrong weights: what it was asked for is to be asked elsewhere."""


def seed_of(key: tuple[int, ...], num_begun: int = 0) -> int:
    """The seed, 63 bits, of the sample named by the counters `key`. Where it goes on after `num_begun` tokens
    it has another one: a server begins each request with the first random number of its seed."""
    if num_begun:
        key = (*key, Stream.CONTINUED, num_begun)
    return int(SeedSequence(list(key)).generate_state(1, "uint64")[0] >> 1)


class Client:
    """The endpoints of the server at `url`. `http` is shared by the clients of one event loop."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, config: VLLMConfig, request_timeout_s: float
    ) -> None:
        self.http, self.url, self.config, self.request_timeout_s = http, url, config, request_timeout_s

    async def _call(self, method: str, path: str, timeout_s: float, **options: Any) -> httpx.Response:
        """A call that is repeated while the server says it is busy, and a few times where the connection
        broke: any call may be made twice. ServerError where the server fails, UserError where it refuses."""
        busy = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_result(lambda response: response.status_code in BUSY),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5.0),
            stop=tenacity.stop_after_delay(min(timeout_s, 60.0)),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        broken = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((httpx.NetworkError, httpx.RemoteProtocolError)),
            wait=tenacity.wait_random(0.1, 0.5),
            stop=tenacity.stop_after_attempt(CONNECTIONS),
            reraise=True,
        )
        response: httpx.Response
        try:
            response = await busy(
                broken, self.http.request, method, self.url + path, timeout=timeout_s, **options
            )
        except httpx.TimeoutException:
            raise ServerError(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise ServerError(f"{self.url}{path}: {type(error).__name__} {error}") from None
        if response.status_code == 401:
            raise UserError(
                f"{self.url}{path} wants another key: set VLLM_API_KEY to the one that the server was started"
                " with"
            )
        if response.status_code in (403, 404):
            raise UserError(
                f"{self.url}{path} is not served (HTTP {response.status_code}): start vLLM with"
                " VLLM_SERVER_DEV_MODE=1 and --tokens-only"
            )
        if 400 <= response.status_code < 500 and response.status_code not in BUSY:
            raise UserError(f"{self.url}{path} refused the request: {response.text[:500]}")
        if response.status_code != 200:
            raise ServerError(f"{self.url}{path}: HTTP {response.status_code} {response.text[:300]}")
        return response

    async def is_healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            response = await self.http.get(self.url + "/health", timeout=HEALTH_TIMEOUT_S)
        except httpx.TransportError:
            return False
        return response.status_code == 200

    async def generate(
        self,
        request: SampleRequest,
        options: SamplingOptions,
        stop_ids: list[int],
        version: int,
        begun: Completion,
    ) -> Completion:
        """Sample one response, or what is missing after `begun`; returns the whole of it, or as much as there
        was when it was aborted. ServerError unless every new token was sampled by the weights `version`."""
        body = {
            "token_ids": [*request.prompt_tokens, *begun.tokens],
            "sampling_params": {
                "n": 1,
                "max_tokens": options.max_new_tokens - len(begun.tokens),
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": options.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": seed_of(request.key, len(begun.tokens)),
                "stop_token_ids": stop_ids,
                "ignore_eos": True,  # what ends a response is in stop_token_ids
                "logprobs": 0,
                "detokenize": False,
            },
        }
        timeout_s = self.request_timeout_s
        response = await self._call("POST", "/inference/v1/generate", timeout_s, json=body)
        found = self._completion(response.json()["choices"][0], stop_ids, version)
        if options.top_p < 1 or options.top_k > 0:
            found = replace(found, logprobs=[])  # they are the filtered distribution's
        return begun.followed_by(found)

    def _completion(self, choice: dict[str, Any], stop_ids: list[int], version: int) -> Completion:
        reason, tokens = choice["finish_reason"], choice["token_ids"] or []
        if reason == "abort" and not tokens:
            return Completion()
        if reason not in ("stop", "length", "abort"):
            raise ServerError(f"{self.url}: a response ended by {reason!r}")
        content = choice["logprobs"]["content"]
        if [entry["token_id"] for entry in content] != tokens:
            raise ServerError(f"{self.url}: log-probs are not those of the tokens")
        spans = choice.get("weight_versions") or []
        if [(span["version"], span["start"], span["end"]) for span in spans] != [
            (str(version), 0, len(tokens))
        ]:
            raise ServerError(f"{self.url}: a response was sampled by weights {spans}, expected {version}")
        finished = reason == "stop"
        if finished != (tokens[-1] in stop_ids):
            raise ServerError(f"{self.url}: a response ended by {reason!r} with token {tokens[-1]}")
        logprobs = [entry["logprob"] for entry in content]
        return Completion(tokens, logprobs, finished, [(version, len(tokens))])

    async def abort(self) -> None:
        """End all requests that run: each is answered with the tokens that it has."""
        await self._call("POST", "/abort_requests", HEALTH_TIMEOUT_S, json={})

    async def load(self, folder: Path, version: int) -> None:
        """Replace the weights by those of `folder`, forget cached keys and values, and set the label last."""
        timeout_s = self.config.sync_timeout_s
        # It may have been started without weights, for a broadcast.
        config = {"overrides": {"load_config": {"load_format": "auto"}}}
        update = {"method": "update_config", "kwargs": config}
        await self._call("POST", "/collective_rpc", timeout_s, json=update)
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": timeout_s}
        await self._call("POST", "/collective_rpc", timeout_s, json=rpc)
        await self.settle(version)

    async def settle(self, version: int) -> None:
        """After loading: forget cached keys and values, and set the label last."""
        reset = (await self._call("POST", "/reset_prefix_cache", self.config.sync_timeout_s)).json()
        if not reset["success"]:
            raise ServerError(f"{self.url}: the prefix cache could not be reset (requests still run)")
        await self.label(version)

    async def num_workers(self) -> int:
        """Processes that hold a part or a copy of the weights."""
        found = await self._call("GET", "/get_world_size", HEALTH_TIMEOUT_S)
        return int(found.json()["world_size"])

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Have the workers join a group with the trainer. Returns when they did."""
        try:
            await self._transfer("init_weight_transfer_engine", init_info=init_info)
        except ServerError as error:
            if any(words in str(error) for words in UNPREPARED):
                raise UserError(
                    f"{self.url} cannot be sent weights (vllm.transfer): start it with PYTHONPATH={INSIDE}"
                    f" and {shlex.join(RECEIVES)}, or use files"
                ) from None
            raise

    async def start_update(self) -> None:
        """Prepare for new weights, also where an earlier trainer ended in mid-update."""
        try:
            await self._transfer("start_weight_update")
        except ServerError:
            await self.finish_update()
            await self._transfer("start_weight_update")

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the workers receive weights. Returns when they did."""
        await self._transfer("update_weights", update_info=update_info)

    async def finish_update(self) -> None:
        """The new weights are all there."""
        await self._transfer("finish_weight_update")

    async def _transfer(self, verb: str, **body: Any) -> None:
        await self._call("POST", f"/{verb}", self.config.sync_timeout_s, json=body)

    async def label(self, version: int) -> None:
        """Name the weights that the server holds."""
        body = {"new_version": str(version)}
        await self._call("POST", "/update_weight_version", HEALTH_TIMEOUT_S, json=body)

    async def digests(self) -> dict[str, str]:
        """SHA-256 of every parameter, under "dp0:pp0:pcp0:tp0:model.norm.weight" and so on."""
        body = {"action": "checksum"}
        found = await self._call("POST", "/weight_checker", self.config.sync_timeout_s, json=body)
        return found.json()["checksums"]
