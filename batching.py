"""Continuous batching: many texts written by one model at once, each as if it were alone. serve.py speaks HTTP above.

A step of the model reads all weights once, whether for one row or for thirty-two, so a server fills its rows. Texts
join and leave between any two steps (Orca, Yu 2022), and a prompt is read in pieces, so that a long one does not hold
up the others (Sarathi, 2308.16369):

    step        1          2          3          4          5
    row 0    [read 64]  [read 9]    write      write      write           [read n]: n tokens of the prompt in one pass
    row 1     write      write     <end>      [read 5]    write           another text takes the row that is free
    row 2     write      write      write      write     <end>

The cache is cut into blocks of 16 positions, and each row has a table of the blocks it uses, as a process has of pages
(PagedAttention, 2309.06180). Rows that begin alike point to the same full blocks; a block is known by the hash of all
ids up to its end:

    "First Citizen: Before we proceed"      row 0   table [4, 7, 2]            blocks  1 2 3 4 5 6 7 8
    "First Citizen: Before we speak"        row 1   table [4, 7, 5]            users   0 1 0 2 1 0 2 0

A block without users keeps what it holds until it is needed; the one that was left first goes first. When none is left,
the youngest row gives its blocks back, returns to the queue, and later its text is read anew (preemption by
recomputation). The oldest row is never sent back, so there is always one that gets on.

Each row draws from decoding.distribution by a generator of its own: its text is the one that decoding.generate gives
for this prompt and seed alone. A larger batch may be rounded otherwise in the last digit, so a token can differ where
two are that close: none did in float32 (the seventh digit), in bfloat16 (the third) texts do. One thread does all this,
`Engine.run`; others hand it rows through a queue and read what a row has come to, without a lock.
"""
import hashlib
import queue
import secrets
import threading
import time
from array import array
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future

import torch

import onetoken
from decoding import LookupDraft, ModelDraft, Text, distribution, pick
from lens import describe, feed


# --- blocks ---

class Blocks:
    """Who uses which block of the cache, and what the full ones hold. No tensors: only numbers of blocks, 1 … n.

    Block 0 is nobody's: what padding writes goes there.
    """

    def __init__(self, n_blocks: int, size: int):
        self.n_blocks, self.size = n_blocks, size
        self.users = [0] * (n_blocks + 1)
        self.free = OrderedDict.fromkeys(range(1, n_blocks + 1))     # in the order in which they were left
        self.by_key, self.key_of = {}, {}                            # what is in a block <-> the block

    def take(self) -> int:
        """A free block for new contents; what it held is forgotten."""
        block, _ = self.free.popitem(last=False)
        self.by_key.pop(self.key_of.pop(block, None), None)
        self.users[block] = 1
        return block

    def share(self, key: bytes) -> int:
        """The block with these contents, which gets one more user."""
        block = self.by_key[key]
        self.users[block] += 1
        self.free.pop(block, None)
        return block

    def give_back(self, table: list[int]) -> None:
        """One user less of each; the last one first, since beginnings are what others may want."""
        for block in reversed(table):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free[block] = None

    def remember(self, block: int, key: bytes) -> None:
        """The block is full and will not change. Of two with the same contents the first is found by others."""
        if key not in self.by_key:
            self.by_key[key], self.key_of[block] = block, key


def next_key(keys: list[bytes], ids: list[int]) -> bytes:
    """What a block of these ids is known by after blocks with these keys: equal keys, equal texts from the start on."""
    return hashlib.sha256(b"".join(keys[-1:]) + array("I", ids).tobytes()).digest()


