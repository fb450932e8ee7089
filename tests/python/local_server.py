"""`specattn serve` for a test: started on a free port, and its URL once it is ready."""

import subprocess
import threading

START_TIMEOUT_S = 300


def serve(binary, *arguments):
    """`specattn serve` with more arguments: the process and its URL.

    Raises RuntimeError when it does not print one within START_TIMEOUT_S.
    """
    command = [binary, "serve", "--listen", "127.0.0.1:0", "--quiet", "--log-level", "warn", *arguments]
    process = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    printed = process.stdout.readline().strip()
    timer.cancel()
    if not printed.startswith("http://"):
        raise RuntimeError(f"specattn serve did not start: it printed {printed!r}")
    return process, printed
