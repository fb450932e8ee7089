"""`specattn serve` for a test or a benchmark: started on a free port, and its URL once it is ready."""

import subprocess
import threading

START_TIMEOUT_S = 300


def serve(binary, *arguments, timeout=START_TIMEOUT_S):
    """`specattn serve` with more arguments: the process and its URL, which it prints once its workers have registered.

    Raises RuntimeError when it does not print one within `timeout` seconds.
    """
    command = [binary, "serve", "--listen", "127.0.0.1:0", "--quiet", "--log-level", "warn", *arguments]
    process = subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    printed = process.stdout.readline().strip()
    timer.cancel()
    if not printed.startswith("http://"):
        process.kill()
        raise RuntimeError(f"specattn serve did not start (limit {timeout} s): it printed {printed!r}")
    return process, printed
