"""A client written from the .proto files alone, in another language: Python and grpcio.

    python client_test.py --binary ../../target/release/specattn --target ../../models/target --draft ../../models/draft

Compiles proto/specattn/v1 into a temporary folder, starts `specattn serve` on a free port and talks to it: streams,
cancels, deadlines, errors, health, reflection. Nothing of the project's Rust code or generated types is used.

Exit status: 0 passed, 1 failed, 77 skipped because grpcio or grpcio-tools is missing (with a line on stderr that begins
with SKIPPED). Health and reflection are checked where grpcio-health-checking and grpcio-reflection are installed.
"""

import argparse
import importlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

try:
    import grpc
    from grpc_tools import protoc
except ImportError as missing:
    print(f"SKIPPED: the Python client test needs grpcio and grpcio-tools: {missing}", file=sys.stderr)
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROMPT = "It was a bright cold day in April"
# Generous: a debug build on a busy machine.
CALL_TIMEOUT_S = 120

generation = common = registry = None
server = None


class Server:
    """`specattn serve` on a free port, and the stubs to talk to it."""

    def __init__(self, args, stubs):
        command = [args.binary, "serve", "--listen", "127.0.0.1:0", "--target", args.target, "--draft", args.draft]
        self.process = subprocess.Popen(
            [*map(str, command), "--quiet", "--log-level", "warn"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self.wait_ready(args.start_timeout)
        self.channel = grpc.insecure_channel(self.address)
        self.generation = stubs["generation_pb2_grpc"].GenerationServiceStub(self.channel)
        self.registry = stubs["registry_pb2_grpc"].RegistryServiceStub(self.channel)

    def status(self):
        return self.registry.Status(registry.StatusRequest(), timeout=10)

    def wait_ready(self, timeout_s):
        """The address: the server prints its URL once its workers have registered."""
        timer = threading.Timer(timeout_s, self.process.kill)
        timer.start()
        url = self.process.stdout.readline().strip()
        timer.cancel()
        if not url.startswith("http://"):
            raise RuntimeError(f"specattn serve did not start (limit {timeout_s} s): it printed {url!r}")
        return url.removeprefix("http://")

    def stop(self):
        """SIGTERM, and the exit status; killed where it does not end."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "killed after 30 s"


def compile_protos(folder):
    """Compiles the .proto files into `folder` and imports what came out."""
    root = ROOT / "proto"
    files = sorted(str(path) for path in (root / "specattn" / "v1").glob("*.proto"))
    if protoc.main(["protoc", f"-I{root}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files]) != 0:
        raise RuntimeError("the .proto files do not compile")
    sys.path.insert(0, folder)
    names = [path.stem for path in pathlib.Path(folder, "specattn", "v1").glob("*.py")]
    return {name: importlib.import_module(f"specattn.v1.{name}") for name in names}


def request(**fields):
    """A small greedy dense request; fields replace its own."""
    base = {
        "text": PROMPT,
        "mode": common.MODE_DENSE,
        "sampling": common.Sampling(temperature=0.0, seed=1),
        "limits": common.Limits(max_tokens=24, ignore_eos=True),
        "draft": common.DraftPolicy(draft_length=4),
    }
    if "token_ids" in fields:
        del base["text"]
    return generation.GenerateRequest(**{**base, **fields})


def run(message):
    """(started, deltas, finished) of a request, with what every stream must satisfy."""
    events = list(server.generation.Generate(message, timeout=CALL_TIMEOUT_S))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-1] == "finished", kinds
    assert set(kinds[1:-1]) <= {"delta"}, kinds
    deltas = [event.delta for event in events[1:-1]]
    expected = 0
    for delta in deltas:
        assert delta.start == expected, f"a delta starts at {delta.start}, {expected} tokens came before"
        expected += len(delta.token_ids)
    finished = events[-1].finished
    assert finished.stats.completion_tokens == expected, (finished.stats, expected)
    assert finished.stats.prompt_tokens == events[0].started.prompt_tokens
    return events[0].started, deltas, finished


def tokens(deltas):
    return [token for delta in deltas for token in delta.token_ids]


def text(deltas):
    return "".join(delta.text for delta in deltas)


class Generate(unittest.TestCase):
    def test_streams_a_continuation(self):
        started, deltas, finished = run(request())
        self.assertRegex(started.session_id, "^[0-9a-f]{32}$")
        self.assertGreater(started.prompt_tokens, 5)
        self.assertGreater(len(deltas), 1, "tokens must come as they are made, not at the end")
        self.assertEqual(len(tokens(deltas)), 24)
        self.assertGreater(len(text(deltas)), 24)
        self.assertEqual(finished.reason, common.FINISH_REASON_LENGTH)
        self.assertGreater(finished.ttft_seconds, 0)
        self.assertGreaterEqual(finished.elapsed_seconds, finished.ttft_seconds)

    def test_greedy_tokens_equal_transformers_with_and_without_a_draft(self):
        fixture = json.loads((ROOT / "tests" / "fixtures" / "greedy_bundled.json").read_text(encoding="utf-8"))
        entry = fixture["prompts"][3]
        limits = common.Limits(max_tokens=len(entry["greedy"]), ignore_eos=True)
        for length in (0, 4):
            message = request(
                token_ids=common.TokenIds(ids=entry["prompt"]),
                limits=limits,
                draft=common.DraftPolicy(draft_length=length),
            )
            started, deltas, finished = run(message)
            self.assertEqual(started.prompt_tokens, len(entry["prompt"]))
            self.assertEqual(tokens(deltas), entry["greedy"], f"draft length {length}")
            if length == 0:
                self.assertEqual(finished.stats.proposed_tokens, 0)

    def test_sparse_reads_fewer_entries(self):
        fixture = json.loads((ROOT / "tests" / "fixtures" / "greedy_bundled.json").read_text(encoding="utf-8"))
        entry = next(entry for entry in fixture["prompts"] if len(entry["prompt"]) > 800)
        message = request(
            token_ids=common.TokenIds(ids=entry["prompt"]),
            mode=common.MODE_SPARSE,
            limits=common.Limits(max_tokens=300, ignore_eos=True),
            mask=common.MaskPolicy(mask_p=0.9),
        )
        _, deltas, finished = run(message)
        self.assertEqual(len(tokens(deltas)), 300)
        stats = finished.stats
        self.assertGreater(stats.mask_rounds, 0)
        self.assertGreater(stats.mask_bytes, 0)
        self.assertLess(stats.kv_entries_read, stats.kv_entries_dense)
        self.assertLessEqual(stats.accepted_tokens, stats.proposed_tokens)

    def sample(self, **sampling):
        """A sample of the target alone: with a draft, which positions it took part in depends on the schedule."""
        alone = common.DraftPolicy(draft_length=0)
        started, deltas, _ = run(request(sampling=common.Sampling(temperature=1.0, **sampling), draft=alone))
        return started.seed, tokens(deltas)

    def test_a_seed_decides_a_sample(self):
        self.assertEqual(self.sample(seed=7), self.sample(seed=7))
        self.assertNotEqual(self.sample(seed=7)[1], self.sample(seed=8)[1])

    def test_a_drawn_seed_is_reported_and_repeats(self):
        seed, drawn = self.sample()
        self.assertEqual(self.sample(seed=seed), (seed, drawn))
        self.assertNotEqual(self.sample()[0], seed)

    def test_logprobs(self):
        _, deltas, _ = run(request(sampling=common.Sampling(temperature=0.0, logprobs=3)))
        entries = [entry for delta in deltas for entry in delta.logprobs]
        self.assertEqual(len(entries), 24)
        for token, entry in zip(tokens(deltas), entries):
            self.assertEqual(len(entry.top_ids), 3)
            self.assertEqual(entry.top_ids[0], token, "greedy takes the most probable token")
            self.assertEqual(sorted(entry.top_logprobs, reverse=True), list(entry.top_logprobs))
            self.assertAlmostEqual(entry.logprob, entry.top_logprobs[0], places=4)
            self.assertLess(entry.logprob, 0)

    def test_a_stop_string_ends_the_text_before_it(self):
        whole = text(run(request())[1])
        # Far from the limit, and often: what the verify worker commits until it hears of the stop must do no harm.
        limits = common.Limits(max_tokens=400, ignore_eos=True)
        for start in range(8, 24, 2):
            stop = whole[start : start + 5]
            for length in (0, 4):
                draft = common.DraftPolicy(draft_length=length)
                _, deltas, finished = run(request(stop=["never to be seen", stop], limits=limits, draft=draft))
                self.assertEqual(text(deltas), whole[: whole.index(stop)])
                self.assertEqual(finished.reason, common.FINISH_REASON_STOP)
                self.assertEqual(finished.stop, stop)

    def test_a_stop_token_is_committed(self):
        all_tokens = tokens(run(request())[1])
        stop = all_tokens[5]
        limits = common.Limits(max_tokens=24, ignore_eos=True, stop_token_ids=[stop])
        _, deltas, finished = run(request(limits=limits))
        self.assertEqual(tokens(deltas), all_tokens[: all_tokens.index(stop) + 1])
        self.assertEqual(finished.reason, common.FINISH_REASON_STOP)

    def test_sessions_side_by_side_do_not_mix(self):
        alone = [tokens(run(request(text=prompt))[1]) for prompt in ("The sea was", "Dear Sir,", "Once upon")]
        calls = [
            server.generation.Generate(request(text=prompt), timeout=CALL_TIMEOUT_S)
            for prompt in ("The sea was", "Dear Sir,", "Once upon")
        ]
        together = [
            [token for event in call if event.WhichOneof("event") == "delta" for token in event.delta.token_ids]
            for call in calls
        ]
        self.assertEqual(together, alone)


class Ending(unittest.TestCase):
    def long_request(self, **fields):
        return request(limits=common.Limits(max_tokens=8000, ignore_eos=True), **fields)

    def assert_session_ends(self, session_id):
        deadline = time.monotonic() + 10
        while session_id in {session.session_id for session in server.status().sessions}:
            self.assertLess(time.monotonic(), deadline, "the session is still there after 10 s")
            time.sleep(0.05)

    def wait_for_tokens(self, call):
        """The session's id, once its first token has come."""
        session_id = None
        for event in call:
            if event.WhichOneof("event") == "started":
                session_id = event.started.session_id
            elif event.WhichOneof("event") == "delta":
                return session_id
        self.fail("the stream ended before its first token")

    def test_dropping_the_stream_cancels(self):
        call = server.generation.Generate(self.long_request(), timeout=CALL_TIMEOUT_S)
        session_id = self.wait_for_tokens(call)
        self.assertIn(session_id, {session.session_id for session in server.status().sessions})
        call.cancel()
        self.assert_session_ends(session_id)

    def test_cancel_by_session_id(self):
        call = server.generation.Generate(self.long_request(), timeout=CALL_TIMEOUT_S)
        session_id = self.wait_for_tokens(call)
        server.generation.Cancel(generation.CancelRequest(session_id=session_id), timeout=10)
        last = list(call)[-1]
        self.assertEqual(last.finished.reason, common.FINISH_REASON_CANCELLED)
        self.assertLess(last.finished.stats.completion_tokens, 8000)
        self.assert_session_ends(session_id)
        with self.assertRaises(grpc.RpcError) as caught:
            server.generation.Cancel(generation.CancelRequest(session_id=session_id), timeout=10)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_a_deadline_delivers_what_was_committed(self):
        _, deltas, finished = run(self.long_request(deadline_ms=700))
        self.assertEqual(finished.reason, common.FINISH_REASON_DEADLINE)
        self.assertLess(finished.elapsed_seconds, 5)
        self.assertLess(len(tokens(deltas)), 8000)

    def test_a_client_that_goes_away_leaves_nothing_behind(self):
        channel = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        call = type(server.generation)(channel).Generate(self.long_request(), timeout=CALL_TIMEOUT_S)
        session_id = self.wait_for_tokens(call)
        channel.close()
        self.assert_session_ends(session_id)


class Errors(unittest.TestCase):
    def status_of(self, message):
        with self.assertRaises(grpc.RpcError) as caught:
            list(server.generation.Generate(message, timeout=CALL_TIMEOUT_S))
        self.assertTrue(caught.exception.details(), "an error says what is wrong")
        return caught.exception.code()

    def test_malformed_requests(self):
        nan, infinity = float("nan"), float("inf")
        sampling = lambda **fields: {"sampling": common.Sampling(**fields)}
        ids = lambda values: {"token_ids": common.TokenIds(ids=values)}
        cases = {
            "no prompt": {"token_ids": None},
            "no token ids": ids([]),
            "no such token": ids([5, 8192]),
            "the largest token": ids([2**32 - 1]),
            "as long as the context": ids([5] * 8192),
            "longer than the context": ids([5] * 100_000),
            "no mode": {"mode": common.MODE_UNSPECIFIED},
            "no such mode": {"mode": 77},
            "temperature NaN": sampling(temperature=nan),
            "temperature infinite": sampling(temperature=infinity),
            "temperature below 0": sampling(temperature=-1),
            "top_p 0": sampling(temperature=1, top_p=0),
            "top_p NaN": sampling(temperature=1, top_p=nan),
            "min_p 2": sampling(temperature=1, min_p=2),
            "repetition penalty 0": sampling(repetition_penalty=0),
            "presence penalty NaN": sampling(presence_penalty=nan),
            "frequency penalty 11": sampling(frequency_penalty=11),
            "bias NaN": sampling(logit_bias={1: nan}),
            "bias of no token": sampling(logit_bias={9000: 1.0}),
            "2,000 biases": sampling(logit_bias={i: 1.0 for i in range(2000)}),
            "21 logprobs": sampling(logprobs=21),
            "no tokens wanted": {"limits": common.Limits(max_tokens=0)},
            "300 stop tokens": {"limits": common.Limits(stop_token_ids=range(300))},
            "draft length 17": {"draft": common.DraftPolicy(draft_length=17)},
            "draft length 2^32 - 1": {"draft": common.DraftPolicy(draft_length=2**32 - 1)},
            "mask_p 0": {"mode": common.MODE_SPARSE, "mask": common.MaskPolicy(mask_p=0)},
            "mask_p NaN": {"mode": common.MODE_SPARSE, "mask": common.MaskPolicy(mask_p=nan)},
            "granularity 0": {"mode": common.MODE_SPARSE, "mask": common.MaskPolicy(granularity=0)},
            "granularity 2^31": {"mode": common.MODE_SPARSE, "mask": common.MaskPolicy(granularity=2**31)},
            "17 stop strings": {"stop": ["x"] * 17},
            "an empty stop string": {"stop": [""]},
            "a stop string of 1,025 bytes": {"stop": ["x" * 1025]},
        }
        for name, fields in cases.items():
            with self.subTest(name):
                self.assertEqual(self.status_of(request(**fields)), grpc.StatusCode.INVALID_ARGUMENT)

    def test_a_text_longer_than_the_context(self):
        self.assertEqual(self.status_of(request(text="a word " * 20_000)), grpc.StatusCode.INVALID_ARGUMENT)

    def test_random_bytes(self):
        chance = random.Random(1)
        identity = lambda value: value
        raw = server.channel.unary_stream("/specattn.v1.GenerationService/Generate", identity, identity)
        for length in (1, 3, 10, 100, 1000, 100_000):
            with self.subTest(length), self.assertRaises(grpc.RpcError):
                list(raw(chance.randbytes(length), timeout=CALL_TIMEOUT_S))
        self.assertEqual(len(tokens(run(request())[1])), 24, "the server still answers")

    def test_a_message_over_the_size_limit(self):
        huge = generation.GenerateRequest(text="x" * (256 << 20), mode=common.MODE_DENSE)
        code = self.status_of(huge)
        self.assertIn(code, (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT))

    def test_unknown_session(self):
        for session_id in ("0" * 32, "", "x", "0" * 100_000):
            with self.subTest(session_id[:40]), self.assertRaises(grpc.RpcError) as caught:
                server.generation.Cancel(generation.CancelRequest(session_id=session_id), timeout=10)
            self.assertIn(caught.exception.code(), (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT))

    def test_unknown_method(self):
        identity = lambda value: value
        call = server.channel.unary_unary("/specattn.v1.GenerationService/Nothing", identity, identity)
        with self.assertRaises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)


class Surroundings(unittest.TestCase):
    def test_status_lists_the_workers(self):
        status = server.status()
        roles = {worker.role for worker in status.workers}
        self.assertEqual(roles, {registry.WORKER_ROLE_DRAFT, registry.WORKER_ROLE_VERIFY})
        for worker in status.workers:
            self.assertEqual(worker.model.vocab_size, 8192)
            self.assertEqual(len(worker.model.checkpoint_hash), 64)
            self.assertRegex(worker.endpoint, "^http://")
        self.assertEqual(len({worker.model.tokenizer_hash for worker in status.workers}), 1)

    def test_nothing_is_left_after_the_sessions(self):
        deadline = time.monotonic() + 10
        while any(worker.load.kv_blocks_used for worker in server.status().workers):
            self.assertLess(time.monotonic(), deadline, "KV blocks are still in use 10 s after the last session")
            time.sleep(0.2)
        self.assertEqual(len(server.status().sessions), 0)

    def test_health(self):
        try:
            from grpc_health.v1 import health_pb2, health_pb2_grpc
        except ImportError:
            self.skipTest("grpcio-health-checking is not installed")
        stub = health_pb2_grpc.HealthStub(server.channel)
        for service in ("", "specattn.v1.GenerationService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            self.assertEqual(answer.status, health_pb2.HealthCheckResponse.SERVING, service)
        with self.assertRaises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_reflection(self):
        try:
            from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
        except ImportError:
            self.skipTest("grpcio-reflection is not installed")
        from google.protobuf.descriptor_pool import DescriptorPool

        database = ProtoReflectionDescriptorDatabase(server.channel)
        services = set(database.get_services())
        for name in ("GenerationService", "RegistryService"):
            self.assertIn(f"specattn.v1.{name}", services)
        found = DescriptorPool(database).FindServiceByName("specattn.v1.GenerationService")
        self.assertEqual({method.name for method in found.methods}, {"Generate", "Cancel"})


def main():
    parser = argparse.ArgumentParser(description="The Python client test of SpecAttn.")
    parser.add_argument("--binary", type=pathlib.Path, required=True, help="the specattn binary")
    parser.add_argument("--target", type=pathlib.Path, default=ROOT / "models" / "target")
    parser.add_argument("--draft", type=pathlib.Path, default=ROOT / "models" / "draft")
    parser.add_argument("--start-timeout", type=float, default=120, help="seconds until the workers must be there")
    args, rest = parser.parse_known_args()

    global generation, common, registry, server
    with tempfile.TemporaryDirectory(prefix="specattn-stubs-") as folder:
        stubs = compile_protos(folder)
        generation, common, registry = (stubs[f"{name}_pb2"] for name in ("generation", "common", "registry"))
        server = Server(args, stubs)
        try:
            program = unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=2)
        finally:
            ended = server.stop()
    if ended != 0:
        print(f"FAILED: specattn serve ended with {ended} after SIGTERM", file=sys.stderr)
    sys.exit(0 if program.result.wasSuccessful() and ended == 0 else 1)


if __name__ == "__main__":
    main()
