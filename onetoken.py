"""One token, or a few, of each row through the model in C: what decoding on a CPU runs, where a compiler is at hand.

A block is eighty operators to torch, seven of them products. Alone the others take microseconds each; here their code
and Python's have to come back into the cache every time that a matrix has run through it, which took as long again as
reading the weights of a model of 30M parameters. onetoken.c is the same pass as one C function; this page fills in its
structures from a model's tensors without a copy, and says for which models it stands in:

    decoding.decode ── prepare? ──> onetoken.Pass ─> onetoken.c        float32, bfloat16, int8, int4 weights
                          └─ else ─> model(tokens, cache=cache)        post-norm, experts, MLA, GPUs, no compiler

Both fill the same cache and differ by rounding alone. `python bench.py decode --reference=true` has the figures. The
idea of one file of C for one pass is Karpathy's llama2.c.
"""
import contextlib
import ctypes
import functools
from types import SimpleNamespace

import torch

import native
from layers import LayerNorm, RMSNorm, rope_tables

GROUP = 64                           # weights of a row that share a scale and a shift in int4
MAX_ROWS = 64                        # about where a product of torch's, with its larger tiles, is as fast
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}            # int32: words of int4
NORMS = {torch.nn.Identity: 0, RMSNorm: 1, LayerNorm: 2}
FFNS = ("swiglu", "silu", "gelu", "relu2")
P, I = ctypes.c_void_p, ctypes.c_int


class Matrix(ctypes.Structure):      # these four as in onetoken.c
    _fields_ = [("w", P), ("scale", P), ("bias", P), ("kind", I), ("d_out", I), ("d_in", I)]


class Norm(ctypes.Structure):
    _fields_ = [("weight", P), ("bias", P), ("eps", ctypes.c_float), ("kind", I)]


class Layer(ctypes.Structure):
    _fields_ = [(name, Norm) for name in ("ln1", "ln2", "q_norm", "k_norm")] + [
        (name, Matrix) for name in ("q", "k", "v", "o", "w1", "w3", "w2")] + [("window", I), ("rotate", I)]


class Model(ctypes.Structure):
    _fields_ = [(name, I) for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "ffn",
                                       "interleaved", "shift_keys", "cache_kind", "max_length", "n_slots",
                                       "n_tokens")] + [
        (name, ctypes.c_int64) for name in ("next_row", "next_head", "next_slot")] + [
        ("cos", P), ("sin", P), ("layers", ctypes.POINTER(Layer)), ("last", Norm), ("head", Matrix)]


@functools.cache
def library():
    """onetoken.c compiled for this processor, or None where it cannot be."""
    # Sums in any order, as vectors need it, but NaN stays NaN.
    made = native.load("onetoken", ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"],
                       openmp=True)
    if made is not None:
        made.one_token.argtypes, made.linear.argtypes = (P, P, P, I, P, P, P, P, P, P), (P, I, P, P, I, P)
        made.widen.argtypes = P, P
        made.one_token.restype = made.linear.restype = made.widen.restype = None
    return made


# --- a model as the C page sees it ---

def matrix(layer) -> Matrix:
    """A Linear, or a RoundedLinear. TypeError for what C cannot read."""
    weight, scale = getattr(layer, "weight", None), getattr(layer, "scale", None)
    weight = layer.q if weight is None else weight
    if weight.dtype not in KINDS or not weight.is_contiguous() or weight.device.type != "cpu":
        raise TypeError(f"weights in {weight.dtype} on {weight.device}")
    if scale is not None and scale.dtype != torch.bfloat16:                      # after model.float()
        raise TypeError(f"scales in {scale.dtype}")
    d_in = scale.shape[2] * GROUP if weight.dtype == torch.int32 else weight.shape[1]
    return Matrix(weight.data_ptr(), None if scale is None else scale.data_ptr(), None, KINDS[weight.dtype],
                  len(weight), d_in)


