"""OpenAI's protocol: what a request may say, and what an answer looks like. serve.py has the addresses.

A request is JSON. Each field is taken by its name and checked, and what nobody took is refused: a setting that is
silently ignored is another experiment. An answer is one JSON object when all is written, or events as it is written:

    POST /v1/completions {"prompt": "ROMEO:", "max_tokens": 2, "logprobs": 1}
    {"object": "text_completion", "model": "shakespeare",
     "choices": [{"index": 0, "text": "\\nThe", "finish_reason": "length",
                  "logprobs": {"tokens": ["\\n", "The"], "token_logprobs": [-0.02, -3.1], "text_offset": [0, 1],
                               "top_logprobs": [{"\\n": -0.02}, {"I": -2.4}]}}],
     "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}

    with "stream": true      data: {"choices": [{"index": 0, "text": "\\n", "finish_reason": null}]}
                             data: {"choices": [{"index": 0, "text": "The", "finish_reason": "length"}]}
                             data: [DONE]

    an error                 {"error": {"message": "temperature=-1.0 must be …", "type": "invalid_request_error",
                                        "param": "temperature", "code": null}}

/v1/chat/completions takes messages for a prompt and gives a message or a delta for text.
"""
import asyncio
import json
import time
import uuid

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from batching import Row
from decoding import check_sampling
from lens import token_text

MAX_BODY_BYTES = 2 ** 20             # of a request; more is 413
BODY_SECONDS = 30                    # for a request to arrive
MAX_STOPS, MAX_STOP_CHARS = 16, 1000


# --- what a request says ---

class ApiError(Exception):
    """An answer with a status of 400 or more, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        message, param = (text and text.encode("utf-8", "replace").decode() for text in (message, param))
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.status, self.headers = status, {"Retry-After": "1"} if status in (429, 503) else {}
        self.content = {"error": {"message": message, "type": kind if status < 500 else "server_error", "param": param,
                                  "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


async def read_json(request: Request) -> dict:
    """The JSON object that a request carries. Raises ApiError: too large, too slow, not JSON."""
    size, body = 0, b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:                 # the rest is read too: a client that still sends is deaf
                    body += part
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} s") from None
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"the request has more than {MAX_BODY_BYTES:,} bytes")
    try:
        body = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON: {str(error)[:100]}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the request must be a JSON object, not {type(body).__name__}")
    return body


class Fields:
    """The fields of a request. Each is taken by its name and checked; null is as if it were not there."""

    # What has no effect here, and may come with a value that asks for none: 0, false, empty.
    NEUTRAL = ("presence_penalty", "frequency_penalty", "logit_bias", "suffix", "tools", "store")

    def __init__(self, body: dict):
        self.body = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, *kinds, default=None):
        """The value of a field, which must be of these types; True is no number."""
        value = self.body.pop(name, default)
        if value is not default and type(value) not in kinds:
            names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "a list",
                     dict: "an object"}
            allowed = " or ".join(names[kind] for kind in kinds)
            raise ApiError(400, f"{name} must be {allowed}, not {type(value).__name__}", name)
        return value

    def whole(self, name: str, default: int | None, low: int, high: int):
        """A whole number low … high."""
        value = self.take(name, int, default=default)
        if value is not None and not low <= value <= high:
            raise ApiError(400, f"{name}={value} must be {low} … {high}", name)
        return value

    def sampling(self) -> tuple:
        """(temperature, top_k, top_p, min_p), checked."""
        how = {"temperature": self.take("temperature", float, int, default=1.0),
               "top_k": self.whole("top_k", None, 1, 2 ** 31),
               "top_p": self.take("top_p", float, int), "min_p": self.take("min_p", float, int)}
        for name, value in how.items():
            try:
                check_sampling(**{name: value})
                float(value or 0)                          # a whole number of 400 digits is none
            except (ValueError, OverflowError) as error:
                raise ApiError(400, str(error), name) from None
        return tuple(how.values())

    def stops(self) -> list[str]:
        stops = self.take("stop", str, list, default=[])
        stops = [stops] if isinstance(stops, str) else stops
        if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_CHARS for s in stops):
            raise ApiError(400, f"stop takes {MAX_STOPS} strings of 1 … {MAX_STOP_CHARS:,} characters at most", "stop")
        return stops

    def end(self) -> None:
        """Refuse what nobody took."""
        for name, value in self.body.items():
            if name != "user" and (value or name not in self.NEUTRAL):           # user: for records, which are not kept
                raise ApiError(400, f"{name} is not supported here; leave it out", name)


def turns_of(messages) -> list[str]:
    """What was said, user and assistant in turns, the last one the user's; a system message goes before the first."""
    turns, system = [], ""
    for message in messages or [None]:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list):                      # of parts, of which text is the one kind that is understood
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str):
            raise ApiError(400, "messages must be a list of {role, content}, the contents text", "messages")
        if role in ("system", "developer") and not turns:
            system += content + "\n\n"
        elif role == ("user", "assistant")[len(turns) % 2]:
            turns.append(content if turns else system + content)
        else:
            raise ApiError(400, f"a message of role {role!r} at this place: system first, then user and assistant in "
                           "turns", "messages")
    if len(turns) % 2 == 0:
        raise ApiError(400, "the last message must be the user's", "messages")
    return turns


