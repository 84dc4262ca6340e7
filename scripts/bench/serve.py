#!/usr/bin/env python3
"""Load test of the server on this machine's loopback, and of a transformers loop behind the same protocol.

scripts/bench/serve.py --model=DIR [--clients=1,4,16] [--seconds=20] [--tokens=16] [--broken=0]

DIR: a run or a model directory. For each number of clients: requests/s, tokens/s, time to the first token (p50, p99). A LLaVA
directory of the Hugging Face hub is also answered by transformers' generate, one request after the other as a plain server
does, and the ratio is printed. --broken=N sends N requests of which one in twenty is broken, and compares every good answer
with the one that the model gives alone. Every part is bounded by --seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import resource
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package, from a checkout

import numpy as np
import openai
import uvicorn
from PIL import Image

import vlm_jax
from vlm_jax.serving.app import make_app
from vlm_jax.serving.engine import Engine
from vlm_jax.serving.limits import Limits

WORDS = ("What is this?", "Describe the picture in one sentence, please.", "How many colours are there?")  # fmt: skip
BAD = ("data:image/png;base64,@@@", "data:image/png;base64,AAAA", "https://example.com/a.png")


def pictures(count: int = 16) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        data = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        small.resize((320, 240), Image.Resampling.NEAREST).save(data, "PNG")
        found.append(data.getvalue())
    return found


def messages(picture: bytes, question: str) -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


async def load(address: str, clients: int, seconds: float, tokens: int, shown: list[bytes]) -> dict[str, float]:  # fmt: skip
    """What `clients` that ask without a pause get in `seconds`."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)  # fmt: skip
    firsts, counts = [], []
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            said = messages(shown[number % len(shown)], WORDS[number % len(WORDS)])
            number += clients
            start, first, count = time.perf_counter(), 0.0, 0
            stream = await client.chat.completions.create(
                model="bench", messages=said, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
            )  # fmt: skip
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content and not first:
                    first = time.perf_counter() - start
                count = chunk.usage.completion_tokens if chunk.usage else count
            firsts.append(first or time.perf_counter() - start)
            counts.append(count)

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    spent = time.perf_counter() - began
    p50, p99 = np.percentile(firsts, [50, 99])
    return {"clients": clients, "requests_s": len(firsts) / spent, "tokens_s": sum(counts) / spent, "first_p50_s": p50, "first_p99_s": p99}  # fmt: skip


def transformers_loop(folder: str, seconds: float, tokens: int, shown: list[bytes]) -> float:
    """Requests/s of transformers' generate, one after the other, which is what more clients get too."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    done, began = 0, time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() < began + seconds:
            image = Image.open(io.BytesIO(shown[done % len(shown)]))
            text = f"<image>\n{WORDS[done % len(WORDS)]}"
            inputs = processor(images=image, text=text, return_tensors="pt")
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            done += 1
    return done / (time.perf_counter() - began)


async def abuse(address: str, count: int, tokens: int, shown: list[bytes], model: Any) -> dict[str, Any]:  # fmt: skip
    """`count` requests from 16 clients, one in twenty broken. Raises AssertionError for a wrong answer or status."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)  # fmt: skip
    pairs = [(picture, question) for picture in shown for question in WORDS]
    alone = model.ask_many(pairs, max_new_tokens=tokens)
    refused, wrong, gate = 0, 0, asyncio.Semaphore(16)

    async def one(number: int) -> None:
        nonlocal refused, wrong
        async with gate:
            if number % 20 == 0:
                said = messages(shown[0], "Why?")
                said[0]["content"][0]["image_url"]["url"] = BAD[number // 20 % len(BAD)]
                try:
                    await client.chat.completions.create(model="bench", messages=said)
                except openai.APIStatusError as error:
                    refused += 400 <= error.status_code < 500
                return
            which = number % len(pairs)
            made = await client.chat.completions.create(model="bench", messages=messages(*pairs[which]), max_tokens=tokens)  # fmt: skip
            wrong += made.choices[0].message.content != alone[which]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await asyncio.gather(*(one(number) for number in range(count)))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    broken = -(-count // 20)
    return {"requests": count, "broken": broken, "refused": refused, "wrong": wrong, "grown_mib": grown}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--broken", type=int, default=0)
    args = parser.parse_args()
    model, shown = vlm_jax.load(args.model), pictures()
    limits = Limits(rows=args.rows, queue=1000, timeout_s=600, prompt_tokens=args.prompt_tokens, max_new_tokens=args.tokens)  # fmt: skip
    engine = Engine(model, limits)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "bench"), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.1)
    address = f"http://127.0.0.1:{port}"
    compiled = engine.batcher.slots.compilations
    results = []
    for clients in map(int, args.clients.split(",")):
        results.append(asyncio.run(load(address, clients, args.seconds, args.tokens, shown)))
        print(json.dumps(results[-1]), flush=True)
    if args.broken:
        print(json.dumps(asyncio.run(abuse(address, args.broken, args.tokens, shown, model))))
    print(json.dumps({"compiled_under_load": engine.batcher.slots.compilations - compiled}))
    server.should_exit = True
    thread.join()
    if (Path(args.model) / "processor_config.json").is_file():
        plain = transformers_loop(args.model, args.seconds, args.tokens, shown)
        ratios = {r["clients"]: r["requests_s"] / plain for r in results}
        print(json.dumps({"transformers_requests_s": plain, "ratio_by_clients": ratios}))


if __name__ == "__main__":
    main()
