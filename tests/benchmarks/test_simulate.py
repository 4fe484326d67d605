"""What `benchmarks.simulate` tells the simulator is what the servers do."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.simulate import PROMPT_TOKENS, Bench, requests
from phi4r.plan.simulate import Fleet, Request, ServerCost, Servers

TRUE = ServerCost(fixed_s=0.006, sequence_s=2e-4, request_s=0.011)
CALL_S = 0.03


class Clockwork(Bench):
    """Servers that take exactly what the simulator says."""

    def __init__(self) -> None:
        pass

    def fixed_s(self, sequences: int, length: int, servers: int) -> float:
        fleet = Fleet(Servers(count=servers, costs=(TRUE,), slots=sequences))
        fleet.submit([Request(0, PROMPT_TOKENS, length) for _ in range(servers * sequences)])
        return CALL_S + fleet.finish(0)


@pytest.mark.parametrize("servers", [1, 2])
def test_the_costs_of_a_server_are_found_again(servers: int) -> None:
    cost, call_s = Clockwork().cost(servers)
    found = (cost.fixed_s, cost.sequence_s, cost.request_s, call_s)
    assert found == pytest.approx((TRUE.fixed_s, TRUE.sequence_s, TRUE.request_s, CALL_S), rel=1e-6)


def test_requests_repeat_and_have_streams_of_their_own() -> None:
    made = requests(3, 8)
    assert made == requests(3, 8)
    assert len({request.key for request in made + requests(4, 8)}) == 16
    assert np.unique([len(request.prompt_tokens) for request in made]) == [PROMPT_TOKENS]
