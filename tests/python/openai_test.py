"""OpenAI's Python package against `specattn serve`: completions, chat, streams, log-probabilities, errors.

    python openai_test.py --binary ../../target/release/specattn

The same requests go to the gRPC API too, through a client made from the .proto files: what both answer must be equal.
The bundled models have no chat template, so the server gets a small one.

Exit status: 0 passed, 1 failed, 77 skipped because a package is missing (with a line on stderr that begins with SKIPPED).
"""

import argparse
import importlib
import json
import pathlib
import sys
import tempfile
import threading
import unittest
import urllib.error
import urllib.request

from local_server import serve_chat

try:
    import grpc
    import openai
    from grpc_tools import protoc
except ImportError as missing:
    print(f"SKIPPED: the OpenAI test needs openai, grpcio and grpcio-tools: {missing}", file=sys.stderr)
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROMPT = "It was a bright cold day in April"
MODEL = "bundled/target"
# Nothing that depends on when a draft arrives: sampled text is then fixed by the seed.
ALONE = {"specattn": {"mode": "dense", "draft_length": 0}}

binary = address = client = generation = stub = None


def grpc_text(text=None, **fields):
    """What the gRPC API makes of the same request."""
    sampling = generation_common.Sampling(**fields.pop("sampling", {}))
    request = generation.GenerateRequest(
        text=text or PROMPT,
        sampling=sampling,
        limits=generation_common.Limits(max_tokens=fields.pop("max_tokens")),
        mode=generation_common.MODE_DENSE,
        draft=generation_common.DraftPolicy(draft_length=0),
        **fields,
    )
    events = list(stub.Generate(request, timeout=120))
    return "".join(event.delta.text for event in events), events[-1].finished


class Completions(unittest.TestCase):
    def complete(self, **more):
        fields = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "extra_body": ALONE}
        return client.completions.create(**{**fields, **more})

    def test_equals_grpc_for_the_same_seed(self):
        for temperature in (0.0, 0.8):
            answer = self.complete(temperature=temperature, seed=11)
            text, finished = grpc_text(max_tokens=24, sampling={"temperature": temperature, "seed": 11})
            self.assertEqual(answer.choices[0].text, text)
            self.assertEqual(answer.choices[0].finish_reason, "length")
            self.assertEqual(answer.usage.completion_tokens, finished.stats.completion_tokens)
            self.assertEqual(answer.usage.prompt_tokens, finished.stats.prompt_tokens)
            self.assertEqual(answer.usage.specattn["target_forwards"], finished.stats.target_forwards)

    def test_every_mode_answers_and_greedy_exact_equals_dense(self):
        dense = self.complete().choices[0].text
        for mode in ("dense", "sparse", "exact"):
            answer = self.complete(extra_body={"specattn": {"mode": mode, "mask_p": 0.9, "draft_length": 3}})
            self.assertEqual(answer.usage.completion_tokens, 24)
            if mode != "sparse":
                self.assertEqual(answer.choices[0].text, dense)

    def test_a_stream_is_the_same_text_in_pieces(self):
        whole = self.complete(seed=3, temperature=0.8)
        chunks = list(self.complete(seed=3, temperature=0.8, stream=True, stream_options={"include_usage": True}))
        self.assertGreater(len(chunks), 3)
        self.assertEqual("".join(c.choices[0].text for c in chunks if c.choices), whole.choices[0].text)
        self.assertEqual(chunks[-2].choices[0].finish_reason, "length")
        self.assertEqual(chunks[-1].usage.completion_tokens, 24)

    def test_a_stream_may_tell_its_usage_in_every_chunk(self):
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = list(self.complete(n=2, temperature=0.8, stream=True, stream_options=options))
        told = [chunk.usage.completion_tokens for chunk in chunks]
        self.assertEqual((told, told[-1]), (sorted(told), 48))
        self.assertEqual(chunks[-2].usage.total_tokens, chunks[-1].usage.total_tokens)
        # A chunk's tokens are counted with it.
        self.assertGreater(told[0], 0)

    def test_stop_strings_end_before_themselves(self):
        text = self.complete().choices[0].text
        stop = text[10:14]
        answer = self.complete(stop=[stop])
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual(answer.choices[0].text, text[: text.find(stop)])

    def test_several_choices_and_prompts(self):
        answer = self.complete(prompt=[PROMPT, "The sea"], n=2, seed=5, temperature=0.9)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        again = self.complete(seed=6, temperature=0.9)
        self.assertEqual(answer.choices[1].text, again.choices[0].text)
        self.assertEqual(answer.usage.completion_tokens, 96)
        chunks = list(self.complete(n=3, temperature=0.9, stream=True))
        self.assertEqual({chunk.choices[0].index for chunk in chunks}, {0, 1, 2})

    def test_log_probabilities(self):
        answer = self.complete(logprobs=3)
        logprobs = answer.choices[0].logprobs
        self.assertEqual(len(logprobs.tokens), 24)
        self.assertEqual("".join(logprobs.tokens), answer.choices[0].text)
        self.assertEqual(logprobs.text_offset[0], 0)
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            self.assertAlmostEqual(top[token], value, places=4)
            self.assertAlmostEqual(max(top.values()), value, places=4)

    def test_logit_bias_bans_a_token(self):
        first = self.complete(max_tokens=1, logprobs=1)
        ids = list(stub.Generate(generation.GenerateRequest(
            text=PROMPT, limits=generation_common.Limits(max_tokens=1), mode=generation_common.MODE_DENSE)))
        token = next(event.delta.token_ids[0] for event in ids if event.delta.token_ids)
        banned = self.complete(max_tokens=1, logit_bias={str(token): -100})
        self.assertNotEqual(first.choices[0].text, banned.choices[0].text)

    def test_echo_and_token_prompts(self):
        self.assertTrue(self.complete(echo=True).choices[0].text.startswith(PROMPT))
        answer = self.complete(prompt=[0, 50, 60], max_tokens=2)
        self.assertEqual(answer.usage.prompt_tokens, 3)

    def test_a_client_that_leaves_frees_its_session(self):
        stream = self.complete(max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
        self.assertTrue(sessions_end())


class Chat(unittest.TestCase):
    messages = [{"role": "system", "content": "A letter."}, {"role": "user", "content": "What did she say?"}]

    def chat(self, **more):
        fields = {"model": MODEL, "messages": self.messages, "max_tokens": 16, "temperature": 0, "extra_body": ALONE}
        return client.chat.completions.create(**{**fields, **more})

    def test_the_template_writes_the_prompt(self):
        answer = self.chat()
        text, finished = grpc_text("A letter.\nWhat did she say?\nShe answered:", max_tokens=16)
        self.assertEqual(answer.choices[0].message.content, text)
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertEqual(answer.usage.prompt_tokens, finished.stats.prompt_tokens)

    def test_streams(self):
        whole = self.chat().choices[0].message.content
        chunks = list(self.chat(stream=True))
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in chunks), whole)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "length")

    def test_parts_and_log_probabilities(self):
        parts = [{"role": "user", "content": [{"type": "text", "text": "What did she say?"}]}]
        answer = self.chat(messages=parts, logprobs=True, top_logprobs=2, max_completion_tokens=4)
        content = answer.choices[0].logprobs.content
        self.assertEqual((len(content), len(content[0].top_logprobs)), (4, 2))
        self.assertEqual(bytes(content[0].bytes).decode(), content[0].token)


