"""What serve.py does under load: `python bench.py serve`. A client in this process, the server in another.

    python bench.py serve                                         throughput, time to the first token
    python bench.py serve --soak=10000 --rate=17                  memory and correctness over ten minutes
    python bench.py serve --reference=true                        beside `transformers serve`, with the same weights
"""
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import save_checkpoint
from configurator import command_line
from convert import save_pretrained
from decoding import generate
from model import Transformer, load_model


@dataclass
class ServeBenchConfig:
    """What `python bench.py serve` can be told."""
    out_dir: str = "out/shakespeare"     # the model that is served
    requests: int = 32                   # at once, and one after another
    tokens: int = 64                     # that each of them asks for
    rounds: int = 3                      # the median counts
    flags: str = ""                      # further flags of serve.py, with spaces between
    soak: int = 0                        # so many requests instead, from 32 clients, each compared with generate's text
    rate: float = 17.0                   # of them a second
    reference: bool = False              # instead: 1, 8 and 32 users, here and of `transformers serve`
    port: int = 8765                     # of the reference


# --- the client ---

async def post(port: int, path: str, body: dict):
    """(status, text, seconds to the first event or byte of the body, seconds in all) of one request."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                 f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = int((await reader.readline()).split()[1])
    chunked = False
    while (line := await reader.readline()).strip():
        chunked |= line.lower().startswith(b"transfer-encoding: chunked")
    first, parts = None, []
    while True:
        if chunked:
            size = int(await reader.readline(), 16)
            part = (await reader.readexactly(size + 2))[:-2]
        else:
            part = await reader.read(2 ** 16)
        if not part:
            break
        first = first or time.perf_counter()
        parts.append(part)
    writer.close()
    return status, b"".join(parts).decode(), (first or began) - began, time.perf_counter() - began


def start(folder, flags=()):
    """(process of serve.py, its port) when it is ready."""
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(folder), "--port=0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = next((line for line in process.stdout if "ready at" in line), None)
    if line is None:
        raise RuntimeError(f"{' '.join(command)} did not start")
    return process, int(re.search(r":(\d+) ", line)[1])


def resident_mb(pid: int) -> float:
    """Megabytes that a process holds in memory (Linux)."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))[1]) / 1024


# --- what is measured ---

PROMPTS = ("ROMEO:", "First Citizen:\nBefore we proceed", "The king", "O", "JULIET:\nAnd what is love?", "What say")


async def throughput(port: int, c: ServeBenchConfig) -> None:
    """Tokens a second of so many requests one after another, and at once."""
    bodies = [{"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": c.tokens, "temperature": 0.8, "seed": i}
              for i in range(c.requests)]

    def count(answers):
        return sum(json.loads(text)["usage"]["completion_tokens"] for _, text, *_ in answers)
    alone, together = [], []
    for _ in range(c.rounds):
        began = time.perf_counter()
        answers = [await post(port, "/v1/completions", body) for body in bodies]
        alone.append(count(answers) / (time.perf_counter() - began))
        began = time.perf_counter()
        same = await asyncio.gather(*(post(port, "/v1/completions", body) for body in bodies))
        together.append(count(same) / (time.perf_counter() - began))
        if [json.loads(a[1])["choices"] for a in answers] != [json.loads(a[1])["choices"] for a in same]:
            print("a text differs between the two ways")
    a, b = statistics.median(alone), statistics.median(together)
    print(f"{c.requests} requests of {c.tokens} tokens: one after another {a:,.0f} tokens/s, at once {b:,.0f}: "
          f"{b / a:.1f} times (asked: 5)", flush=True)


async def first_tokens(port: int, context: int) -> None:
    """Milliseconds to the first token of a short prompt alone, and right after a prompt of nearly the whole context."""
    generator, alone, under = random.Random(0), [], []

    def short():
        return {"prompt": [generator.randrange(256) for _ in range(5)], "max_tokens": 4, "stream": True}
    for _ in range(30):                          # no two prompts alike, or blocks would be shared
        alone.append((await post(port, "/v1/completions", short()))[2] * 1e3)
        long = {"prompt": [generator.randrange(256) for _ in range(context - 4)], "max_tokens": 4, "stream": True}
        reading = asyncio.ensure_future(post(port, "/v1/completions", long))
        await asyncio.sleep(0.001)
        under.append((await post(port, "/v1/completions", short()))[2] * 1e3)
        await reading
    a, b = statistics.median(alone), statistics.median(under)
    print(f"time to first token of 5 tokens: alone {a:.1f} ms, under the prefill of {context - 4}: {b:.1f} ms: "
          f"{b / a:.1f} times (asked: at most 3)", flush=True)