class PagedCache:
    """Keys and values in blocks; to the model it looks like attention.KVCache, for the rows of one pass at a time.

    pool: for each layer (slots, K, D + D), a key and its value side by side, so that they are written and collected
    together; with shift_keys the key before shifting follows. Slot s of block b is b * size + s. MLA's latent and
    rotary key take the places of the two, as in KVCache.
    """

    def __init__(self, model, n_blocks: int, size: int):
        c, weight = model.config, model.token_embeddings.weight
        self.heads, self.key_width, self.width = c.n_kv_heads, c.head_dim, 2 * c.head_dim
        if c.attention == "mla":
            self.heads, self.key_width, self.width = 1, c.kv_lora_rank, c.kv_lora_rank + c.rope_head_dim
        # Zeros, not empty memory: a slot not yet filled is masked out, but 0 times NaN would be NaN.
        raw_width = c.head_dim * c.shift_keys
        self.pool = [torch.zeros((n_blocks + 1) * size, self.heads, self.width + raw_width, device=weight.device,
                                 dtype=weight.dtype) for _ in range(c.n_layers)]
        self.size, self.device, self.smear, self.max_length = size, weight.device, c.smear, c.context_length
        # As onetoken.py wants them, (rows, K, slots, D): every row sees all slots, which expand says by a stride of 0.
        self.keys, self.values, self.raw = zip(*(pool.transpose(0, 1).expand(2, -1, -1, -1).tensor_split(
            (self.key_width, self.width), dim=-1) for pool in self.pool))

    def turn_to(self, rows: list, counts: list[int]) -> None:
        """The next pass reads counts[i] tokens of rows[i], padded to the largest count."""
        T, size, pasts = max(counts), self.size, [row.cached for row in rows]
        end, n_blocks = max(pasts) + T, -(-(max(pasts) + T) // size)
        slots = [row.table[p // size] * size + p % size if p < past + n else 0
                 for row, past, n in zip(rows, pasts, counts) for p in range(past, past + T)]
        tables = [row.table[:n_blocks] + [0] * (n_blocks - len(row.table)) for row in rows]
        self.rows, self.batch_size = [pasts], len(rows)
        self.slots = torch.tensor(slots, device=self.device)                     # (B T,)
        self.tables = torch.tensor(tables, device=self.device).flatten()         # (B blocks,)
        before = [row.table[(past - 1) // size] * size + (past - 1) % size if past else -1
                  for row, past in zip(rows, pasts)]
        self.before = torch.tensor(before, device=self.device)                   # (B,), the slot before; -1: none
        if self.smear:                                     # a model with smear looks at the id before the first one
            before = [past - 1 for past in pasts]          # -1: the last slot, which is not looked at
            self.ids = torch.zeros(len(rows), end, dtype=torch.long, device=self.device)
            self.ids[range(len(rows)), before] = torch.tensor([row.ids[i] for row, i in zip(rows, before)],
                                                              device=self.device)

    def read_on(self, in_c, rows: list, n: int):
        """Logits (B, n, V) of each row's next n tokens, by onetoken.c, which finds the blocks where they lie."""
        self.turn_to(rows, [n] * len(rows))
        slots = self.tables.view(len(rows), -1, 1) * self.size + torch.arange(self.size)
        return in_c([row.ids[row.cached:row.cached + n] for row in rows], self.rows[0], self, self.keys, self.values,
                    slots.flatten(1).int())

    def key_before(self, layer: int, k, plan):
        """As KVCache's."""
        raw = self.pool[layer][..., self.width:]
        last = raw[self.before] * (self.before >= 0)[:, None, None]              # (B, K, D)
        raw.index_copy_(0, self.slots, k.reshape(-1, *k.shape[2:]))
        return last[:, None]

    def append(self, layer: int, k, v, plan, window: int | None):
        """Store k and v (B, K, T, D); return those that this layer reads, (B, K, S, D) each."""
        pool, kv = self.pool[layer], torch.cat((k, v), dim=-1).transpose(1, 2).reshape(-1, self.heads, self.width)
        pool[..., :self.width].index_copy_(0, self.slots, kv)
        if plan.fresh:                                     # what was just computed, in its own dtype
            return k, v
        # Copied block by block, in pieces of kilobytes: at the default model's size a tenth of a step.
        kv = pool.view(-1, self.size * self.heads * pool.shape[-1]).index_select(0, self.tables)
        kv = kv.view(self.batch_size, -1, *pool.shape[1:])[:, plan.first[window]:plan.end].transpose(1, 2)
        return kv[..., :self.key_width], kv[..., self.key_width:self.width]


# --- one text ---

class Row:
    """One text on its way: what it wants, how far it has come. Made by anyone, then the engine's until it has ended.

    ids: the prompt. how: (temperature, top_k, top_p, min_p). n_top: none, or so many alternatives with each token's log
    probability. echo: text and entries begin with the prompt's own. streams: each token is told when it comes.
    Whoever waits reads `finish` (none, stop, length, cancelled, error), `text`, `entries`, and may set `cancelled`.
    """

    def __init__(self, ids: list[int], max_new: int, tokenizer, *, how=(1.0, None, None, None), seed: int | None = None,
                 stops=(), stop_ids=(), n_top: int | None = None, echo: bool = False, streams: bool = False,
                 device="cpu"):
        self.ids, self.n_prompt, self.max_new, self.how = list(ids), len(ids), max_new, how
        self.stop_ids, self.n_top, self.streams = set(stop_ids), n_top, streams
        self.generator = torch.Generator(device).manual_seed(secrets.randbits(62) if seed is None else seed)
        self.text, self.entries, self.score = Text(tokenizer, stops), [], echo and n_top is not None
        if echo:                                           # read apart: a stop string in the prompt ends nothing
            prompt = Text(tokenizer)
            self.entries = [{"token": token, "offset": feed(prompt, token)} for token in ids]
            prompt.feed(None)
            self.text.text = prompt.text
        self.finish, self.error, self.cancelled, self.drafter = None, None, False, None
        self.arrived, self.began, self.shared_tokens = time.perf_counter(), None, 0
        self.table, self.cached, self.keys = [], 0, []     # blocks, tokens in them, keys of the full ones

    @property
    def left(self) -> int:
        """Tokens that the model has not read yet: 1 while writing."""
        return len(self.ids) - self.cached


def draw(logits, rows: list, vocab_limit: int) -> list[int]:
    """The next id of each row, from logits (B, V): as decoding.pick draws it, but each row by its own generator."""
    groups, drawn = {}, {}
    for place, row in enumerate(rows):
        groups.setdefault(row.how, []).append(place)
    for (temperature, top_k, top_p, min_p), places in groups.items():
        if temperature == 0:
            ids = pick(logits[places], None, 0, vocab_limit)
        else:
            p = distribution(logits[places], temperature, top_k, top_p, min_p, vocab_limit)
            # What torch.multinomial does for one draw, the largest p / Exp(1), with another generator for each row.
            noise = torch.empty_like(p)
            for row_noise, place in zip(noise.unbind(), places):
                row_noise.exponential_(1, generator=rows[place].generator)
            ids = (p / noise).argmax(dim=-1).tolist()
        drawn.update(zip(places, ids))
    return [drawn[place] for place in range(len(rows))]


# --- the engine ---

class Engine:
    """The scheduler: which rows read what in the next step, and what comes of it.

    n_blocks: none = what half of max_batch texts of the whole context need. budget: prompts' tokens read in one step.
    draft: none, "ngram" or a smaller Transformer, with k guesses a step while a row is alone. notify: called on the
    engine's thread with the rows that have something to tell, once a step. counts: what /metrics shows.
    """

    def __init__(self, model, tokenizer, notify, *, max_batch: int = 16, n_blocks: int | None = None,
                 block_size: int = 16, budget: int = 64, draft=None, k: int = 4):
        context = model.config.context_length
        n_blocks = n_blocks or -(-max_batch // 2) * -(-context // block_size)
        self.model, self.vocab_limit = model, min(tokenizer.vocab_size, model.config.vocab_size)
        self.blocks, self.cache = Blocks(n_blocks, block_size), PagedCache(model, n_blocks, block_size)
        self.in_c = onetoken.prepare(model, context)
        self.limit = min(context, n_blocks * block_size)   # tokens of a text, prompt and all
        self.max_batch, self.budget, self.draft, self.k, self.notify = max_batch, budget, draft, k, notify
        self.inbox, self.waiting, self.running = queue.SimpleQueue(), deque(), []      # both lists: oldest first
        self.counts, self.told, self.stopped = Counter(), [], False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # What other threads may call, besides inbox.put(row).

    def between_steps(self, function, *arguments) -> Future:
        """Call a function on the engine's thread between two steps: the model is never run by two threads."""
        future = Future()
        self.inbox.put((function, arguments, future))
        return future

    def n_open(self) -> int:
        """Rows that have not ended."""
        return self.inbox.qsize() + len(self.waiting) + len(self.running)

    def stop(self) -> None:
        """End after this step; rows that have not ended are told so."""
        self.stopped = True
        self.between_steps(lambda: None)                   # wakes it

    # The engine's thread.

    @torch.inference_mode()
    def run(self) -> None:
        """Step after step; asleep while there is nothing to do."""
        while not self.stopped:
            self.receive()
            try:
                self.step()
            except Exception as error:                     # of this step's rows; the server lives on
                for row in list(self.running) or list(self.waiting)[:1]:
                    self.end(row, "error", f"{type(error).__name__}: {error}")
            self.tell()
        self.receive()
        for row in [*self.running, *self.waiting]:
            self.end(row, "error", "the server is shutting down")
        self.tell()

    def receive(self) -> None:
        """Take in what others sent; wait for it when there is nothing else to do."""
        while True:
            try:
                item = self.inbox.get(block=not (self.running or self.waiting or self.stopped))
            except queue.Empty:
                return
            if isinstance(item, Row):
                self.waiting.append(item)
                continue
            function, arguments, future = item
            if future.set_running_or_notify_cancel():      # False: who asked has gone
                try:
                    future.set_result(function(*arguments))
                except Exception as error:
                    future.set_exception(error)

    def step(self) -> None:
        """Every row that writes gets a token, those that read get on by a piece."""
        for row in [row for row in (*self.running, *self.waiting) if row.cancelled]:
            self.end(row, "cancelled")
        self.admit()
        if self.draft is not None and len(self.running) == 1 and self.running[0].left == 1 and self.running[0].max_new:
            self.guess(self.running[0])
        else:
            pieces = self.plan()
            writing, reading = [row for row in pieces if row.left == 1], [row for row in pieces if row.left > 1]
            if writing:                                    # two passes: padding those that write would cost more
                self.write(writing)
            if reading:
                self.forward(reading, [pieces[row] for row in reading])

    def admit(self) -> None:
        """Rows from the queue join while there is a place in the batch, and blocks for the text they have."""
        size, blocks = self.blocks.size, self.blocks
        while self.waiting and len(self.running) < self.max_batch:
            row, keys = self.waiting[0], []
            # The last token is always read: its logits are what comes next. Scoring a prompt needs all of them.
            last = 0 if row.score else (len(row.ids) - 1) // size * size
            for start in range(0, last, size):
                key = next_key(keys, row.ids[start:start + size])
                if key not in blocks.by_key:
                    break
                keys.append(key)
            missing = -(-len(row.ids) // size) - len(keys) + bool(self.running)      # one to grow, or it goes at once
            if len(blocks.free) - sum(blocks.by_key[key] in blocks.free for key in keys) < missing:
                return
            row.table, row.keys, row.cached = [blocks.share(key) for key in keys], keys, len(keys) * size
            if row.began is None:
                row.shared_tokens = row.cached
            self.running.append(self.waiting.popleft())

    def plan(self) -> dict[Row, int]:
        """How many tokens each row reads now, with blocks to write them to; the oldest row is served first."""
        reading = [row for row in self.running if row.left > 1]
        share = self.budget // max(1, len(reading)) or 1   # all get on alike: a short prompt overtakes a long one
        room = self.model.config.context_length - max((row.cached for row in reading), default=0)
        pieces = {}
        for row in list(self.running):
            n = min(row.left, share, room) if row.left > 1 else 1
            if row in self.running and self.provide(row, n):
                pieces[row] = n
        return pieces

    def provide(self, row: Row, n: int) -> bool:
        """Blocks for n more tokens of a row, if need be those of younger rows; False if it had to give up its own."""
        missing = -(-(row.cached + n) // self.blocks.size) - len(row.table)
        while len(self.blocks.free) < missing:
            youngest = self.running.pop()
            self.release(youngest)
            self.waiting.appendleft(youngest)
            self.counts["preemptions"] += 1
            if youngest is row:
                return False
        row.table += [self.blocks.take() for _ in range(missing)]
        return True

    def release(self, row: Row) -> None:
        """Nothing of the row is in the cache any more."""
        self.blocks.give_back(row.table)
        row.table, row.cached, row.keys = [], 0, []

    def write(self, rows: list[Row]) -> None:
        """One pass for rows that have one token left to read, by onetoken.c where it can."""
        if self.in_c is None or len(rows) > onetoken.MAX_ROWS or not all(row.max_new for row in rows):
            self.forward(rows, [1] * len(rows))
            return
        logits = self.cache.read_on(self.in_c, rows, 1)[:, 0]
        for row in rows:
            self.advance(row, 1)
            row.drafter = None                             # what its cache holds is not this text any more
        self.accept(rows, logits)

    def read(self, rows: list[Row], counts: list[int]):
        """The residual stream (B, T, C) of the next counts[i] ids of each row, which are in the cache from then on."""
        self.cache.turn_to(rows, counts)
        T = max(counts)
        tokens = [row.ids[row.cached:row.cached + n] + [0] * (T - n) for row, n in zip(rows, counts)]
        return self.model.hidden(torch.tensor(tokens, device=self.cache.device), self.cache)

    def forward(self, rows: list[Row], counts: list[int]) -> None:
        """One pass of the model; rows that have read all they have get their next token."""
        hidden, ready = self.read(rows, counts), []
        for place, (row, n) in enumerate(zip(rows, counts)):
            targets = row.ids[row.cached + 1:min(row.cached + n + 1, row.n_prompt)] if row.score else []
            if targets:
                logits = self.model.head(hidden[place, :len(targets)])
                scores = describe(logits, targets, row.n_top, self.vocab_limit)
                for entry, score in zip(row.entries[row.cached + 1:], scores):
                    entry.update(score)
            self.advance(row, n)
            row.drafter = None                             # what its cache holds is not this text any more
            if row.left == 0 and row.max_new == 0:         # only the prompt was to be read
                self.end(row, "length")
            elif row.left == 0:
                ready.append((place, n - 1))
        if ready:
            # The head is the largest matrix of a small model: only last tokens go through it.
            last = hidden[:, 0] if len(ready) == len(rows) == sum(counts) else hidden[tuple(zip(*ready))]
            self.accept([rows[place] for place, _ in ready], self.model.head(last))

    def advance(self, row: Row, n: int) -> None:
        """n more tokens of a row are in the cache; blocks that are full from now on may be shared."""
        row.cached += n
        size = self.blocks.size
        for i in range(len(row.keys), row.cached // size):
            row.keys.append(next_key(row.keys, row.ids[i * size:(i + 1) * size]))
            self.blocks.remember(row.table[i], row.keys[i])

    def accept(self, rows: list[Row], logits) -> None:
        """Draw the next token of each row, (B, V) logits, and see which rows end with it."""
        ids, n_tops = draw(logits, rows, self.vocab_limit), [row.n_top for row in rows if row.n_top is not None]
        entries = describe(logits, ids, max(n_tops), self.vocab_limit) if n_tops else [{}] * len(rows)
        for row, token, entry in zip(rows, ids, entries):
            row.ids.append(token)
            if row.began is None:
                row.began = time.perf_counter()
                self.counts.update(prompt_tokens=row.n_prompt, first_tokens=1,
                                   first_token_seconds=row.began - row.arrived)
            self.counts["generated_tokens"] += 1
            ends = token in row.stop_ids
            if not ends:
                offset = feed(row.text, token)
                ends = row.text.ended
                if row.n_top is not None:
                    row.entries.append(entry | {"offset": offset, "top": entry["top"][:row.n_top]})
            if ends or len(row.ids) - row.n_prompt == row.max_new:
                self.end(row, "stop" if ends else "length")
            elif row.streams:
                self.told.append(row)

    def end(self, row: Row, finish: str, error: str | None = None) -> None:
        """The row leaves; its blocks are free at once."""
        self.release(row)
        (self.running if row in self.running else self.waiting).remove(row)
        if row.began is not None:
            self.counts.update(token_seconds=time.perf_counter() - row.began, tokens=len(row.ids) - row.n_prompt - 1)
        row.text.feed(None)
        row.error, row.drafter = error, None
        row.finish = finish                                # last: whoever sees it may read the rest
        self.told.append(row)

    def tell(self) -> None:
        """Wake those who wait for what this step brought."""
        if self.told:
            self.notify(self.told)
            if any(row.streams for row in self.told):
                time.sleep(1e-4)                           # whoever sends the pieces gets a turn before the next step
            self.told = []

    def guess(self, row: Row) -> None:
        """Let the draft guess k tokens, read them all in one pass, keep those that the row would have drawn.

        Unlike decoding.speculate this draws as without a draft: the text of a seed stays what it is, sampled too.
        """
        if row.drafter is None:
            row.drafter = LookupDraft(self.model) if self.draft == "ngram" else ModelDraft(self.draft, self.limit)
        k = min(self.k, row.n_prompt + row.max_new - len(row.ids) - 1)
        how = dict(temperature=0, vocab_limit=self.vocab_limit)
        guesses = row.drafter.propose(row.ids, k, how, None)[0] if k > 0 else []
        self.provide(row, 1 + len(guesses))                # the only row, and within the limit: there is always room
        row.ids += guesses
        n = 1 + len(guesses)
        in_c = self.in_c is not None
        logits = self.cache.read_on(self.in_c, [row], n) if in_c else self.model.head(self.read([row], [n]))
        del row.ids[len(row.ids) - len(guesses):]
        for place in range(n):
            self.advance(row, 1)
            self.accept([row], logits[:, place])
            if row.finish or place == len(guesses) or row.ids[-1] != guesses[place]:
                break
            self.counts["guessed_tokens"] += 1