class Errors(unittest.TestCase):
    def refused(self, kind, **fields):
        with self.assertRaises(kind) as caught:
            client.completions.create(**{"model": MODEL, "prompt": PROMPT, **fields})
        return caught.exception

    def test_bad_fields_are_named(self):
        self.assertIn("temperature", self.refused(openai.BadRequestError, temperature=-1).message)
        self.assertEqual(self.refused(openai.BadRequestError, n=1000).param, "n")
        self.refused(openai.BadRequestError, prompt="")
        self.refused(openai.BadRequestError, max_tokens=0)
        self.refused(openai.BadRequestError, prompt=[0] * 9000)
        self.refused(openai.BadRequestError, extra_body={"specattn": {"mode": "magic"}})
        self.assertEqual(self.refused(openai.BadRequestError, extra_body={"min_tokens": 3}).param, "min_tokens")

    def test_unknown_models_and_paths(self):
        self.assertEqual(self.refused(openai.NotFoundError, model="gpt-4").code, "model_not_found")
        with self.assertRaises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{address}/v1/nothing")
        self.assertEqual(caught.exception.code, 404)
        self.assertIn("error", json.load(caught.exception))

    def test_broken_and_oversized_bodies(self):
        for body, status in ((b"{", 400), (b"[" * 100_000, 400), (b'{"prompt": "' + b"a" * (8 << 20) + b'"}', 413)):
            request = urllib.request.Request(
                f"http://{address}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with self.assertRaises((urllib.error.HTTPError, urllib.error.URLError)) as caught:
                urllib.request.urlopen(request, timeout=30)
            # A server may close the connection on a body that is too long before it is sent.
            if isinstance(caught.exception, urllib.error.HTTPError):
                self.assertEqual(caught.exception.code, status)
                self.assertIn("error", json.load(caught.exception))

    def test_models(self):
        self.assertEqual([model.id for model in client.models.list()], [MODEL])
        self.assertEqual(client.models.retrieve(MODEL).id, MODEL)


def sessions_end():
    """Whether no session is left within a few seconds."""
    registry = importlib.import_module("specattn.v1.registry_pb2")
    status = importlib.import_module("specattn.v1.registry_pb2_grpc").RegistryServiceStub(channel)
    for _ in range(200):
        if not status.Status(registry.StatusRequest(), timeout=10).sessions:
            return True
        threading.Event().wait(0.05)
    return False


def main():
    global binary, address, client, generation, generation_common, stub, channel
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", type=pathlib.Path, required=True)
    binary = parser.parse_args().binary.resolve()
    with tempfile.TemporaryDirectory() as folder:
        protos = [str(path) for path in (ROOT / "proto" / "specattn" / "v1").glob("*.proto")]
        if protoc.main(["", f"-I{ROOT / 'proto'}", f"--python_out={folder}", f"--grpc_python_out={folder}", *protos]):
            sys.exit("the .proto files do not compile")
        sys.path.insert(0, folder)
        generation = importlib.import_module("specattn.v1.generation_pb2")
        generation_common = importlib.import_module("specattn.v1.common_pb2")
        with serve_chat(binary, MODEL, folder) as url:
            address = url.removeprefix("http://")
            client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=120)
            channel = grpc.insecure_channel(address)
            stub = importlib.import_module("specattn.v1.generation_pb2_grpc").GenerationServiceStub(channel)
            result = unittest.main(argv=["openai_test"], exit=False, verbosity=2).result
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
