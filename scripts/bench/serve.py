#!/usr/bin/env python3
"""Load test of the server on this machine's loopback, beside transformers' generate behind the same protocol.

scripts/bench/serve.py [--clients=1,4,16,64] [--seconds=15] [--tokens=16] [--requests=1000]

Writes LLaVA directories with random weights (a decoder of 4 layers, width 256; an encoder that gives 1 or 576 patches, each a
visual token). Both servers answer from them, each in a process of its own: `python -m vlm_jax.serve`, and a loop that calls
transformers' generate for one request after the other. They take turns, so that both meet the same machine. For each number
of clients that ask without a pause: requests/s, and the time to the first token (p50, p99). Then --requests requests to the
first model, one in twenty broken or hung up: every good answer is compared with the one that the model gives alone, every
broken one must be a 4xx, and the server's memory is read before and after each fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the package, from a checkout

WORDS = ("What is this?", "Describe the picture in one sentence, please.", "How many colours are there?")  # fmt: skip
IMAGE_PX = 336
WIDTH, LAYERS, HEADS, MLP = 256, 4, 4, 688  # of the decoder
QUEUE, ROWS = 1000, 16
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")


def pictures(count: int = 16) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        found.append(encoded(small.resize((320, 240), Image.Resampling.NEAREST)))
    return found


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def system_prompt() -> str:
    from vlm_jax.data.templates import TEMPLATES

    return TEMPLATES["vicuna_v1"].system_prompt


def write_llava(folder: Path, patches: int) -> None:
    """A LLaVA directory with random weights and its processor. patches: of a picture, each a visual token."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    backend.train_from_iterator([system_prompt(), "USER: ASSISTANT:", *WORDS], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIALS, strict=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE_PX,
        patch_size=IMAGE_PX // round(patches**0.5),
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=2048, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, image_seq_length=patches
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # else every answer is one token again and again
    model.save_pretrained(folder)
    size = {"height": IMAGE_PX, "width": IMAGE_PX}
    image = transformers.CLIPImageProcessor(size={"shortest_edge": IMAGE_PX}, crop_size=size)
    transformers.LlavaProcessor(
        image, tokenizer, patch_size=vision.patch_size, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)


# --- transformers behind the same protocol --------------------------------------------------------------------------------


def serve_plain(folder: str, port: int, threads: int) -> None:
    """A server that gives each request to transformers' generate, one after the other."""
    import torch
    import transformers
    import uvicorn
    from anyio import to_thread
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    if threads:
        torch.set_num_threads(threads)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()  # fmt: skip
    turn, system = threading.Lock(), system_prompt()

    def pieces(body: dict[str, Any]) -> Generator[str]:
        picture, question = body["messages"][-1]["content"]
        image = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))  # fmt: skip
        text = f"{system} USER: <image>\n{question['text']} ASSISTANT:"
        inputs = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        words = transformers.TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)  # fmt: skip
        options = {"max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": words}
        with turn, torch.inference_mode():
            work = threading.Thread(target=model.generate, kwargs={**inputs, **options})
            work.start()
            for piece in words:
                if piece:
                    yield chunk(piece)
            work.join()
        yield "data: [DONE]\n\n"

    def chunk(text: str) -> str:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        made = {"id": "0", "object": "chat.completion.chunk", "created": 0, "model": "bench", "choices": [choice]}  # fmt: skip
        return f"data: {json.dumps(made)}\n\n"

    async def complete(request: Any) -> StreamingResponse:
        # A request that waits for its turn holds a thread; with the usual 40 the one whose turn it is would find none.
        to_thread.current_default_thread_limiter().total_tokens = 1000
        return StreamingResponse(pieces(await request.json()), media_type="text/event-stream")

    async def health(_: Any) -> PlainTextResponse:
        return PlainTextResponse("ok")

    routes = [Route("/v1/chat/completions", complete, methods=["POST"]), Route("/health", health)]
    app = Starlette(routes=routes)
    uvicorn.run(app, port=port, log_level="error")


