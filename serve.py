"""One model for many users: OpenAI's protocol over HTTP, and a page to look through the model while it writes.

    python serve.py out/shakespeare                        then open http://127.0.0.1:8000
    python serve.py out/shakespeare --port=9000 --max_batch=64 --quantize=int8
    python serve.py out/shakespeare --host=0.0.0.0 --api_key=SECRET        for other machines too

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
         -d '{"prompt": "ROMEO:", "max_tokens": 40, "temperature": 0.8, "seed": 1}'

Any client of OpenAI's works: `openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any")`. How a request goes:

    client ── HTTP ──> this page ── Row ──> queue ── engine's thread, batching.py ──> a token for each row, a step
                       checks it, 400 …                                                     │
    client <─ JSON or a stream of events ─── reads what its rows have come to <── wakes it ─┘

    POST /v1/completions        prompt: a text, ids, or a list of either       GET /v1/models, /health, /metrics
    POST /v1/chat/completions   for a model that align.py tuned for it         GET /   serve.html
    POST /api/next  /api/tokens  /api/attention, GET /api/runs  /api/model     what the page draws

32 requests at once get 5.1 to 5.8 times the tokens per second of one after another, and a short prompt under a long one
waits 2.4 to 2.6 times as long as alone (default model, two CPU cores; results/serve.md). In bfloat16, the default
on a GPU, a text may differ from the one written alone. protocol.py reads requests and forms answers, lens.py works out
what the page draws.

What differs from OpenAI's: `top_k` and `min_p` are understood; choice j of a seed is the text that seed + j alone
gives; `max_tokens` is cut to the room in the context; a setting that would have no effect is refused. Log probabilities
are the model's own, before temperature and cuts. Left out: penalties, tools, images, TLS (put a proxy before it).
"""
import asyncio
import contextlib
import hmac
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route

from accounting import count_params
from batching import Engine, Row
from configurator import command_line, fail
from lens import attention_weights, curves_beside, cuts_of, likeliest, token_text
from machine import keep_freed_memory
from protocol import Answer, ApiError, Fields, read_json, turns_of
from sample import END_OF_TEXT, chat_ids, load, load_draft

END_SECONDS = 7                      # for what is being written when the server is told to end
MAX_ROWS, MAX_TOP = 128, 20          # texts of one request; alternatives of each token


