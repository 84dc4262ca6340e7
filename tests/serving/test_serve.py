"""The server over a socket, asked by OpenAI's own client: texts, broken requests, hang-ups, limits, drawing, draining."""

import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from askable import QUESTION, QUESTIONS, asked, evaluated, picture, serving
from PIL import Image

from vlm_jax.serving import protocol
from vlm_jax.serving.engine import Engine
from vlm_jax.serving.limits import Limits, Refused

KEY = "the key"
LIMITS = Limits(rows=4, queue=32, timeout_s=100, image_mib=1, image_pixels=10_000, prompt_tokens=120, max_new_tokens=130)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, LIMITS)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine, KEY) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def url(path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def content(image, question):
    parts = [] if image is None else [{"type": "image_url", "image_url": {"url": url(image)}}]
    return [*parts, {"type": "text", "text": question}]


def answer(client, image, question, **more):
    messages = [{"role": "user", "content": content(image, question)}]
    options = {"model": "tiny", "max_tokens": 12, **more}
    made = client.chat.completions.create(messages=messages, **options)
    if not more.get("stream"):
        return made.choices[0].message.content
    return "".join(c.choices[0].delta.content or "" for c in made if c.choices)


def post(address, body, path="/v1/chat/completions", key=KEY):
    """(status, parsed error or raw body) of a request that no client library would send."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def get(address, path, key=KEY):
    request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as found:
        return found.read().decode()


def metric(address, name) -> float:
    return float(re.search(rf"^vlm_jax_{name} (\S+)", get(address, "/metrics"), re.MULTILINE)[1])


def test_server_ask_ask_many_and_evaluation_give_one_text_and_nothing_is_compiled(
    client, model, run, world, address
):
    """Twelve clients at once, streaming or not, share four rows."""
    expected = [model.ask(*pair, max_new_tokens=12) for pair in asked(world)]
    assert model.ask_many(asked(world), max_new_tokens=12, rows=3) == expected
    assert evaluated(run, world) == expected and len(set(expected)) >= 5
    compiled = metric(address, "programs_compiled")
    jobs = [(i % 2 == 0, pair, text) for i, (pair, text) in enumerate(zip(asked(world) * 3, expected * 3, strict=True))]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda job: answer(client, *job[1], stream=job[0]), jobs))
    assert told == [text for _, _, text in jobs]
    assert metric(address, "programs_compiled") == compiled > 0
    assert metric(address, "answer_tokens_total") > len(QUESTIONS)


def test_a_drawn_answer_is_the_one_of_its_seed(client, model, world):
    pair = (picture(world, "red"), QUESTION)
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    assert answer(client, *pair, **options) == model.ask(*pair, max_new_tokens=12, **options)


def test_a_conversation_goes_on_and_tokens_are_counted(client, model, world):
    chat = model.chat(picture(world, "blue"), max_new_tokens=5)
    first = chat.ask(QUESTION)
    messages = [
        {"role": "user", "content": content(picture(world, "blue"), QUESTION)}, {"role": "assistant", "content": first},
        {"role": "user", "content": "Is it bright ?"},
    ]  # fmt: skip
    made = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    assert made.choices[0].message.content == chat.ask("Is it bright ?")
    assert made.choices[0].finish_reason in ("stop", "length")
    usage = made.usage
    assert usage.completion_tokens <= 5 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens  # fmt: skip
    cost = made.vlm_jax
    assert cost["this"]["visual_tokens"] == 1 and cost["all_patches"]["visual_tokens"] == 4
    assert cost["all_patches"]["gflops"]["prefill"] > cost["this"]["gflops"]["prefill"] > 0
    assert set(cost["all_patches"]["typical_ms"]) == {"encoder", "compressor", "prefill", "decode"}


def test_a_stop_string_ends_the_answer_before_it(client, model, world):
    pair = (picture(world, "red"), QUESTION)
    words = model.ask(*pair, max_new_tokens=12)
    stop = words[2:5]
    for stream in (False, True):
        assert answer(client, *pair, stop=stop, stream=stream) == words[: words.index(stop)]
    assert protocol.unsure("a cat", ("atom", "tomb")) == 2 and protocol.unsure("a dog", ("atom",)) == 0  # fmt: skip


def png(width, height) -> str:
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def shown(image) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Why ?"}]
    return {"messages": [{"role": "user", "content": parts}]}


def said(text, **more) -> dict:
    return {"messages": [{"role": "user", "content": text}], **more}


BROKEN = [
    (b"{", 400, "the body is no valid JSON"),
    (b"[1]", 400, "the body must be a JSON object"),
    (b"[" * 100_000, 400, "the body is no valid JSON"),
    ({}, 400, "'messages' must be a list"),
    ({"messages": []}, 400, "'messages' must be a list"),
    ({"messages": ["a"]}, 400, "message 0 needs 'from' and 'value'"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "has no human turn"),
    (said("Why ?", model="gpt"), 404, "model 'gpt' is not served here; use 'tiny'."),
    (said("Why ?", n=2), 400, "'n' is not supported"),
    (said("Why ?", tools=[{}]), 400, "'tools' is not supported"),
    (said("Why ?", top_k=5), 400, "'top_k' is not supported"),
    (said("Why ?", repetition_penalty=1.1), 400, "'repetition_penalty' is not supported"),
    (said("Why ?", stream="false"), 400, "'stream' must be true or false"),
    (said("Why ?", stream_options="x"), 400, "'stream_options' an object"),
    (said("Why ?", temperature=-1), 400, "temperature must be 0"),
    (said("Why ?", temperature="hot"), 400, "'temperature' must be a number"),
    (said("Why ?", max_tokens=131), 400, "max_tokens 131 is more than the 130"),
    (said("Why ?", max_tokens=0), 400, "max_tokens 0 must be 1 or more"),
    (said("Why ?", visual_tokens=3), 400, "visual_tokens 3 is not served; use one of 1."),
    (said("Say " * 200), 400, "more than max_tokens 120"),
    (said("Say </s>"), 400, "contains the control token"),
    (shown("https://example.com/a.png"), 400, "addresses of pictures are not fetched by this server"),
    (shown("/etc/passwd"), 400, "a picture must be a data: URL in base64, got '/etc/passwd'."),
    (shown("file:///etc/passwd"), 400, "a picture must be a data: URL"),
    (shown("data:image/png;base64,@@@"), 400, "is no valid base64"),
    (shown("data:image/png;base64,AAAA"), 400, "is in no format that can be read"),
    (shown(f"data:image/png;base64,{png(20, 20)[:60]}"), 400, "image"),
    (shown(f"data:image/png;base64,{png(101, 100)}"), 413, "a picture has more than 10,000 pixels."),
    (shown(f"data:image/png;base64,{'A' * 1_500_000}"), 413, "a picture is larger than 1 MiB."),
    (b" " * 3_000_000, 413, "the body is larger than"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(9, 9)}"}}] * 2}]}, 400, "2 pictures; this server takes 1"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "message"), BROKEN)
def test_a_broken_request_is_told_what_is_wrong(address, body, status, message):
    code, error = post(address, body)
    assert (code, error["type"]) == (status, "invalid_request_error")
    assert message in error["message"] and "\n" not in error["message"]


def test_the_key_is_asked_for_and_health_is_not(address, client):
    code, error = post(address, said("Why ?"), key="wrong")
    assert code == 401 and error["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
    (card,) = client.models.list().data
    assert card.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    assert json.loads(get(address, "/health", key="")) == {"status": "ok"}
    assert "<title>vlm_jax</title>" in get(address, "/", key="")


def test_a_client_that_hangs_up_frees_its_row(address, engine, client, world):
    body = json.dumps(said("Say hello", stream=True, max_tokens=130)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"  # fmt: skip
    host, port = address.removeprefix("http://").split(":")
    before = metric(address, "cancelled_total")
    for _ in range(4):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            assert b"200 OK" in connection.recv(2000)
    end = time.monotonic() + 60
    while engine.batcher.live and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.batcher.live == 0
    assert answer(client, picture(world, "red"), QUESTION)
    assert metric(address, "cancelled_total") >= before


def test_an_answer_that_takes_too_long_is_a_504_and_its_row_is_free(address, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", dataclasses.replace(LIMITS, timeout_s=1e-3))
    code, error = post(address, said("Say hello", max_tokens=100))
    assert code == 504 and "was not complete after 0.001 s" in error["message"]
    end = time.monotonic() + 60
    while engine.batcher.live and time.monotonic() < end:
        time.sleep(0.05)
    assert engine.batcher.live == 0


def test_a_full_queue_and_a_server_that_ends_say_when_to_come_again(model):
    engine = Engine(model, dataclasses.replace(LIMITS, queue=1))  # not started: nobody answers
    read = protocol.read(json.dumps(said("Say hello")).encode(), "tiny", LIMITS)
    engine.submit(engine.ticket(read), lambda: None)
    with pytest.raises(Refused, match="1 requests wait already") as error:
        engine.submit(engine.ticket(read), lambda: None)
    assert (error.value.status, error.value.retry_s) == (429, 2)
    engine.stop()
    with pytest.raises(Refused, match="shutting down") as error:
        engine.submit(engine.ticket(read), lambda: None)
    assert error.value.status == 503


def test_a_token_map_is_a_picture(address, world):
    code, data = post(address, shown(url(picture(world, "red"))), "/map")
    assert code == 200
    with Image.open(io.BytesIO(data)) as image:
        assert min(image.size) > 300
    code, error = post(address, said("Why ?"), "/map")
    assert code == 400 and error["message"] == "a token map needs one picture."


@pytest.mark.slow
def test_sigterm_lets_an_answer_end_and_then_the_server(run):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vlm_jax.serve", f"--model={run}", f"--port={port}", "--rows=1", "--prompt-tokens=120"]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 500
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            get(address, "/health")
            break
        time.sleep(0.2)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
    messages = [{"role": "user", "content": "Say hello"}]
    stream = client.chat.completions.create(model="run", messages=messages, max_tokens=60, stream=True)  # fmt: skip
    pieces = iter(stream)
    next(pieces)
    server.send_signal(signal.SIGTERM)
    finishes = [c.choices[0].finish_reason for c in pieces if c.choices]
    assert finishes[-1] in ("stop", "length")
    assert server.wait(60) == 0, server.stderr.read()


HEAPS = """
import ctypes, sys, threading
from vlm_jax import serve
if "keep" in sys.argv:
    serve._keep_memory_flat()
libc, together = ctypes.CDLL(None), threading.Barrier(16)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
def fill():
    together.wait()
    for _ in range(1000):
        libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=fill) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_freed_memory_is_kept_in_two_heaps_unless_the_environment_says_otherwise():
    counts = []
    given = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    for words, limit in ((["keep"], {}), ([], {}), (["keep"], {"MALLOC_ARENA_MAX": "5"})):
        command = [sys.executable, "-c", HEAPS, *words]
        out = subprocess.run(command, cwd=ROOT, env=given | limit, capture_output=True, text=True, check=True)  # fmt: skip
        counts.append(out.stdout.count("<heap "))
    assert counts[0] == 2 and counts[1] > 8 and counts[2] == 5