# --- what an answer looks like ---

def completion_logprobs(entries: list[dict], tokenizer) -> dict:
    """Entries of lens.describe in the form of /v1/completions; the first token of an echo has no probability.

    `details` is ours: id, rank, entropy, and the alternatives with their ids.
    """
    tops = [[{"id": token, "token": token_text(tokenizer, token), "logprob": p} for token, p in entry.get("top", ())]
            for entry in entries]
    return {"tokens": [token_text(tokenizer, entry["token"]) for entry in entries],
            "token_logprobs": [entry.get("logprob") for entry in entries],
            "top_logprobs": [{one["token"]: one["logprob"] for one in top} or None for top in tops],
            "text_offset": [entry["offset"] for entry in entries],
            "details": [{"id": entry["token"], "rank": entry.get("rank"), "entropy": entry.get("entropy"), "top": top}
                        for entry, top in zip(entries, tops)]}


def chat_logprobs(entries: list[dict], tokenizer) -> dict:
    """The same in the form of /v1/chat/completions."""
    def one(token, p):
        return {"token": token_text(tokenizer, token), "logprob": p, "bytes": list(tokenizer.vocab.get(token, b""))}
    return {"content": [one(entry["token"], entry["logprob"]) | {"top_logprobs": [one(*top) for top in entry["top"]]}
                        for entry in entries]}


class Answer:
    """The answer to one request, an ASGI application: its rows, and how what they have come to is told.

    n: rows of one prompt. usage, logprobs: whether the client wants them.
    """
    status_code = 200

    def __init__(self, server, rows: list[Row], *, chat: bool, n: int, stream: bool, usage: bool, logprobs: bool):
        self.server, self.rows, self.chat, self.n, self.stream, self.usage = server, rows, chat, n, stream, usage
        self.logprobs, self.event = logprobs, asyncio.Event()
        self.shown = [(0, 0) for _ in rows]                # characters and tokens of each row that were told
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                     "object": f"{kind}.chunk" if chat and stream else kind, "model": server.name}
        for row in rows:
            row.wake = self.event
            server.engine.inbox.put(row)

    async def __call__(self, scope, receive, send):
        async def until_gone():
            while (await receive())["type"] != "http.disconnect":
                pass
            self.leave()
        gone = asyncio.ensure_future(until_gone())
        try:
            await (self.send_stream(send) if self.stream else self.send_whole(scope, receive, send))
        finally:                                           # also when the end of the server cancels this
            gone.cancel()
            self.leave()

    def leave(self) -> None:
        """Nobody listens any more: the engine gives the rows' blocks back before its next step."""
        for row in self.rows:
            row.cancelled = True

    def choice(self, place: int):
        """What there is to tell of a row since the last time, or None."""
        row, (chars, told) = self.rows[place], self.shown[place]
        finish, text = row.finish, row.text.text           # in this order: the engine sets finish last
        if finish == "error":
            raise ApiError(503 if self.server.draining else 500, row.error)
        if not (finish or row.began):                      # an echo waits until the prompt has been read, and scored
            return None
        # Of tokens whose text is shown: what may still become a stop string is held back.
        entries = [entry for entry in row.entries[told:] if entry["offset"] < len(text)] if self.logprobs else []
        self.shown[place], text = (len(text), told + len(entries)), text[chars:]
        if not (text or entries or finish):
            return None
        logprobs = (chat_logprobs if self.chat else completion_logprobs)(entries, self.server.tokenizer)
        choice = {"index": place, "logprobs": logprobs if self.logprobs else None, "finish_reason": finish}
        if not self.chat:
            return choice | {"text": text}
        role = {} if chars or told else {"role": "assistant"}                    # said once
        return choice | {"delta" if self.stream else "message": role | {"content": text}}

    def count(self) -> dict:
        """Tokens read and written; a prompt counts once however many answers it gets."""
        read = sum(row.n_prompt for row in self.rows[::self.n])
        written = sum(len(row.ids) - row.n_prompt for row in self.rows)
        return {"usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}}

    async def send_whole(self, scope, receive, send) -> None:
        """One JSON object when all rows have ended."""
        while not all(row.finish for row in self.rows):
            await self.event.wait()
            self.event.clear()
        try:
            choices = [self.choice(place) for place in range(len(self.rows))]
            response = JSONResponse(self.head | {"choices": choices} | self.count())
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def send_stream(self, send) -> None:
        """Server-sent events, one for each row that has got on."""
        async def tell(events, last=False):
            data = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
            data += "data: [DONE]\n\n" if last else ""
            await send({"type": "http.response.body", "body": data.encode(), "more_body": not last})
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        unfinished = range(len(self.rows))
        try:
            while unfinished:
                await self.event.wait()
                self.event.clear()
                choices = [choice for choice in map(self.choice, unfinished) if choice is not None]
                await tell(self.head | {"choices": [choice]} for choice in choices)
                ended = {choice["index"] for choice in choices if choice["finish_reason"]}
                unfinished = [place for place in unfinished if place not in ended]
            await tell([self.head | {"choices": []} | self.count()] if self.usage else [], last=True)
        except ApiError as error:
            await tell([error.content], last=True)