@dataclass
class ServeConfig:
    """What `python serve.py OUT_DIR` can be told."""
    host: str = "127.0.0.1"              # address to listen at; 0.0.0.0 = from every machine that can reach this one
    port: int = 8000                     # 0 = any that is free
    api_key: str | None = None           # password that requests must bring as "Authorization: Bearer …"
    max_batch: int = 32                  # texts written at once
    max_queue: int = 512                 # texts that may wait; beyond them 429
    cache_blocks: int | None = None      # blocks of the cache; none = for half of max_batch texts of a whole context
    prefill: int = 64                    # tokens of prompts read in one step, so that long ones do not hold up others
    quantize: str | None = None          # int8 | int4: smaller weights
    draft: str | None = None             # guesses while one text is written alone: ngram | folder of a smaller model
    device: str | None = None            # cpu, cuda, mps; none = the best there is
    dtype: str | None = None             # float32, bfloat16, float16; none = the fastest on a GPU, as stored elsewhere
    checkpoint: str = "ckpt.pt"          # ckpt.pt = the last state, best.pt = the best on validation

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be 0 … 65535")
        for name, least in (("max_batch", 1), ("max_queue", 0), ("cache_blocks", 1), ("prefill", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.draft == "mtp":
            raise ValueError("draft=mtp is not served: give ngram, or the folder of a smaller model")


# --- what is served ---

class Server:
    """A model, its engine, and the handlers of all addresses."""

    def __init__(self, folder: str, config: ServeConfig):
        self.folder, self.config, self.name = Path(folder), config, Path(folder).resolve().name
        self.model, self.tokenizer = load(folder, config)
        draft = load_draft(config.draft, self.tokenizer, config) if config.draft else None
        self.engine = Engine(self.model, self.tokenizer, self.notify, max_batch=config.max_batch,
                             n_blocks=config.cache_blocks, budget=config.prefill, draft=draft)
        self.device, self.requests, self.draining, self.loop = self.engine.cache.device, Counter(), False, None
        self.stop_ids = [i for text, i in self.tokenizer.special_tokens.items() if text == END_OF_TEXT]
        self.n_parameters = count_params(self.model.config)["total"]             # int4 holds two numbers in one
        self.created = int(time.time())

    def notify(self, rows) -> None:
        """On the engine's thread: wake those who wait for these rows."""
        def wake():
            for row in rows:
                row.wake.set()
        with contextlib.suppress(RuntimeError):            # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(wake)

    # what a request asks for

    async def fields(self, request: Request) -> Fields:
        """What the body says, for the model that there is."""
        fields = Fields(await read_json(request))
        self.check_name(fields.take("model", str, default=self.name))
        return fields

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r} here; there is {self.name!r}", "model", "model_not_found")

    def prompt_ids(self, prompt) -> list[int]:
        """The ids of one prompt, a text or ids. Raises ApiError for one that cannot be gone on from."""
        limit, size = self.engine.limit, self.engine.vocab_limit
        if isinstance(prompt, str):
            try:
                prompt = self.tokenizer.encode(prompt)
            except ValueError as error:                    # half a surrogate pair
                raise ApiError(400, f"the prompt cannot be encoded: {error}", "prompt") from None
        if not isinstance(prompt, list) or not all(type(i) is int for i in prompt):
            raise ApiError(400, "prompt must be a text, a list of ids, or a list of either", "prompt")
        if not prompt:
            raise ApiError(400, "the prompt is empty; a model needs a token to go on from, as <|endoftext|>", "prompt")
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise ApiError(400, f"the prompt holds an id outside 0 … {size - 1}, the vocabulary", "prompt")
        if len(prompt) > limit:
            raise ApiError(400, f"the prompt of {len(prompt)} tokens is past the context of {limit}", "prompt",
                           "context_length_exceeded")
        return prompt

    def answer(self, fields: Fields, prompts: list[list[int]], max_new: int, stop_ids, *, chat: bool,
               echo: bool = False, n_top: int | None = None) -> Answer:
        """Take the fields that both ways of asking share, and put the rows in the queue."""
        n, how, stops = fields.whole("n", 1, 1, MAX_ROWS), fields.sampling(), fields.stops()
        seed, stream = fields.whole("seed", None, -2 ** 62, 2 ** 62), fields.take("stream", bool, default=False)
        options = Fields(fields.take("stream_options", dict, default={}))
        usage = options.take("include_usage", bool, default=False)
        options.end()
        fields.end()
        if len(prompts) * n > MAX_ROWS:
            raise ApiError(400, f"{len(prompts)} prompts × n={n} are more than {MAX_ROWS} texts; ask twice", "n")
        if self.engine.n_open() + len(prompts) * n > self.config.max_batch + self.config.max_queue:
            raise ApiError(429, f"{self.config.max_queue} texts are waiting already; try again later")
        rows = [Row(ids, min(max_new, self.engine.limit - len(ids)), self.tokenizer, how=how, stops=stops,
                    stop_ids=stop_ids, seed=None if seed is None else seed + j, n_top=n_top, echo=echo, streams=stream,
                    device=self.device) for ids in prompts for j in range(n)]
        return Answer(self, rows, chat=chat, n=n, stream=stream, usage=usage, logprobs=n_top is not None)

    # /v1

    async def completions(self, request: Request) -> Answer:
        """Go on with texts."""
        fields = await self.fields(request)
        prompt = fields.take("prompt", str, list)
        if prompt is None:
            raise ApiError(400, "prompt is missing", "prompt")
        if isinstance(prompt, str) or not prompt or type(prompt[0]) is int:
            prompt = [prompt]
        n_top = fields.whole("logprobs", None, 0, MAX_TOP)
        max_new, echo = fields.whole("max_tokens", 16, 0, 2 ** 31), fields.take("echo", bool, default=False)
        return self.answer(fields, [self.prompt_ids(one) for one in prompt], max_new, self.stop_ids, chat=False,
                           echo=echo, n_top=n_top)

    async def chat_completions(self, request: Request) -> Answer:
        """Answer in a conversation."""
        fields = await self.fields(request)
        turns = turns_of(fields.take("messages", list))
        try:
            ids, end = chat_ids(self.tokenizer, turns)
        except UnicodeError as error:
            raise ApiError(400, f"the messages cannot be encoded: {error}", "messages") from None
        except ValueError:
            raise ApiError(400, f"{self.name} has no chat template; it goes on with texts: /v1/completions. Tune it "
                           f"for conversations: python align.py sft --base={self.folder} --data=FILE.jsonl "
                           "--out_dir=out/chat --template=chat", "model") from None
        n_top = fields.whole("top_logprobs", None, 0, MAX_TOP)
        if fields.take("logprobs", bool, default=False):
            n_top = n_top or 0
        elif n_top is not None:
            raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs")
        max_new = fields.whole("max_tokens", 2 ** 31, 0, 2 ** 31)
        max_new = fields.whole("max_completion_tokens", max_new, 0, 2 ** 31)
        return self.answer(fields, [self.prompt_ids(ids)], max_new, [*self.stop_ids, end], chat=True, n_top=n_top)

    async def models(self, request: Request) -> JSONResponse:
        """The one model there is."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "you",
                 "max_model_len": self.engine.limit}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [about]})
        self.check_name(request.path_params["name"])
        return JSONResponse(about)

    async def health(self, request: Request) -> JSONResponse:
        """Answered while requests are taken; 503 once the server is ending, see `check_access`."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> PlainTextResponse:
        """What happened so far and how things stand, in Prometheus' text form."""
        engine, counts, lines = self.engine, self.engine.counts, ["# TYPE requests_total counter"]
        lines += [f'requests_total{{path="{path}",status="{status}"}} {n}'
                  for (path, status), n in self.requests.items()]
        for name in ("prompt_tokens", "generated_tokens", "guessed_tokens", "preemptions"):
            lines += [f"# TYPE {name}_total counter", f"{name}_total {counts[name]}"]
        gauges = {"batch_size": len(engine.running), "queue_length": engine.n_open() - len(engine.running),
                  "cache_blocks": engine.blocks.n_blocks,
                  "cache_blocks_used": engine.blocks.n_blocks - len(engine.blocks.free)}
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value}"]
        # A summary: sum / count is the mean. The second one counts the tokens after the first of each text.
        for name, seconds, n in (("time_to_first_token_seconds", "first_token_seconds", "first_tokens"),
                                 ("time_per_token_seconds", "token_seconds", "tokens")):
            lines += [f"# TYPE {name} summary", f"{name}_sum {counts[seconds]:.6f}", f"{name}_count {counts[n]}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    # what the page draws

    async def page(self, request: Request) -> FileResponse:
        """serve.html, which asks for all the rest."""
        return FileResponse(Path(__file__).with_name("serve.html"))

    async def about(self, request: Request) -> JSONResponse:
        """What the page has to know of the model."""
        c, chats = self.model.config, {"<|user|>", "<|im_start|>"} & set(self.tokenizer.special_tokens)
        return JSONResponse({"name": self.name, "parameters": self.n_parameters, "context": self.engine.limit,
                             "layers": c.n_layers, "heads": c.n_heads, "vocabulary": self.engine.vocab_limit,
                             "start": self.stop_ids[0] if self.stop_ids else None, "chat": bool(chats)})

    def page_ids(self, fields: Fields) -> list[int]:
        """The prompt of a request of the page; an empty text is the beginning of a document."""
        return self.prompt_ids(fields.take("prompt", str, list) or self.stop_ids)

    async def next_token(self, request: Request) -> JSONResponse:
        """The likeliest next tokens, and what temperature and cuts make of them."""
        fields = await self.fields(request)
        ids, how = self.page_ids(fields), fields.sampling()
        fields.end()

        def logits_after():                                # (1, V)
            return self.model.head(self.model.hidden(torch.tensor([ids], device=self.device))[:, -1])
        logits = await asyncio.wrap_future(self.engine.between_steps(logits_after))
        return JSONResponse(likeliest(logits, how, 24, self.tokenizer, self.engine.vocab_limit))

    async def attention_map(self, request: Request) -> JSONResponse:
        """For every token of a prompt, how much one head of one layer looks at it and at each before it."""
        fields, c = await self.fields(request), self.model.config
        ids, layer = self.page_ids(fields), fields.whole("layer", 0, 0, c.n_layers - 1)
        head = fields.whole("head", 0, 0, c.n_heads - 1)
        fields.end()
        weights = await asyncio.wrap_future(self.engine.between_steps(attention_weights, self.model, ids, layer, head))
        rows = [[round(w, 4) for w in row[:i + 1]] for i, row in enumerate(weights.tolist())]
        return JSONResponse({"tokens": [token_text(self.tokenizer, i) for i in ids], "weights": rows})

    async def tokens(self, request: Request) -> JSONResponse:
        """How the tokenizer cuts a text: its tokens, and the merges by which its words come about."""
        fields = await self.fields(request)
        text = fields.take("text", str, default="")
        fields.end()
        try:
            return JSONResponse(await asyncio.to_thread(cuts_of, self.tokenizer, text[:20_000]))
        except ValueError as error:
            raise ApiError(400, f"the text cannot be encoded: {error}", "text") from None

    async def runs(self, request: Request) -> JSONResponse:
        """The loss curves of this run and of those beside it."""
        return JSONResponse({"runs": await asyncio.to_thread(curves_beside, self.folder.resolve())})

    # the application

    def check_access(self, request: Request) -> None:
        """Raise ApiError when the server is ending, or for /v1 and /api without the password there is."""
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if (self.config.api_key and request.url.path.startswith(("/v1", "/api"))
                and not hmac.compare_digest(given, self.config.api_key.encode())):
            raise ApiError(401, "this server wants its api_key as Authorization: Bearer …", None, "invalid_api_key")

    def guarded(self, handler):
        """The handler, with errors told in OpenAI's form, and the request counted."""
        async def endpoint(request: Request):
            try:
                self.check_access(request)
                response = await handler(request)
            except ApiError as error:
                response = error.response()
            self.requests[request.scope["route"].path, response.status_code] += 1
            return response
        return endpoint

    def application(self) -> Starlette:
        """All addresses."""
        get = {"/": self.page, "/health": self.health, "/metrics": self.metrics, "/v1/models": self.models,
               "/v1/models/{name}": self.models, "/api/model": self.about, "/api/runs": self.runs}
        post = {"/v1/completions": self.completions, "/v1/chat/completions": self.chat_completions,
                "/api/next": self.next_token, "/api/attention": self.attention_map, "/api/tokens": self.tokens}

        async def no_address(request, error):
            return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

        async def failed(request, error):                  # its traceback goes to standard error
            return ApiError(500, f"{type(error).__name__}: {error}").response()
        return Starlette(routes=[Route(path, self.guarded(handler), methods=[method])
                                 for method, handlers in (("GET", get), ("POST", post))
                                 for path, handler in handlers.items()],
                         exception_handlers={HTTPException: no_address, Exception: failed})

    async def serve(self, listener: socket.socket) -> None:
        """Answer until SIGTERM or Ctrl-C; then take nothing new, and give what is being written END_SECONDS."""
        self.loop = asyncio.get_running_loop()
        http = uvicorn.Server(uvicorn.Config(self.application(), log_level="error", access_log=False, lifespan="off",
                                             timeout_graceful_shutdown=END_SECONDS + 1))
        http.capture_signals = contextlib.nullcontext      # its handlers would take the place of those below

        def end():
            if self.draining:                              # the second time: at once
                self.engine.stop()
            self.draining = http.should_exit = True
            self.loop.call_later(END_SECONDS, self.engine.stop)
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: self.loop.call_soon_threadsafe(end))
        self.engine.thread.start()
        await http.serve([listener])
        self.engine.stop()
        self.engine.thread.join(1)