def linear(layer, x):
    """x (rows, d_in) in float32 through one such layer without its bias, (rows, d_out)."""
    m, rows, x = matrix(layer), len(x), x.contiguous()   # named: an address does not keep a copy alive
    y, scratch = x.new_empty(rows, m.d_out), x.new_empty(m.d_in // GROUP)
    library().linear(ctypes.byref(m), 1, x.data_ptr(), y.data_ptr(), rows, scratch.data_ptr())
    return y


def widen(layer):
    """The weights of one such layer in float32, (d_out, d_in)."""
    m = matrix(layer)
    out = torch.empty(m.d_out, m.d_in, dtype=torch.float32)
    library().widen(ctypes.byref(m), out.data_ptr())
    return out


def onerow():
    """The page, imported where a GPU needs it: Triton takes half a second."""
    import onerow
    return onerow


class RoundedLinear(torch.nn.Module):
    """x @ weightᵀ + bias with weights from compress.py's round_int8 or round_int4.

    A few rows on a CPU are onetoken.c's, one on a GPU is onerow.py's; for more the weights are multiplied out first,
    which saves memory and no time. int4 in the order of onetoken.c: bits 4 k … 4 k + 3 of 16 words hold numbers
    16 k … 16 k + 15 of two groups; scale is (R, 2, C / GROUP), a row's scales, then its shifts.
    Without a scale q are weights as they were, so that a GPU's one row can be onerow.py's.
    """

    def __init__(self, parts: dict, bias=None):
        super().__init__()
        q, scale = parts["q"], parts.get("scale")
        if "shift" in parts:
            numbers = torch.stack((q // 16, q % 16), dim=-1).flatten(1)
            numbers = torch.nn.functional.pad(numbers, (0, numbers.shape[1] % (2 * GROUP))).int()    # groups: even
            words = numbers.unflatten(1, (-1, 8, 16)) << 4 * torch.arange(8, device=q.device)[:, None]
            q = words.sum(dim=2, dtype=torch.int32).flatten(1)
            scale = torch.stack((scale, parts["shift"]), dim=1)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.bias = bias

    def multiplied_out(self):
        """The weights in float32, (R, C)."""
        if self.scale is None:
            return self.q.float()
        if self.q.dtype == torch.int8:
            return self.q * self.scale.float()
        scale, shift = self.scale.float().unsqueeze(-1).unbind(1)               # (R, C / GROUP, 1)
        numbers = self.q.unflatten(1, (-1, 1, 16)) >> 4 * torch.arange(8, device=self.q.device)[:, None] & 15
        groups = numbers.flatten(1).unflatten(1, (-1, GROUP))[:, :scale.shape[1]]
        return ((groups - 8) * scale + shift).flatten(1)

    def forward(self, x):                                                       # (..., C) -> (..., R)
        rows = x.reshape(-1, x.shape[-1])
        trains = x.requires_grad and torch.is_grad_enabled()                    # neither way gives gradients
        in_c = x.device.type == "cpu" and library() is not None
        in_c = in_c and self.scale is not None and self.scale.dtype == torch.bfloat16
        if in_c and not trains and 0 < len(rows) <= MAX_ROWS:
            y = linear(self, rows.float()).to(x.dtype)
        elif x.is_cuda and not trains and len(rows) == 1 and onerow().use_triton(x):
            y = onerow().one_row(rows, self.q, self.scale)
        else:
            y = rows @ (widen(self) if in_c else self.multiplied_out()).to(x.dtype).T
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Pass:
    """A model ready for onetoken.c, with a cache of float32 or bfloat16 and texts of at most max_length tokens.

    Raises TypeError for a model that it cannot run. The tensors it points to are held until it goes.
    """

    def __init__(self, model, max_length: int, dtype):
        c = model.config
        if (c.norm_position != "pre" or c.attention != "standard" or c.attention_backend == "naive" or c.n_experts
                or dtype not in (torch.float32, torch.bfloat16)):
            raise TypeError("onetoken.c has no such model or cache")
        self.model, self.held = model, []
        layers = [self.layer(block, window) for block, window in zip(model.layers, c.windows)]
        self.layers = (Layer * c.n_layers)(*layers)
        cos = sin = None
        if c.position == "rope":
            tables = rope_tables(torch.arange(max_length), c.head_dim, c.rope_theta, c)
            cos, sin = (self.floats(table) for table in tables)
        d_ff = max(matrix(block.ffn.w1).d_out for block in model.layers)
        self.c = Model(c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, d_ff, FFNS.index(c.ffn),
                       c.rope_interleaved, c.shift_keys, KINDS[dtype], max_length, 0, 1, 0, 0, 0, cos, sin,
                       self.layers, self.norm(model.ln_final), self.matrix(model.lm_head))
        self.numbers = c.d_model + 2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 2 * d_ff + c.n_heads * max_length
        self.numbers += max(c.d_model, d_ff, c.n_heads * c.head_dim) // GROUP    # for int4
        self.scratch = torch.empty(0, dtype=torch.float32)

    def floats(self, tensor):
        """The address of a float32 copy, None of None."""
        if tensor is None:
            return None
        self.held.append(tensor.detach().float().contiguous())
        return self.held[-1].data_ptr()

    def norm(self, layer) -> Norm:
        if layer is None:
            return Norm(None, None, 0, 0)
        return Norm(self.floats(getattr(layer, "weight", None)), self.floats(getattr(layer, "bias", None)),
                    getattr(layer, "eps", 0), NORMS[type(layer)])

    def matrix(self, layer) -> Matrix:
        self.held += [t.detach() for t in (*layer.parameters(), *layer.buffers())]    # model.to() replaces a .data
        m = matrix(layer)
        m.bias = self.floats(layer.bias)
        return m

    def layer(self, block, window) -> Layer:
        attn, ffn = block.attn, block.ffn
        norms = [block.ln1, block.ln2, getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)]
        matrices = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, ffn.w1, getattr(ffn, "w3", ffn.w1), ffn.w2]
        return Layer(*(self.norm(one) for one in norms), *(self.matrix(one) for one in matrices), window or 0,
                     attn.rotates)

    def __call__(self, tokens, pasts: list[int], cache, keys, values, slots=None):
        """Logits (B, T, V) after each of T more tokens of every row, whose keys and values are added to the cache.

        tokens: (B, T), lists or a tensor. pasts: positions that each row holds. keys, values: a tensor (B, K, slots, D)
        for each layer, all of the same strides, the last of them 1. slots: (B, …) int32, the slot of each position;
        none: its own number. cache: has earlier ids for the embedding; raw, the keys before shifting.
        """
        tokens, c = torch.as_tensor(tokens), self.model.config
        B, T = tokens.shape
        at = torch.tensor(pasts)[:, None] + torch.arange(T)                      # (B, T)
        if max(pasts) + T > self.c.max_length:
            raise ValueError(f"{max(pasts) + T} tokens pass the cache of {self.c.max_length}")
        x = self.model.embed(tokens, cache, SimpleNamespace(slots=at, positions=at))
        x, at = x.float().contiguous(), at.int()
        if len(self.scratch) < B * T * self.numbers:
            self.scratch = x.new_empty(B * T * self.numbers)
        logits = x.new_empty(B, T, c.vocab_size)
        self.c.n_tokens, self.c.n_slots = T, 0 if slots is None else slots.shape[1]
        self.c.next_row, self.c.next_head, self.c.next_slot, _ = keys[0].stride()
        pointers = [(P * len(stores))(*(store.data_ptr() for store in stores)) for stores in (keys, values, cache.raw)]
        library().one_token(ctypes.byref(self.c), x.data_ptr(), at.data_ptr(), B * T, *pointers,
                            None if slots is None else slots.data_ptr(), logits.data_ptr(), self.scratch.data_ptr())
        return logits if c.logit_softcap is None else c.logit_softcap * torch.tanh(logits / c.logit_softcap)


def prepare(model, max_length: int):
    """A Pass for this model, or None where only the model itself can do it."""
    weight = model.token_embeddings.weight
    if weight.device.type != "cpu" or library() is None:
        return None
    with contextlib.suppress(TypeError, KeyError, AttributeError):
        return Pass(model, max_length, weight.dtype)