async def soak(process, port: int, model, tokenizer, c: ServeBenchConfig) -> None:
    """Many requests at a rate, each text compared with the one that generate gives for its prompt and seed."""
    kinds, generator = [], random.Random(1)
    for seed in range(60):
        ids = tokenizer.encode(generator.choice(PROMPTS))
        ids += [generator.randrange(256) for _ in range(generator.randrange(40))]
        how = {"temperature": generator.choice((0, 0.8, 1.0)), "top_p": generator.choice((None, 0.9))}
        n = generator.randrange(1, 49)
        new = generate(model, ids, n, **how, generator=torch.Generator().manual_seed(seed), tokenizer=tokenizer,
                       stop_ids=tokenizer.special_tokens.values())
        text = tokenizer.decode([i for i in new if i not in tokenizer.special_tokens.values()])
        kinds.append(({"prompt": ids, "max_tokens": n, "seed": seed} | how, text))
    slots, lost, wrong, done, began, memory = asyncio.Semaphore(32), 0, 0, 0, time.perf_counter(), []

    async def one(body, text):
        nonlocal lost, wrong, done
        try:
            status, answer, *_ = await post(port, "/v1/completions", body)
            lost += status != 200
            wrong += status == 200 and json.loads(answer)["choices"][0]["text"] != text
        except (OSError, ValueError, asyncio.IncompleteReadError):
            lost += 1
        done += 1
        slots.release()
    tasks = set()
    for i in range(c.soak):
        await slots.acquire()
        await asyncio.sleep(max(0.0, began + i / c.rate - time.perf_counter()))
        task = asyncio.ensure_future(one(*generator.choice(kinds)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if i % max(1, c.soak // 10) == 0:
            memory.append(resident_mb(process.pid))
    await asyncio.gather(*tasks)
    memory.append(resident_mb(process.pid))
    print(f"{done:,} requests in {time.perf_counter() - began:.0f} s: {lost} lost, {wrong} wrong; memory in MB by "
          f"tenths: {' '.join(f'{m:.0f}' for m in memory)}", flush=True)


async def users(port: int, model: str, n_users: int, tokens: int) -> float:
    """Tokens a second that n users get together, each asking three times."""
    async def user(i):
        total = 0
        for turn in range(3):
            prompt = f"{PROMPTS[i % len(PROMPTS)]} {turn}"
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            status, text, *_ = await post(port, "/v1/completions", body)
            if status != 200:
                raise RuntimeError(f"port {port} answered {status}: {text[:300]}")
            total += json.loads(text)["usage"]["completion_tokens"]
        return total
    began = time.perf_counter()
    total = sum(await asyncio.gather(*map(user, range(n_users))))
    return total / (time.perf_counter() - began)


# --- beside another server ---

def same_weights(c: ServeBenchConfig, folder: Path) -> None:
    """The model in both forms, FOLDER/ours and FOLDER/theirs; without smear, which no other library has."""
    model, tokenizer = load_model(c.out_dir)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "smear_gate"}
    plain = Transformer(replace(model.config, smear=False))
    plain.load_state_dict(weights)
    for name in ("ours", "theirs"):
        (folder / name).mkdir()
    tokenizer.save(folder / "ours" / "tokenizer.json")
    save_checkpoint(plain, None, 0, folder / "ours" / "ckpt.pt")
    save_pretrained(plain, folder / "theirs", tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


async def until_up(port: int, seconds: float = 120) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            return writer.close()
        except OSError:
            await asyncio.sleep(0.5)
    raise RuntimeError(f"nothing listens at port {port} after {seconds:.0f} s")


def beside(c: ServeBenchConfig) -> None:
    """A table of tokens a second by users: serve.py, and `transformers serve` with and without continuous batching."""
    with tempfile.TemporaryDirectory() as folder:
        same_weights(c, Path(folder))
        theirs = str(Path(folder) / "theirs")
        for name, flags in (("serve.py", None), ("transformers serve", []),
                            ("transformers serve, continuous batching", ["--continuous-batching"])):
            if flags is None:
                process, port = start(Path(folder) / "ours", c.flags.split())
            else:
                command = ["transformers", "serve", theirs, "--device=cpu", f"--port={c.port}", *flags]
                quiet = subprocess.DEVNULL
                process, port = subprocess.Popen(command, stdout=quiet, stderr=quiet), c.port
            try:
                asyncio.run(until_up(port))
                model = "ours" if flags is None else theirs
                asyncio.run(users(port, model, 1, 8))                # what is loaded or measured at the first request
                rates = [asyncio.run(users(port, model, n, c.tokens)) for n in (1, 8, 32)]
                print(f"{name:<42}" + "".join(f"{rate:>9,.0f}" for rate in rates), flush=True)
            except (RuntimeError, OSError, asyncio.IncompleteReadError, ValueError) as error:
                print(f"{name:<42} failed: {error}", flush=True)
            finally:
                process.terminate()
                process.wait()


def serve(argv: list[str]) -> None:
    """serve.py under load: throughput of a batch, time to the first token, a soak, another server beside it."""
    _, _, c, _ = command_line(ServeBenchConfig, argv, "usage: python bench.py serve [--key=value …]")
    if c.reference:
        print(f"tokens/s by users{'':<25}" + "".join(f"{n:>9}" for n in (1, 8, 32)))
        beside(c)
        return
    model, tokenizer = load_model(c.out_dir)
    process, port = start(c.out_dir, c.flags.split())
    try:
        if c.soak:
            asyncio.run(soak(process, port, model, tokenizer, c))
        else:
            asyncio.run(throughput(port, c))
            asyncio.run(first_tokens(port, model.config.context_length))
    finally:
        process.terminate()
        process.wait()


VERBS = {"serve": serve}