# --- clients --------------------------------------------------------------------------------------------------------------


def messages(picture: bytes, question: str) -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def connected(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)  # fmt: skip


async def load(address: str, clients: int, seconds: float, tokens: int, shown: list[bytes]) -> dict[str, Any]:  # fmt: skip
    """What `clients` that ask without a pause get in `seconds`; requests that are under way then are waited for."""
    client = connected(address)
    firsts: list[float] = []
    said: dict[int, str] = {}
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            which = number % (len(shown) * len(WORDS))
            asked = messages(shown[which % len(shown)], WORDS[which % len(WORDS)])
            number += clients
            start, first, text = time.perf_counter(), 0.0, ""
            stream = await client.chat.completions.create(model="bench", messages=asked, max_tokens=tokens, stream=True)  # fmt: skip
            async for piece in stream:
                if piece.choices and piece.choices[0].delta.content:
                    first = first or time.perf_counter() - start
                    text += piece.choices[0].delta.content
            firsts.append(first or time.perf_counter() - start)
            said[which] = text.strip()

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(clients)))
    spent = time.perf_counter() - began
    await client.close()
    p50, p99 = np.percentile(firsts, [50, 99])
    return {"requests_s": len(firsts) / spent, "first_p50_s": p50, "first_p99_s": p99, "said": said}  # fmt: skip


def broken(shown: bytes) -> list[dict[str, Any]]:
    """Bodies that a server must refuse with a 4xx."""
    png = "data:image/png;base64,"
    bomb = base64.b64encode(encoded(Image.new("1", (20_000, 20_000)))).decode()
    found: list[Any] = []
    for url in (f"{png}@@@", f"{png}AAAA", "https://example.com/a.png", "file:///etc/passwd", png + bomb):  # fmt: skip
        said = messages(shown, "Why?")
        said[0]["content"][0]["image_url"]["url"] = url
        found.append({"messages": said})
    found.append({"messages": messages(shown, "What is this? " * 20_000)})
    found.append({"messages": messages(shown, "Why?"), "max_tokens": 10**9})
    return [{"model": "bench", **body} for body in found]


def status(address: str, body: dict[str, Any]) -> int:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", data, headers)) as got:  # fmt: skip
            return got.status
    except urllib.error.HTTPError as error:
        return error.code


def hang_up(address: str, body: dict[str, Any]) -> None:
    """Asks for a streamed answer, reads its beginning, and goes away."""
    data = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        connection.recv(200)