USAGE = "usage: python serve.py OUT_DIR [--port=8000] [--key=value …]"


def main(argv: list[str]) -> None:
    """Load the model, open the port, serve; a mistake exits with status 2 before the port is open."""
    _, files, config, _ = command_line(ServeConfig, argv, USAGE)
    if len(files) != 1:
        fail(f"give one folder of a training run. {USAGE}")
    # Threads that wait for a core which HTTP has taken would hold up every product.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    keep_freed_memory()
    try:
        server = Server(files[0], config)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    try:
        listener = socket.create_server((config.host, config.port), backlog=2048)
    except OSError as error:
        fail(f"{config.host}:{config.port}: {error.strerror}; give another --host or --port")
    if config.host not in ("127.0.0.1", "localhost") and not config.api_key:
        print(f"warning: host={config.host} and no --api_key: whoever reaches this machine may use it", file=sys.stderr)
    blocks = server.engine.blocks
    print(f"{server.name}: {server.n_parameters:,} parameters on {server.device}; {config.max_batch} texts at once, "
          f"a cache of {blocks.n_blocks} blocks of {blocks.size} tokens")
    if server.model.token_embeddings.weight.dtype != torch.float32:
        print("note: rounded to 16 bits, a text may differ from the one written alone; --dtype=float32 prevents it")
    print(f"ready at http://{config.host}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    asyncio.run(server.serve(listener))


if __name__ == "__main__":
    main(sys.argv[1:])
