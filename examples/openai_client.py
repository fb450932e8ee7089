"""Streams a completion with OpenAI's own package.

    pip install openai
    python examples/openai_client.py "Once upon a time"

Any program that speaks OpenAI's API works by its base URL alone. What SpecAttn adds goes in `extra_body`: the mode here; what the
request cost comes back in the usage.
"""

import os
import sys

from openai import OpenAI

GATEWAY = os.environ.get("SPECATTN_GATEWAY", "http://127.0.0.1:7400")


def main():
    prompt = " ".join(sys.argv[1:]) or "It was a bright cold day in April"
    # The package wants a key; a gateway without keys ignores it.
    client = OpenAI(base_url=f"{GATEWAY}/v1", api_key=os.environ.get("SPECATTN_API_KEY", "none"))
    model = client.models.list().data[0].id
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=64,
        temperature=0.8,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"specattn": {"mode": "exact"}},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.text, end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens: {chunk.usage.specattn}", file=sys.stderr)


if __name__ == "__main__":
    main()
