"""Keeps a server's processes together: `python keeper.py LIFE_LINE COMMAND...`, started by `server` only.

The keeper leads a process group. When the pipe LIFE_LINE closes, because phi4r is done with the server or
died, however it died, the server is asked to end; when the server has ended, so do the processes it left
behind. Only the standard library, for it has to be there at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 20.0


def main(life_line: int, command: list[str]) -> None:
    """Run `command` until it ends or the life line is cut, then end the whole process group."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    cut = threading.Event()

    def watch() -> None:
        while os.read(life_line, 1):
            pass
        cut.set()
        server.terminate()

    threading.Thread(target=watch, daemon=True).start()
    while True:
        try:
            code = server.wait(GRACE_S if cut.is_set() else 0.5)
            break
        except subprocess.TimeoutExpired:
            if cut.is_set():
                server.kill()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    print(f"keeper: the server has ended ({how})", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
