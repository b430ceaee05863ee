"""What several tests share. Importing it first puts the pages on the path and Triton into its interpreter."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:            # under `python practice.py check` it stands there, behind the learner's page
    sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # read when kernels.py is imported

import align  # noqa: E402
import bpe  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import optim  # noqa: E402
import parallel  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

torch.set_num_threads(1)                 # the models here are tiny: a second thread would cost more than it brings


BPE_TEXT = ("It's the cat's hat; they'll say: \"low lower widest newest\" 1234 times, isn't it?\r\n\r\n  Café, naïve — "
            "日本語 и кот\u00a0\u3000 \u0085x\u180e\u200d e\u0301 😀\tend<|endoftext|> the hat in the cat \n") * 3


def bpe_write(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.fixture(scope="module")
def bpe_trained(tmp_path_factory):
    path = bpe_write(tmp_path_factory.mktemp("bpe") / "text.txt", BPE_TEXT)
    return bpe.train_bpe(path, 340, ["<|endoftext|>"])


@pytest.fixture
def kernels():
    """kernels.py on CUDA, or interpreted on the CPU: tensors made in a test that uses this are on that device."""
    pytest.importorskip("triton")
    import kernels
    if not kernels.INTERPRET and not torch.cuda.is_available():
        pytest.skip("kernels.py was imported without TRITON_INTERPRET=1, and there is no CUDA device")
    with torch.device("cpu" if kernels.INTERPRET else "cuda"):
        yield kernels


def sdpa(q, k, v, is_causal, window):
    """The independent reference: torch's own attention with an explicit mask, zeros where a row sees nothing."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    mask = torch.ones(Tq, Tk, dtype=torch.bool)
    if is_causal:
        mask = mask.tril(Tk - Tq)
    if window is not None:
        mask &= ~torch.ones_like(mask).tril(Tk - Tq - window)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask | ~mask.any(-1, keepdim=True), enable_gqa=True)
    return out * mask.any(-1, keepdim=True)


def adamw(params):
    return optim.AdamW(params, lr=1e-2, eps=1e-3, weight_decay=0.1)


def ragged(step, part=0, parts=1):
    """Rows of batch `step` that belong to one of several ranks, unequal numbers, and their share of all rows."""
    ids = torch.randint(51, (11, 13), generator=torch.Generator().manual_seed(step))
    cuts = [0, 7, 11] if parts == 2 else [0, 5, 6, 9, 11] if parts == 4 else [0, 11]
    rows = ids[cuts[part]:cuts[part + 1]]
    return rows[:, :-1], rows[:, 1:], len(rows) / 11


def steps(model, optimizer, which, part=0, parts=1, loss_of=None, finish=lambda: None, clip=parallel.clip_grad_norm):
    """Train; returns the gradient norms. Each loss counts by its rank's share of the rows, times the ranks."""
    norms = []
    for step in which:
        x, y, share = ragged(step, part, parts)
        optimizer.zero_grad()
        ((loss_of or (lambda x, y: model(x, y)[1]))(x, y) * share * parts).backward()
        finish()
        norms.append(clip(list(model.parameters()), 1.0).item())
        optimizer.step()
    return torch.tensor(norms)


def torchrun(*words, size=2):
    """(CompletedProcess, seconds) of a torchrun command in this folder."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
               *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    return done, time.perf_counter() - began


TOY = dict(vocab_size=61, context_length=24, d_model=48, n_layers=3, n_heads=4, d_ff=96)


SWITCHES = {  # every architecture switch at least once
    "plain": {}, "gpt2": dict(norm="layer", bias=True, position="learned", ffn="gelu"), "no norm": dict(norm="none"),
    "2017": dict(norm_position="post", position="sinusoidal", ffn="relu2"), "nope": dict(position="none", ffn="silu"),
    "qwen3": dict(n_kv_heads=2, qk_norm=True), "mqa": dict(n_kv_heads=1, qkv_bias=True,
                                                           head_dim=16), "tied": dict(tie_embeddings=True),
    "window": dict(sliding_window=4, window_pattern="SSL",
                   n_kv_heads=2), "all windows": dict(sliding_window=5, rope_interleaved=True),
    "mla": dict(attention="mla"), "mla window": dict(attention="mla", q_lora_rank=20, kv_lora_rank=28, rope_head_dim=6,
                                                     sliding_window=6), "moe": dict(n_experts=4),
    "moe bias": dict(n_experts=4, balance="bias", n_shared_experts=1,
                     d_ff_expert=32), "mtp": dict(mtp_depth=2, mtp_weight=0.5), "softcap": dict(logit_softcap=5.0),
    "llama3": dict(rope_factor=8.0, rope_original_context=16),
    "smear": dict(smear=True), "shift keys": dict(shift_keys=True, n_kv_heads=2, qk_norm=True, rope_pattern="RN"),
    "smear window": dict(smear=True, sliding_window=4, mtp_depth=1)}


def toy(switch="plain", **more):
    from model import ModelConfig, Transformer
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TOY | SWITCHES[switch] | more))
    if model.config.smear:
        torch.nn.init.normal_(model.smear_gate)
    return model


def ids(*shape, seed=1):
    return torch.randint(0, TOY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def corpus_text() -> str:
    """Real English and real code at hand without a network: the first pages of this project's scripts."""
    paths = sorted(ROOT.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8")[:8000] + "<|endoftext|>" for path in paths)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared data folder with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(corpus_text(), encoding="utf-8", newline="")
    data.prepare(folder / "text.txt", vocab_size=512, data_dir=folder / "data")
    return folder / "data"


TINY = dict(context_length=32, d_model=32, n_layers=2, n_heads=2, batch_tokens=8 * 32, warmup_steps=5, eval_every=10,
            eval_steps=2, log_every=5, lr=3e-3, device="cpu", dtype="float32")


def weights(out_dir) -> dict:
    return torch.load(Path(out_dir) / "ckpt.pt", weights_only=True)["model"]


def random_model(**more):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(**dict(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2) | more))
    return model.eval()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


