"""The kernels' stages of `python bench.py gpu`: how fast, beside torch's, and by which tiles.

A kernel is bound by one of two roofs, both measured on the card: the copy's bandwidth, for those that do a few FLOPs a
number, and a large product's FLOP/s, for attention. A share of the roof says more than milliseconds do:

    FLOP/s  ^          ______________  product: attention, linear + cross entropy
            |        /
            |      /  <- copy: RMSNorm, SwiGLU, RoPE, cross entropy
            |    /
            +----------------------->  FLOPs a byte (roofline, Williams 2009)

Times are triton.testing.do_bench's medians, with the L2 cache emptied before each run; inputs are random and in
bfloat16, made once. FLOPs of causal attention are counted as in FlashAttention-2 (2307.08691, section 4.1).
"""
import os
import socket
import sys

import torch

import bench_systems
import fsdp
import parallel
from bench_gpu import TOY, Sheet, free, seconds_of
from model import ModelConfig, Transformer
from optim import AdamW


# --- roofs and times ---

def roofs(sheet: Sheet) -> tuple[float, float]:
    """(bytes/s of a copy, reads and writes counted; FLOP/s of a large product in bfloat16), measured here."""
    n, size = sheet.size["copy_bytes"], sheet.size["product"]
    source = torch.ones(n, dtype=torch.uint8, device=sheet.device)
    target = torch.empty_like(source)
    copy = 2 * n / min(seconds_of(lambda: target.copy_(source), sheet.device, 10) for _ in range(3))
    a, b = (torch.randn(size, size, device=sheet.device).bfloat16() for _ in range(2))
    torch.mm(a, b)                                                   # the first one loads the library
    product = 2 * size ** 3 / min(seconds_of(lambda: torch.mm(a, b), sheet.device, 10) for _ in range(3))
    sheet(f"roofs: copy {copy / 1e9:,.0f} GB/s, product of {size} in bfloat16 {product / 1e12:,.1f} TFLOP/s", "")
    sheet.figure("roofs", copy=copy, product=product)
    return copy, product


def both_ways(function, inputs):
    """(a forward pass, a forward and backward pass), to be timed: inputs and upstream gradients are made once."""
    trained = [x for x in inputs if x.requires_grad]
    with torch.no_grad():
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(y) for y in outputs]
    del outputs

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        results = function(*inputs)
        return torch.autograd.grad(results if isinstance(results, tuple) else (results,), trained, upstream)
    return forward, both


def timed(sheet: Sheet, function, inputs) -> tuple[float, float, float]:
    """(ms forward, ms forward and backward, MB that both take at their peak)."""
    forward, both = both_ways(function, inputs)
    both()                                                           # compiles
    free(sheet.device)
    before, peak = 0, 0.0
    if sheet.on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return bench_systems.time_ms(forward, rep=60), bench_systems.time_ms(both, rep=80), peak


def attention_backends() -> dict:
    """Causal attention by name: ours, torch's by the backends that sdpa has, and the formula."""
    import flash
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return run
    return {"ours": lambda q, k, v: flash.flash_attention(q, k, v, True), "flash": by(SDPBackend.FLASH_ATTENTION),
            "cuDNN": by(SDPBackend.CUDNN_ATTENTION),
            "plain": lambda q, k, v: torch.softmax(flash.scores_of(q, k, True), dim=-1) @ v}


