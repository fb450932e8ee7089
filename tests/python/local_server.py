"""`specattn serve` for a test or a benchmark: started on a free port, and its URL once it is ready."""

import contextlib
import pathlib
import signal
import subprocess
import threading

START_TIMEOUT_S = 300
# The bundled models have none.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'].strip() }}\n{% endfor %}"
    "{% if add_generation_prompt %}She answered:{% endif %}"
)


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


@contextlib.contextmanager
def serve_chat(binary, model, folder):
    """`specattn serve` of the bundled models under a name, with a chat template, which is written into `folder`: its URL. It is ended
    behind the block.
    """
    template = pathlib.Path(folder) / "template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    process, url = serve(binary, "--served-model-name", model, "--chat-template", template)
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