async def abuse(address: str, pid: int, count: int, tokens: int, alone: dict[int, str], shown: list[bytes]) -> dict[str, Any]:  # fmt: skip
    """`count` requests from 16 clients, one in twenty broken or hung up."""
    client, gate, bad = connected(address), asyncio.Semaphore(16), broken(shown[0])
    found = {"good": 0, "as_alone": 0, "broken": 0, "refused_4xx": 0, "hung_up": 0}
    mib: list[int] = []  # before, and after each fifth

    async def one(number: int) -> None:
        async with gate:
            if number % max(count // 5, 1) == 0:
                mib.append(round(resident_mib(pid)))
            kind = number // 20 % (len(bad) + 1)
            which = number % len(alone)
            asked = messages(shown[which % len(shown)], WORDS[which % len(WORDS)])
            if number % 20 == 0 and kind == len(bad):
                found["hung_up"] += 1
                await asyncio.to_thread(hang_up, address, {"model": "bench", "messages": asked})
            elif number % 20 == 0:
                found["broken"] += 1
                code = await asyncio.to_thread(status, address, bad[kind])
                found["refused_4xx"] += 400 <= code < 500
            else:
                found["good"] += 1
                made = await client.chat.completions.create(model="bench", messages=asked, max_tokens=tokens)  # fmt: skip
                found["as_alone"] += made.choices[0].message.content == alone[which]

    await asyncio.gather(*(one(number) for number in range(count)))
    return found | {"mib": [*mib, round(resident_mib(pid))]}


def resident_mib(pid: int) -> float:
    kib = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert kib
    return int(kib[1]) / 1024


def compiled(address: str) -> int:
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = re.search(r"^vlm_jax_programs_compiled (\S+)", text, re.MULTILINE)
    assert found
    return int(float(found[1]))


# --- a run ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(words: list[str]) -> Generator[tuple[str, int]]:
    """(address, process id) of a server process that the command `words` starts on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *words, f"--port={port}"], cwd=ROOT, env=environment)  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            time.sleep(0.2)
        else:
            sys.exit(f"serve.py: the server ended with {process.returncode}: {' '.join(words)}")
        yield address, process.pid
    finally:
        process.kill()
        process.wait()


def shown_number(x: Any) -> Any:
    return float(f"{x:.3g}") if isinstance(x, float) else x


def say(line: dict[str, Any]) -> None:
    print(json.dumps({k: shown_number(v) for k, v in line.items()}), flush=True)


def compare(folder: Path, patches: int, args: argparse.Namespace, shown: list[bytes], requests: int) -> None:  # fmt: skip
    width = patches + 256
    own = ["-m", "vlm_jax.serve", f"--model={folder}", "--name=bench", f"--rows={ROWS}", f"--queue={QUEUE}", f"--prompt-tokens={width}", f"--max-new-tokens={args.tokens}", "--timeout-s=600"]  # fmt: skip
    plain = [__file__, f"--plain={folder}", f"--torch-threads={args.torch_threads}"]
    with server(own) as (ours, pid), server(plain) as (theirs, _):
        programs = compiled(ours)
        for address in (ours, theirs):  # the first calls are slower
            asyncio.run(load(address, 2, 1.0, args.tokens, shown))
        for clients in map(int, args.clients.split(",")):
            here = asyncio.run(load(ours, clients, args.seconds, args.tokens, shown))
            there = asyncio.run(load(theirs, clients, args.seconds, args.tokens, shown))
            said, other = here.pop("said"), there.pop("said")
            both = said.keys() & other.keys()
            same = f"{sum(said[k] == other[k] for k in both)} of {len(both)}"
            line = {"visual_tokens": patches, "clients": clients}
            line |= {f"ours_{k}": v for k, v in here.items()} | {f"plain_{k}": v for k, v in there.items()}  # fmt: skip
            say(line | {"ratio": here["requests_s"] / there["requests_s"], "same_texts": same})
        if requests:
            alone = answers_alone(folder, args.tokens, shown)
            say(asyncio.run(abuse(ours, pid, requests, args.tokens, alone, shown)))
        say({"visual_tokens": patches, "compiled_under_load": compiled(ours) - programs})


def answers_alone(folder: Path, tokens: int, shown: list[bytes]) -> dict[int, str]:
    import vlm_jax

    model = vlm_jax.load(folder)
    pairs = [(shown[i % len(shown)], WORDS[i % len(WORDS)]) for i in range(len(shown) * len(WORDS))]
    return {i: model.ask(*pair, max_new_tokens=tokens) for i, pair in enumerate(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=15, help="of each number of clients and server")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--requests", type=int, default=1000, help="of the last part; 0: none")
    parser.add_argument("--patches", default="1,576", help="square numbers")
    parser.add_argument("--torch-threads", type=int, default=0, help="0: torch's own choice; on a busy machine 1 is faster")  # fmt: skip
    parser.add_argument("--plain", default="", help="serve this directory by transformers instead (the script calls itself)")  # fmt: skip
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    if args.plain:
        return serve_plain(args.plain, args.port, args.torch_threads)
    shown = pictures()
    with tempfile.TemporaryDirectory() as root:
        for number, patches in enumerate(map(int, args.patches.split(","))):
            folder = Path(root) / str(patches)
            write_llava(folder, patches)
            compare(folder, patches, args, shown, 0 if number else args.requests)


if __name__ == "__main__":
    main()