def attention_times(sheet: Sheet, product: float) -> None:
    """Attention over lengths. A causal forward counts 2 T² D FLOPs a head, a backward 2.5 times that (2307.08691)."""
    s = sheet.size
    sheet(f"causal attention, bfloat16, {s['attention_width']} wide, {s['attention_tokens']:,} tokens or one sequence",
          f"{'':6}{'tokens':>8}{'D':>5}{'forward ms':>12}{'TFLOP/s':>9}{'roof':>6}{'both ms':>10}"
          f"{'TFLOP/s':>9}{'roof':>6}{'peak MB':>9}")
    for D in s["widths"]:
        for T in s["lengths"]:
            B, H = max(1, s["attention_tokens"] // T), s["attention_width"] // D
            inputs = [torch.randn(B, H, T, D, device=sheet.device).bfloat16().requires_grad_() for _ in range(3)]
            flops = 2 * B * H * T * T * D
            for name, function in attention_backends().items():
                if name == "plain" and T > s["plain_length"]:
                    continue
                times = sheet.attempt(f"{name} {T} {D}", lambda function=function: timed(sheet, function, inputs), 10)
                if times is not None:
                    rates = [flops / times[0] * 1e3, 3.5 * flops / times[1] * 1e3]
                    sheet(f"{name:6}{T:>8}{D:>5}{times[0]:>12.3f}{rates[0] / 1e12:>9.1f}{rates[0] / product:>6.2f}"
                          f"{times[1]:>10.3f}{rates[1] / 1e12:>9.1f}{rates[1] / product:>6.2f}{times[2]:>9,.0f}")
                    sheet.figure("attention", name=name, T=T, D=D, forward=rates[0], both=rates[1])


def layer_times(sheet: Sheet, copy: float, product: float) -> None:
    """The other kernels in bfloat16: GB/s of the bytes that must move, TFLOP/s where products count."""
    T, C, V, H, K, D = sheet.size["layer"]
    # Numbers that a forward pass must read and write, and those of both passes; FLOPs of both.
    work = {"swiglu": (3 * T * C, 8 * T * C, 21 * T * C), "rms_norm": (2 * T * C, 5 * T * C, 14 * T * C),
            "rope": (2 * T * (H + K) * D, 4 * T * (H + K) * D, 6 * T * (H + K) * D),
            "cross_entropy": (T * V, 3 * T * V, 7 * T * V),
            "linear+cross_entropy": (T * C + V * C, 3 * T * C + 3 * V * C, 6 * T * C * V)}
    sheet("", f"other kernels, bfloat16, {T:,} tokens, width {C}, vocabulary {V:,}, {H} and {K} heads of {D}",
          f"{'':34}{'forward ms':>12}{'GB/s':>8}{'roof':>6}{'both ms':>10}{'GB/s':>8}{'roof':>6}{'TFLOP/s':>9}"
          f"{'peak MB':>9}")
    for name, ours, plain, own, inputs in bench_systems.layer_cases(sheet.device, T, C, V, H, K, D):
        if name not in work:                                         # matmul is there to be read
            continue
        inputs = [x.detach().bfloat16().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        for label, function in (("ours", ours), ("eager", plain), ("torch's own", own),
                                ("compiled", torch.compile(plain) if sheet.on_cuda else None)):
            if function is None:
                continue
            times = sheet.attempt(f"{name} {label}", lambda function=function: timed(sheet, function, inputs), 12)
            if times is None:
                continue
            numbers, all_numbers, flops = work[name]
            rates, reached = [2e3 * numbers / times[0], 2e3 * all_numbers / times[1]], 1e3 * flops / times[1]
            sheet(f"{name + ', ' + label:34}{times[0]:>12.3f}{rates[0] / 1e9:>8,.0f}{rates[0] / copy:>6.2f}"
                  f"{times[1]:>10.3f}{rates[1] / 1e9:>8,.0f}{rates[1] / copy:>6.2f}{reached / 1e12:>9.2f}"
                  f"{times[2]:>9,.0f}")
            sheet.figure("layer", name=name, label=label, intensity=flops / (2 * all_numbers), flops_per_s=reached)


def kernels(sheet: Sheet) -> None:
    """Attention over length, then the memory-bound kernels, each beside torch's."""
    copy, product = roofs(sheet)
    attention_times(sheet, product)
    layer_times(sheet, copy, product)


def tiles(sheet: Sheet) -> None:
    """flash.py's three kernels by tile, warps and stages: what its table should say for this card."""
    import flash
    chosen, T = flash.tiles, sheet.size["lengths"][1]
    sheet(f"{T} tokens; * = as now",
          f"{'kernel':10}{'D':>5}{'queries':>9}{'keys':>6}{'warps':>7}{'stages':>8}{'ms':>10}")
    for D in sheet.size["widths"]:
        B, H = max(1, sheet.size["attention_tokens"] // T), sheet.size["attention_width"] // D
        q, k, v, do = (torch.randn(B * H, T, D, device=sheet.device).bfloat16() for _ in range(4))
        o, lse = flash.flash_forward(q, k, v, True)
        for kernel in ("forward", "queries", "keys"):
            now = chosen(kernel, D, torch.bfloat16)
            sizes = [(a, b) for a in (32, 64, 128) for b in (32, 64, 128)
                     if 2048 <= a * b <= 16384 and (b if kernel == "keys" else a) >= 64]
            others = [dict(BLOCK_Q=a, BLOCK_K=b, num_warps=warps, num_stages=stages)
                      for a, b in sizes for warps in (4, 8) for stages in (2, 3)]
            for tile in [now, *others] if sheet.on_cuda else [now]:
                def tiles_with_it(name, *more):
                    return tile if name == kernel else chosen(name, *more)

                def run():
                    if kernel == "forward":
                        return bench_systems.time_ms(lambda: flash.flash_forward(q, k, v, True), rep=30)
                    return bench_systems.time_ms(lambda: flash.flash_backward(q, k, v, o, lse, do, True), rep=30)
                flash.tiles = tiles_with_it
                a, b, warps, stages = tile.values()
                words = f"{kernel:10}{D:>5}{a:>9}{b:>6}{warps:>7}{stages:>8}"
                ms = sheet.attempt(words, run, needs=4)
                if ms is not None:
                    sheet(f"{words}{ms:>10.3f}{'   *' if tile is now else ''}")
        flash.tiles = chosen


# --- one rank ---

def copies(sheet: Sheet) -> None:
    """GB/s of copies and of NCCL's messages among one rank, by size."""
    dist, device = torch.distributed, sheet.device
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    sheet(f"{'GB/s of one direction':24}" + "".join(f"{mb:>10} MB" for mb in sheet.size["messages_mb"]))
    rows = {}
    for mb in sheet.size["messages_mb"]:
        here, there = (torch.ones(mb * 250_000, device=device) for _ in range(2))
        host = torch.ones(mb * 250_000, pin_memory=sheet.on_cuda)
        pageable = torch.ones(mb * 250_000)
        calls = {"on the card": lambda: there.copy_(here),
                 "host to card, pinned": lambda: here.copy_(host, non_blocking=True),
                 "host to card, pageable": lambda: here.copy_(pageable),
                 "card to host, pinned": lambda: host.copy_(here, non_blocking=True),
                 "all-reduce": lambda: dist.all_reduce(here), "all-gather": lambda: gather(there, here),
                 "reduce-scatter": lambda: scatter(there, here),
                 "all-to-all": lambda: dist.all_to_all_single(there, here),
                 "broadcast": lambda: dist.broadcast(here, 0)}
        for name, call in calls.items():
            def measure(call=call):
                call()
                return here.nbytes / seconds_of(call, device, 5) / 1e9
            rows.setdefault(name, []).append(sheet.attempt(f"{name} {mb}", measure))
    sheet(*(f"{name:24}" + "".join(f"{'-' if rate is None else f'{rate:.1f}':>13}" for rate in rates)
            for name, rates in rows.items()))


def distributed(sheet: Sheet) -> None:
    """A world of one over NCCL (gloo on a CPU): copies, messages; FSDP and DDP train as the plain model does."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    os.environ |= dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = parallel.start(None if sheet.on_cuda else "cpu")
    sheet(f"one rank, {torch.distributed.get_backend()}, {device}", "")
    sheet.attempt("copies", lambda: copies(sheet))
    shape, losses = ModelConfig(**TOY), {}
    wraps = {"plain": lambda model: model, "NaiveDDP": parallel.NaiveDDP, "DDP": parallel.DDP, "FSDP": fsdp.FSDP,
             "torch's DDP": lambda model: torch.nn.parallel.DistributedDataParallel(model)}
    sheet("", "losses of five steps in float32, one rank")
    for name, wrap in wraps.items():
        def train_five(wrap=wrap):
            torch.manual_seed(0)
            model, values = wrap(Transformer(shape).to(device)), []
            optimizer = AdamW(model.parameters(), lr=1e-2)
            for i in range(5):
                ids = torch.randint(shape.vocab_size, (8, 17), generator=torch.Generator().manual_seed(i)).to(device)
                loss = model(ids[:, :-1], ids[:, 1:])[1]
                loss.backward()
                getattr(model, "finish_gradient_synchronization", lambda: None)()
                parallel.clip_grad_norm(list(model.parameters()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                values.append(loss.item())
            return values
        losses[name] = sheet.attempt(name, train_five)
    torch.distributed.destroy_process_group()
    wrong = [name for name, values in losses.items() if values is None]
    for name, values in losses.items():
        if values is not None and losses["plain"] is not None:
            gap = max(abs(a - b) for a, b in zip(values, losses["plain"]))
            sheet(f"{name:14}" + "".join(f"{value:>10.6f}" for value in values) + f"   from plain {gap:.1e}")
            wrong += [name] if gap > 1e-4 else []
    if wrong:
        sys.exit(f"not as the plain model: {', '.join(wrong)}")
