"""What serve.py does under load: `python bench.py serve`. Clients are threads of this process, the server is another.

    python bench.py serve                                         throughput, time to the first token
    python bench.py serve --soak=10000 --rate=17                  memory and correctness over ten minutes
    python bench.py serve --reference=true                        beside `transformers serve`, with the same weights
"""
import contextlib
import http.client
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import save_checkpoint
from configurator import command_line
from convert import save_pretrained
from decoding import generate
from model import Transformer, load_model

PROMPTS = ("ROMEO:", "First Citizen:\nBefore we proceed", "The king", "O", "JULIET:\nAnd what is love?", "What say")


@dataclass
class ServeBenchConfig:
    """What `python bench.py serve` can be told."""
    out_dir: str = "out/shakespeare"     # the model that is served
    requests: int = 32                   # at once, and one after another
    tokens: int = 64                     # that each of them asks for
    flags: str = ""                      # further flags of serve.py, with spaces between
    soak: int = 0                        # so many requests instead, from 32 clients, each compared with generate's text
    rate: float = 17.0                   # of them a second
    reference: bool = False              # instead: 1, 8 and 32 users, here and of `transformers serve`


@contextlib.contextmanager
def running(command: list[str], **how):
    """A process, ended afterwards."""
    with subprocess.Popen(command, text=True, **how) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def serving(folder, flags: str):
    """(process of serve.py, its port), once it is ready."""
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(folder), "--port=0", *flags.split()]
    with running(command, stdout=subprocess.PIPE) as process:
        line = next((line for line in process.stdout if "ready at" in line), None)
        if line is None:
            sys.exit(f"{' '.join(command)} did not start")
        yield process, int(re.search(r":(\d+) ", line)[1])


def post(port: int, body: dict) -> tuple[dict | None, float]:
    """(what the server answers, None for a stream; seconds to the first byte of it) to a request for completions."""
    began = time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text, seconds = response.read(1), time.perf_counter() - began
        text += response.read()
    if response.status != 200:
        raise RuntimeError(f"port {port} answered {response.status}: {text.decode()[:300]}")
    return None if body.get("stream") else json.loads(text), seconds


# --- what is measured ---

