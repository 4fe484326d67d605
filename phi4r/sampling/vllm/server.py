"""A vLLM server that phi4r starts on this machine, and ends."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from phi4r.configs.sections import VLLMConfig
from phi4r.core import optional
from phi4r.sampling.vllm import keeper

# What the trainer's ranks are told is not for the server, which would take it for its own.
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "TRITON_INTERPRET",
)  # fmt: skip

HEALTH_TIMEOUT_S = 30.0
"""Seconds for an answer about its health."""
HEALTH_EVERY_S = 5.0
UNHEALTHY_CHECKS = 3
"""Checks in a row without a good answer after which a server counts as failed."""

INSIDE = Path(__file__).parent / "inside"
"""Our modules that vLLM's interpreter imports."""
RECEIVES = (
    "--load-format", "dummy", "--worker-extension-cls", "phi4r_transfer.Extension",
    "--weight-transfer-config", '{"backend": "phi4r"}',
)  # fmt: skip
"""Options of a server that is sent its weights: it starts with random ones."""
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str) -> int:
    """A TCP port that nobody has at the address `host` just now. From below the range that outgoing
    connections take theirs from: a server binds it only once its model is loaded, half a minute later."""
    try:
        lowest = int(EPHEMERAL_PORTS.read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux
        lowest = 32_768
    for port in (*random.SystemRandom().sample(range(lowest // 2, lowest), 64), 0):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind((host, port))
            return int(found.getsockname()[1])
    raise OSError(f"no free port at {host}")


class ServerProcess:
    """One server: started with a weights folder, ended by `stop` or with this process.

    number: counts from 0 and names its log; dtype: vLLM's name of the compute type; max_model_len: longest
    prompt and response in tokens; host: address to listen on; port: 0 takes a free one at every start; key:
    what requests must carry ("": nothing); devices: CUDA_VISIBLE_DEVICES ("": vllm.devices, else inherited);
    transfer: how it gets weights ("": vllm.transfer).
    """

    def __init__(
        self,
        number: int,
        config: VLLMConfig,
        dtype: str,
        max_model_len: int,
        on_cpu: bool,
        log: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        key: str = "",
        devices: str = "",
        transfer: str = "",
    ) -> None:
        self.number, self.config, self.log = number, config, log
        self.dtype, self.max_model_len, self.on_cpu = dtype, max_model_len, on_cpu
        self.host, self.port, self.key = host, port, key
        self.transfer = transfer or config.transfer
        self.devices = devices or (config.device_list[number] if config.device_list else "")
        self.python = optional.vllm_python(config.python)
        self.url = ""
        self.num_starts = 0
        self.began = 0.0
        self.weights = Path()
        """What it was started with."""
        self._process: subprocess.Popen[bytes] | None = None
        self._life_line = -1

    def start(self, weights: Path) -> None:
        """Start it with the Hugging Face folder `weights`. Returns at once."""
        self.stop()
        port = self.port or free_port(self.host)
        self.url = f"http://{self.host}:{port}"
        theirs, self._life_line = os.pipe()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, keeper.__file__, str(theirs), *self.command(weights, port)],
                env=self.environment(),
                pass_fds=[theirs],
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        os.close(theirs)
        self.num_starts += 1
        self.weights = weights
        self.began = time.monotonic()

    def command(self, weights: Path, port: int) -> list[str]:
        """The command line. Log-probs are those of the distribution that is sampled from, and nothing of a
        generation_config.json is applied behind our back."""
        return [
            self.python, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(weights), "--served-model-name", "policy", "--host", self.host,
            "--port", str(port), "--tokens-only", "--logprobs-mode", "processed_logprobs",
            "--generation-config", "vllm", "--dtype", self.dtype, "--max-model-len", str(self.max_model_len),
            "--disable-uvicorn-access-log", *(["--enforce-eager"] if self.on_cpu else []),
            *(["--middleware", "phi4r_guard.Guard"] if self.key else []),
            *(RECEIVES if self.transfer != "files" else []), *shlex.split(self.config.options),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """This process's environment without a rank's variables. What else is chosen may be set outside."""
        chosen = {
            "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that load weights
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.on_cpu:
            # Threads stay on the cores this process may use; vLLM would pin them to cores of its own choice.
            # The engine holds its only worker itself: one process less to start, a third of the time.
            chosen |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(self.num_threads),
            }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        given = {**chosen, **inherited}
        if self.devices:
            given["CUDA_VISIBLE_DEVICES"] = self.devices
        if self.key:  # never on the command line, which every user of the machine can read
            given["VLLM_API_KEY"] = self.key
        if self.key or self.transfer != "files":
            given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(INSIDE), given.get("PYTHONPATH", "")]))
        return given

    @property
    def num_threads(self) -> int:
        """On CPU: this server's share of the cores, one of which is left to the trainer. Threads of OpenMP
        spin while they wait for each other: with more of them than cores, two servers are slower than one."""
        return max(1, (len(os.sched_getaffinity(0)) - 1) // self.config.num_servers)

    @property
    def is_alive(self) -> bool:
        """Whether it was started and its process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The keeper's process id, which is also the id of the server's process group."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End it and wait until it is gone."""
        if self._life_line >= 0:
            os.close(self._life_line)
            self._life_line = -1
        if self._process is not None:
            try:
                self._process.wait(2 * keeper.GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def last_words(self) -> str:
        """The last line of its log that looks like an error, for a message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
        except OSError:
            return ""
        marked = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
        return marked[-1][-300:] if marked else ""
