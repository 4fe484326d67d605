"""Rollouts from vLLM servers over HTTP: token ids in, token ids and log-probs out.

    engine.py   the engine the loop talks to, on all ranks: `sync` weights, `generate`
    fleet.py    rank 0: shares requests out over servers, requeues what a failed one held, replaces it
    client.py   one server's endpoints
    server.py   a server that phi4r starts and ends; keeper.py ends it when phi4r dies
    registry.py how trainer and servers on other nodes find each other; serve.py is `phi4r serve`, over there
    transfer.py sends weights from rank 0's memory to a server's workers
    inside/     what vLLM's interpreter imports: the check of the key, the workers' end of `transfer`
    weights.py  digests that prove what a server holds

vLLM lives in an environment of its own (`make vllm-deps`); nothing here imports it. Developed with vLLM 0.32.
"""