def rate(port: int, bodies: list[dict], clients: int) -> tuple[float, list]:
    """(tokens a second, the answers) of all these requests by so many clients."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for answer, _ in pool.map(lambda body: post(port, body), bodies)]
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return tokens / (time.perf_counter() - began), [answer["choices"] for answer in answers]


def throughput(port: int, c: ServeBenchConfig) -> None:
    """Tokens a second of so many requests one after another, and at once."""
    bodies = [{"prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": c.tokens, "temperature": 0.8, "seed": i}
              for i in range(c.requests)]
    rounds = [(rate(port, bodies, 1), rate(port, bodies, c.requests)) for _ in range(3)]
    if any(alone[1] != together[1] for alone, together in rounds):
        print("a text differs between the two ways")
    a, b = (statistics.median(tokens_per_s for tokens_per_s, _ in way) for way in zip(*rounds))
    print(f"{c.requests} requests of {c.tokens} tokens: one after another {a:,.0f} tokens/s, at once {b:,.0f}: "
          f"{b / a:.1f} times (asked: 5)", flush=True)


def first_tokens(port: int, context: int) -> None:
    """Milliseconds to the first token of a short prompt alone, and right after a prompt of nearly the whole context."""
    generator, alone, under = random.Random(0), [], []

    def ask(length):                             # no two prompts alike, or blocks would be shared
        prompt = [generator.randrange(256) for _ in range(length)]
        return post(port, {"prompt": prompt, "max_tokens": 4, "stream": True})[1] * 1e3
    with ThreadPoolExecutor(1) as pool:
        for _ in range(30):
            alone.append(ask(5))
            long = pool.submit(ask, context - 4)
            time.sleep(0.001)
            under.append(ask(5))
            long.result()
    a, b = statistics.median(alone), statistics.median(under)
    print(f"time to first token of 5 tokens: alone {a:.1f} ms, under the prefill of {context - 4}: {b:.1f} ms: "
          f"{b / a:.1f} times (asked: at most 3)", flush=True)


def soak(process, port: int, model, tokenizer, c: ServeBenchConfig) -> None:
    """Many requests at a rate, each text compared with the one that generate gives for its prompt and seed."""
    kinds, generator, memory, results = [], random.Random(1), [], []
    for seed in range(60):
        ids = tokenizer.encode(generator.choice(PROMPTS))
        ids += [generator.randrange(256) for _ in range(generator.randrange(40))]
        how = {"temperature": generator.choice((0, 0.8, 1.0)), "top_p": generator.choice((None, 0.9))}
        n = generator.randrange(1, 49)
        new = generate(model, ids, n, **how, generator=torch.Generator().manual_seed(seed), tokenizer=tokenizer,
                       stop_ids=tokenizer.special_tokens.values())
        text = tokenizer.decode([i for i in new if i not in tokenizer.special_tokens.values()])
        kinds.append(({"prompt": ids, "max_tokens": n, "seed": seed} | how, text))

    def outcome(kind):
        try:
            return "right" if post(port, kind[0])[0]["choices"][0]["text"] == kind[1] else "wrong"
        except (OSError, RuntimeError, ValueError, http.client.HTTPException):
            return "lost"
    began = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        for i in range(c.soak):
            time.sleep(max(0.0, began + i / c.rate - time.perf_counter()))
            results.append(pool.submit(outcome, generator.choice(kinds)))
            if i % max(1, c.soak // 10) == 0:                                    # /proc: Linux
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024)
    results = [result.result() for result in results]
    print(f"{len(results):,} requests in {time.perf_counter() - began:.0f} s: {results.count('lost')} lost, "
          f"{results.count('wrong')} wrong; memory in MB by tenths: {' '.join(map(str, memory))}", flush=True)


# --- beside another server ---

def same_weights(c: ServeBenchConfig, folder: Path) -> None:
    """The model in both forms, FOLDER/ours and FOLDER/theirs; without smear, which no other library has."""
    model, tokenizer = load_model(c.out_dir)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "smear_gate"}
    plain = Transformer(replace(model.config, smear=False))
    plain.load_state_dict(weights)
    (folder / "ours").mkdir()
    tokenizer.save(folder / "ours" / "tokenizer.json")
    save_checkpoint(plain, None, 0, folder / "ours" / "ckpt.pt")
    save_pretrained(plain, folder / "theirs", tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def row(name: str, process, port: int, model: str, tokens: int) -> None:
    """A line of the table: tokens a second that 1, 8 and 32 users get together, each asking three times."""
    bodies = [{"model": model, "prompt": f"{PROMPTS[i % len(PROMPTS)]} {i // 32}", "max_tokens": tokens,
               "temperature": 0} for i in range(96)]
    deadline = time.monotonic() + 120
    while True:                                  # the first answer loads or measures what the others need
        try:
            rate(port, bodies[:1], 1)
            break
        except RuntimeError as error:
            sys.exit(f"{name}: {error}")
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} does not answer at port {port} (its status: {process.poll()}); see what it says when "
                         "you start it yourself, and pip install transformers[serving]")
            time.sleep(0.5)
    print(f"{name:<42}" + "".join(f"{rate(port, bodies[:3 * n], n)[0]:>9,.0f}" for n in (1, 8, 32)), flush=True)


def beside(c: ServeBenchConfig) -> None:
    """A table of tokens a second by users: serve.py, and `transformers serve` with and without continuous batching."""
    if shutil.which("transformers") is None:
        sys.exit("no command `transformers` to serve beside: pip install transformers[serving]")
    print(f"tokens/s by users{'':<25}" + "".join(f"{n:>9}" for n in (1, 8, 32)))
    with tempfile.TemporaryDirectory() as folder:
        same_weights(c, Path(folder))
        with serving(f"{folder}/ours", c.flags) as (process, port):
            row("serve.py", process, port, "ours", c.tokens)
        for flags in ([], ["--continuous-batching"]):
            command = ["transformers", "serve", f"{folder}/theirs", "--device=cpu", "--port=8765", *flags]
            with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                row(" ".join(["transformers serve", *flags]), process, 8765, f"{folder}/theirs", c.tokens)


def serve(argv: list[str]) -> None:
    """serve.py under load: throughput of a batch, time to the first token, a soak, another server beside it."""
    _, _, c, _ = command_line(ServeBenchConfig, argv, "usage: python bench.py serve [--key=value …]")
    if c.reference:
        beside(c)
        return
    model, tokenizer = load_model(c.out_dir)
    with serving(c.out_dir, c.flags) as (process, port):
        if c.soak:
            soak(process, port, model, tokenizer, c)
        else:
            throughput(port, c)
            first_tokens(port, model.config.context_length)
