"""SpecAttn as a worker: starts `specattn serve` and talks gRPC to it, with stubs generated from the .proto files.

The clock is the client's, in this process; the server's own figures travel in the stats beside it. Memory is the
server's process, which holds gateway, verify worker and draft worker.
"""

import argparse
import atexit
import importlib
import pathlib
import signal
import subprocess
import sys
import tempfile

import grpc
from grpc_tools import protoc

import worker

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "python"))
import local_server

MODES = {"dense": "MODE_DENSE", "sparse": "MODE_SPARSE", "exact": "MODE_EXACT"}
START_TIMEOUT_S = 60


def compile_protos(root):
    """Compiles proto/specattn/v1 into a temporary folder and puts that on the import path."""
    out = tempfile.TemporaryDirectory(prefix="specattn-stubs-")
    files = sorted(str(path) for path in (root / "specattn" / "v1").glob("*.proto"))
    if protoc.main(["protoc", f"-I{root}", f"--python_out={out.name}", f"--grpc_python_out={out.name}", *files]) != 0:
        raise SystemExit("the .proto files do not compile")
    sys.path.insert(0, out.name)
    return out


def start_server(binary, target, draft, threads, extra):
    """(process, address), once its workers have registered."""
    flags = ["--target", target, "--draft", draft, "--threads", threads, "--no-prefix-sharing", *extra]
    try:
        process, url = local_server.serve(binary, *flags, timeout=START_TIMEOUT_S)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    atexit.register(stop_server, process)
    return process, url.removeprefix("http://")


def stop_server(process):
    """Asks the server to drain, and kills it where it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def main():
    parser = argparse.ArgumentParser(description="SpecAttn worker of run.py.")
    parser.add_argument("--binary", type=pathlib.Path, required=True, help="the specattn binary")
    parser.add_argument("--proto", type=pathlib.Path, required=True, help="the folder that holds specattn/v1")
    parser.add_argument("--target", type=pathlib.Path, required=True)
    parser.add_argument("--draft", type=pathlib.Path, required=True)
    parser.add_argument("--mode", choices=sorted(MODES), default="dense")
    parser.add_argument("--draft-length", type=int, help="default: the server's choice, which drafts only while that pays")
    parser.add_argument("--capture-every", type=int, help="default: the server's choice")
    parser.add_argument("--mask-p", type=float, help="default: the server's choice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve-args", default="", help="more arguments for `specattn serve`, split at spaces")
    args = parser.parse_args()

    stubs = compile_protos(args.proto)
    common, generation, generation_grpc = (
        importlib.import_module(f"specattn.v1.{name}") for name in ("common_pb2", "generation_pb2", "generation_pb2_grpc")
    )
    process, address = start_server(args.binary, args.target, args.draft, args.threads, args.serve_args.split())
    stub = generation_grpc.GenerationServiceStub(grpc.insecure_channel(address))

    def generate(request, run):
        message = generation.GenerateRequest(
            token_ids=common.TokenIds(ids=request["prompt"]),
            sampling=common.Sampling(temperature=request["temperature"], seed=request["seed"]),
            limits=common.Limits(max_tokens=request["new_tokens"], ignore_eos=True),
            mode=getattr(common, MODES[args.mode]),
            draft=common.DraftPolicy(draft_length=args.draft_length, capture_every=args.capture_every),
            mask=common.MaskPolicy(mask_p=args.mask_p),
        )
        for response in stub.Generate(message, timeout=600):
            kind = response.WhichOneof("event")
            if kind == "delta":
                run.emit(response.delta.token_ids)
            elif kind == "started":
                if response.started.prompt_tokens != len(request["prompt"]):
                    raise RuntimeError(f"the server saw {response.started.prompt_tokens} prompt tokens")
            elif kind == "finished":
                finished = response.finished
                run.stats = {field.name: getattr(finished.stats, field.name) for field in finished.stats.DESCRIPTOR.fields}
                run.stats["server_ttft_seconds"] = finished.ttft_seconds
                run.stats["server_elapsed_seconds"] = finished.elapsed_seconds

    try:
        worker.serve(generate, {"address": address, "server_pid": process.pid}, rss_pid=process.pid)
    finally:
        stop_server(process)
        stubs.cleanup()


if __name__ == "__main__":
    main()