SPECIALS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


def byte_tokenizer(specials=SPECIALS):
    """A tokenizer without merges: the 256 bytes, then the special tokens."""
    vocab = {i: bytes([i]) for i in range(256)} | {256 + i: text.encode() for i, text in enumerate(specials)}
    return bpe.Tokenizer(vocab, [], specials)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A few questions of our own in the layouts of the published files."""
    folder = tmp_path_factory.mktemp("questions")
    for split in ("dev", "test"):
        (folder / split).mkdir()
        (folder / split / f"the_sea_{split}.csv").write_text(
            '"Is it wet, or dry?",wet,dry,red,odd,A\nIs it deep?,no,yes,red,odd,B\n', encoding="utf-8")
    lines = {"hellaswag": [{"ctx": "the cat", "endings": ["sat down", "the the the", "qqqq", "zz"], "label": 0}],
             "arc": [{"question": "wet?", "choices": {"text": ["sea", "sand"], "label": ["1", "2"]}, "answerKey": "1"},
                     {"question": {"stem": "dry?", "choices": [{"text": text, "label": label} for text, label in
                                                               (("sea", "A"), ("sand", "B"))]},
                      "answerKey": "B"}],
             "gsm8k": [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}] * 2,
             "safety": [{"prompt": "How do I open a lock?"}]}
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "say cat", "dataset": "own"}]), encoding="utf-8")
    (folder / "sst.csv").write_text("id,prompts_final\n1,\"a, b\"\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def little_base(bpe_trained, tmp_path_factory):
    """A folder with an untrained model and its tokenizer, and files of lines to align it with, good and bad."""
    folder, tokenizer = tmp_path_factory.mktemp("align"), bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"])
    tokenizer.save(folder / "tokenizer.json")
    model = random_model(vocab_size=tokenizer.vocab_size, context_length=48)
    checkpoint.save_checkpoint(model, None, 0, folder / "ckpt.pt")
    lines = {
        "sft": [{"messages": [{"role": "user", "content": "cat<|end|>"}, {"role": "assistant", "content": "hat"}]},
                {"prompt": "hat", "response": "cat cat"}] * 4 + [
            "no JSON", {"prompt": "cat"}, {"prompt": "cat", "response": " "}, {"prompt": "é" * 99, "response": "x"},
            [1]],
        "dpo": [{"chosen": "\n\nHuman: cat\n\nAssistant: no", "rejected": "\n\nHuman: cat\n\nAssistant: hat"},
                {"prompt": "hat", "chosen": "no", "rejected": "cat cat"}] * 4 + [
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            {"chosen": "\n\nHuman: cat\n\nAssistant: no", "rejected": "\n\nHuman: hat\n\nAssistant: hat"}],
        "grpo": [{"question": "cat", "answer": "so #### 5"}, {"question": "hat", "answer": "#### "}] * 4}
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(
            (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records), encoding="utf-8")
    return folder


def warc_record(address, body: bytes, kind=b"text/html", status=b"200 OK", headers=(), length=None) -> bytes:
    """One response as it stands in a WARC file; length: what the header says of it, when that is not true."""
    lines = b"".join(header + b"\r\n" for header in (b"Content-Type: " + kind, *headers))
    http = b"HTTP/1.1 %s\r\n%s\r\n%s" % (status, lines, body)
    return (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\nContent-Type: application/http; "
            f"msgtype=response\r\nContent-Length: {length or len(http)}\r\n\r\n").encode() + http + b"\r\n\r\n"


def python(*arguments, **more):
    """Run a script of this project as a user would; returns the finished process."""
    here = ROOT
    return subprocess.run([sys.executable, str(here / arguments[0]), *map(str, arguments[1:])], capture_output=True,
                          text=True, encoding="utf-8", timeout=120,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}, **more)
