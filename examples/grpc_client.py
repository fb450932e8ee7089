"""Streams a completion over gRPC, with nothing but the .proto files.

    pip install grpcio grpcio-tools
    python examples/grpc_client.py "Once upon a time"

The types are made from proto/specattn/v1 when the program starts; a program to keep would make them once, by
`python -m grpc_tools.protoc`. A stream that breaks is resumed, so that every token comes exactly once.
"""

import importlib.resources
import os
import pathlib
import sys
import tempfile
import time

import grpc
from grpc_tools import protoc

GATEWAY = os.environ.get("SPECATTN_GATEWAY", "http://127.0.0.1:7400")
PROTO = pathlib.Path(__file__).resolve().parent.parent / "proto"


def generated_types():
    """The modules `generation_pb2`, `generation_pb2_grpc` and `common_pb2`."""
    folder = tempfile.mkdtemp(prefix="specattn-types-")
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    files = [str(path) for path in sorted(PROTO.glob("specattn/v1/*.proto"))]
    line = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*line, *files]) != 0:
        sys.exit("the .proto files do not compile")
    sys.path.insert(0, folder)
    from specattn.v1 import common_pb2, generation_pb2, generation_pb2_grpc

    return generation_pb2, generation_pb2_grpc, common_pb2


generation, services, common = generated_types()


def connect():
    """A channel to the gateway: by TLS where its URL is https."""
    address = GATEWAY.split("://", 1)[-1]
    if GATEWAY.startswith("https://"):
        return grpc.secure_channel(address, grpc.ssl_channel_credentials())
    return grpc.insecure_channel(address)


def follow(stub, stream, metadata):
    """Yields the events of a session, over broken connections too."""
    session, tokens = None, 0
    while True:
        try:
            for event in stream:
                kind = event.WhichOneof("event")
                if kind == "started":
                    session = event.started.session_id
                elif kind == "delta":
                    tokens += len(event.delta.token_ids)
                yield kind, getattr(event, kind)
            return
        except grpc.RpcError as error:
            if session is None or error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(0.2)
            resume = generation.ResumeRequest(session_id=session, from_index=tokens)
            stream = stub.Resume(resume, metadata=metadata)


def main():
    prompt = " ".join(sys.argv[1:]) or "It was a bright cold day in April"
    key = os.environ.get("SPECATTN_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    request = generation.GenerateRequest(
        text=prompt,
        # The target's own distribution, from masked passes that dense ones confirm.
        mode=common.MODE_EXACT,
        sampling=common.Sampling(temperature=0.8, seed=7),
        limits=common.Limits(max_tokens=64),
    )
    with connect() as channel:
        stub = services.GenerationServiceStub(channel)
        stream = stub.Generate(request, metadata=metadata, timeout=120)
        for kind, event in follow(stub, stream, metadata):
            if kind == "delta":
                print(event.text, end="", flush=True)
            elif kind == "finished":
                stats = event.stats
                share = stats.kv_entries_read / max(stats.kv_entries_dense, 1)
                print(f"\n{stats.completion_tokens} tokens, {share:.0%} of the KV entries read", file=sys.stderr)


if __name__ == "__main__":
    main()
