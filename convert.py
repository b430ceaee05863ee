"""Weights in and out: GPT-2, Llama 2 and 3, Qwen2, Qwen2.5, Qwen3 and Mixtral as Hugging Face keeps them.

A folder there is `config.json` (the shape), safetensors files (tensors by name) and `tokenizer.json`. All five
architectures are our Transformer with different switches, so that importing is a table of names. Whatever the table
does not know is refused by name: a tensor dropped in silence would still give fluent text, only worse.

    python convert.py import FOLDER out/NAME     config.json + *.safetensors -> ckpt.pt, for sample.py and the others
    python convert.py export out/NAME FOLDER     ckpt.pt -> a folder that AutoModelForCausalLM.from_pretrained loads
    python convert.py bench out/NAME             forward and backward beside transformers' own, where it is installed

A model of ours goes out as the architecture that it is: with qk_norm, as in our config files, as Qwen3; without, as
Llama (as Qwen2 with qkv_bias); with experts as Mixtral; in GPT-2's shape as GPT-2. Settings of training alone
(zero_init, balance_weight, …) have no place there and change no output.

Left out: pickled weights (`pytorch_model.bin` can run code when opened), quantised files, YaRN and the other RoPE
stretchings, and vocabularies that are not byte-level BPE: such a model comes without its tokenizer, and says so.
"""
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from bpe import Tokenizer
from checkpoint import load_model, save_checkpoint, sha256
from configurator import fail, nearest, parse_flags
from model import MixtureOfExperts, ModelConfig, Transformer

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16,
          "F16": torch.float16}  # safetensors' names

# What must be so in a config.json for our layers to compute the same, where it is said at all.
MUST_BE = {
    "hidden_act": ("silu", ), "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "attention_bias": (False, ),
    "mlp_bias": (False, ), "partial_rotary_factor": (1, None), "scale_attn_weights": (True, ),
    "add_cross_attention": (False, ), "scale_attn_by_inverse_layer_idx": (False, ), "quantization_config": (None, ),
    "pretraining_tp": (1, None)}
# Hugging Face's names for our fields.
SHAPE = {
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length", "hidden_size": "d_model",
    "head_dim": "head_dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "d_ff", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings"}
GPT2_SHAPE = {
    "vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "d_model", "n_layer": "n_layers",
    "n_head": "n_heads", "n_inner": "d_ff", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings"}
MIXTRAL = {
    "num_local_experts": "n_experts", "num_experts_per_tok": "n_experts_per_token",
    "router_aux_loss_coef": "balance_weight"}
GPT2 = dict(norm="layer", position="learned", ffn="gelu", bias=True)
ARCHITECTURES = {                    # name: (model_type, names, our switches, their defaults)
    "GPT2LMHeadModel": ("gpt2", GPT2_SHAPE, GPT2, {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}),
    "LlamaForCausalLM": ("llama", SHAPE, {}, {"rms_norm_eps": 1e-6}),
    "Qwen2ForCausalLM": ("qwen2", SHAPE, {"qkv_bias": True}, {"rms_norm_eps": 1e-6}),
    "Qwen3ForCausalLM": ("qwen3", SHAPE, {"qk_norm": True}, {"rms_norm_eps": 1e-6, "head_dim": 128}),
    "MixtralForCausalLM": ("mixtral", SHAPE | MIXTRAL, {}, {
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2}),
}
LLAMA3 = {"factor": "rope_factor", "low_freq_factor": "rope_low_freq", "high_freq_factor": "rope_high_freq",
          "original_max_position_embeddings": "rope_original_context"}
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old versions saved as tensors


# --- config.json ---

def read_config(folder) -> tuple[str, ModelConfig]:
    """(architecture, our config) of a folder's config.json, as transformers 4 or 5 wrote it.

    Raises ValueError naming the path and the first thing that our model cannot do.
    """
    path = Path(folder) / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(theirs, dict):
            raise ValueError(f"it holds a {type(theirs).__name__}, not an object")
        return _our_config(theirs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {f'it lacks {error}' if isinstance(error, KeyError) else error}") from error


def _our_config(theirs: dict) -> tuple[str, ModelConfig]:
    names = theirs.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise ValueError(f"the architecture {names[0]!r} is not one of {', '.join(ARCHITECTURES)}")
    _, shape, switches, defaults = ARCHITECTURES[names[0]]
    theirs = defaults | {key: value for key, value in theirs.items() if value is not None}
    for key, allowed in MUST_BE.items():
        if key in theirs and theirs[key] not in allowed:
            raise ValueError(f"{key}={theirs[key]!r} is not supported; it must be {' or '.join(map(str, allowed))}")
    optional = ("head_dim", "num_key_value_heads", "n_inner", "tie_word_embeddings", "router_aux_loss_coef")
    ours = {our: theirs[their] for their, our in shape.items() if their not in optional or their in theirs}
    ours |= switches
    if names[0] != "GPT2LMHeadModel":
        ours |= _our_rope(theirs) | _our_window(theirs, names[0])
    return names[0], ModelConfig(**ours)


def _our_rope(theirs: dict) -> dict:
    """RoPE's fields. transformers 5 writes one `rope_parameters`; 4 wrote `rope_theta`, and `rope_scaling` when
    stretched.
    """
    rope = theirs.get("rope_parameters") or (theirs.get("rope_scaling") or {}) | {
        "rope_theta": theirs.get("rope_theta", 10_000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    ours = {"rope_theta": float(rope["rope_theta"])}
    if rope.get("partial_rotary_factor", 1) != 1 or kind not in ("default", "linear", "llama3"):
        raise ValueError(f"RoPE of type {kind!r} ({rope}) is not supported; only default, linear and llama3 are")
    if kind != "default":
        ours |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        ours |= {our: rope[their] for their, our in LLAMA3.items()}
    return ours


def _our_window(theirs: dict, architecture: str) -> dict:
    """Which layers slide: all of Mixtral's, those that Qwen's layer_types name, none of Llama's."""
    if architecture == "LlamaForCausalLM" or theirs.get("sliding_window") is None:
        return {}
    kinds = theirs.get("layer_types")
    if architecture == "MixtralForCausalLM":
        kinds = ["sliding_attention"] * theirs["num_hidden_layers"]
    elif not theirs.get("use_sliding_window", False):
        return {}
    elif kinds is None:              # transformers 4: all layers from max_window_layers on
        kinds = ["full_attention" if i < theirs["max_window_layers"] else "sliding_attention"
                 for i in range(theirs["num_hidden_layers"])]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(
            f"layer_types holds {', '.join(sorted(unknown))}; only sliding_attention and full_attention are known")
    pattern = "".join("S" if kind == "sliding_attention" else "L" for kind in kinds)
    if set(pattern) == {"L"}:
        return {}
    return {"sliding_window": theirs["sliding_window"], "window_pattern": pattern if "L" in pattern else "S"}


def architecture_of(config: ModelConfig) -> str:
    """The Hugging Face architecture that computes what this config computes. Raises ValueError naming what has no
    place there.
    """
    plain = ModelConfig()
    same = ("norm_position", "attention", "logit_softcap", "mtp_depth", "n_shared_experts", "rope_interleaved",
            "smear")
    wrong = [name for name in same if getattr(config, name) != getattr(plain, name)]
    if config.norm == "layer":
        name = "GPT2LMHeadModel"
        wrong += [key for key, value in GPT2.items() if getattr(config, key) != value]
        wrong += [key for key in ("qk_norm", "qkv_bias", "sliding_window", "n_experts") if getattr(config, key)]
        wrong += ["n_kv_heads"] * (config.n_kv_heads != config.n_heads)
        wrong += ["head_dim"] * (config.head_dim * config.n_heads != config.d_model)
    else:
        wrong += [key for key in ("norm", "position", "ffn", "bias") if getattr(config, key) != getattr(plain, key)]
        name = "MixtralForCausalLM" if config.n_experts else "Qwen3ForCausalLM" if config.qk_norm else \
            "Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"
        wrong += ["qkv_bias"] * (config.qkv_bias and name != "Qwen2ForCausalLM")
        wrong += ["qk_norm"] * (config.qk_norm and name == "MixtralForCausalLM")
        wrong += ["head_dim"] * (name == "Qwen2ForCausalLM" and config.head_dim * config.n_heads != config.d_model)
        wrong += ["balance"] * (name == "MixtralForCausalLM" and config.balance == "bias")
        windowed = {"LlamaForCausalLM": "", "MixtralForCausalLM": "S"}.get(name, "SL")
        wrong += ["window_pattern"] * (config.sliding_window is not None
                                       and not set(config.window_pattern) <= set(windowed))
    if wrong:
        values = ", ".join(f"{key}={getattr(config, key)}" for key in dict.fromkeys(wrong))
        raise ValueError(
            f"{name}, the nearest of {', '.join(ARCHITECTURES)}, has no {values}; only a model without can be exported")
    return name


def their_config(config: ModelConfig, dtype: torch.dtype, tokenizer=None) -> dict:
    """config.json for transformers 4 and 5 alike: both spellings where they differ."""
    name = architecture_of(config)
    model_type, shape, _, _ = ARCHITECTURES[name]
    written = str(dtype).removeprefix("torch.")
    theirs = {"architectures": [name], "model_type": model_type, "dtype": written, "torch_dtype": written}
    theirs |= {their: getattr(config, our) for their, our in shape.items()}
    if config.n_experts:
        theirs["intermediate_size"] = config.d_ff_expert
    end = (tokenizer.special_tokens if tokenizer is not None else {}).get("<|endoftext|>")
    theirs |= {"bos_token_id": end, "eos_token_id": end}
    if name == "GPT2LMHeadModel":
        return theirs | {"activation_function": "gelu_new"}
    rope = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling}
    if config.rope_scaling != "none":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope |= {their: getattr(config, our) for their, our in LLAMA3.items()}
    theirs |= {
        "hidden_act": "silu", "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_scaling": None if config.rope_scaling == "none" else rope, "sliding_window": config.sliding_window}
    if model_type in ("qwen2", "qwen3"):
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        theirs |= {
            "layer_types": kinds, "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": kinds.index("sliding_attention") if "sliding_attention" in kinds else config.n_layers}
    return theirs


# --- names ---

def name_table(config: ModelConfig, architecture: str) -> dict:
    """{their tensor: (our tensors, transposed)}; several of ours lie in one of theirs one after the other, along
    their rows.

    GPT-2's matrices are (in, out), because its Conv1D computes x W; q, k and v lie in one.
    """
    table = {}
    if architecture == "GPT2LMHeadModel":
        layer = {"ln_1": "ln1", "ln_2": "ln2", "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
                 "attn.c_proj": "attn.o_proj", "mlp.c_fc": "ffn.w1", "mlp.c_proj": "ffn.w2"}
        stack, ends = "transformer.h", {"transformer.wte": "token_embeddings", "transformer.wpe": "position_embeddings",
                                        "transformer.ln_f": "ln_final", "lm_head": "lm_head"}
    else:
        layer = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
        layer |= {
            f"self_attn.{part}": f"attn.{part}"
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
        layer |= {"mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2"}
        layer |= {"block_sparse_moe.gate": "ffn.router"}
        layer |= {
            f"block_sparse_moe.experts.{e}.{w}": f"ffn.experts.{e}.{w}" for e in range(config.n_experts)
            for w in ("w1", "w2", "w3")}
        stack, ends = "model.layers", {
            "model.embed_tokens": "token_embeddings", "model.norm": "ln_final", "lm_head": "lm_head"}
    modules = ends | {
        f"{stack}.{i}.{their}": tuple(f"layers.{i}.{one}" for one in ([our] if isinstance(our, str) else our))
        for i in range(config.n_layers) for their, our in layer.items()}
    for their, ours in modules.items():
        ours = (ours,) if isinstance(ours, str) else ours
        for kind in ("weight", "bias"):
            conv1d = kind == "weight" and their.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc")
            table[f"{their}.{kind}"] = tuple(f"{our}.{kind}" for our in ours), conv1d
    with torch.device("meta"):
        own = Transformer(config).state_dict().keys()          # of all these names, those that this model has
    table = {their: entry for their, entry in table.items() if entry[0][0] in own}
    missing = own - {our for ours, _ in table.values() for our in ours}
    assert not missing, f"{sorted(missing)[:3]} of ours have no name in {architecture}"
    return table


# --- weights ---

def weight_files(folder) -> dict:
    """{tensor name: file} of a folder's safetensors, in one file or in several with an index. Raises OSError,
    ValueError.
    """
    from safetensors import safe_open
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {folder / Path(part).name for part in parts.values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    else:
        files = {folder / "model.safetensors"}
    where = {}
    for file in sorted(files):
        if not file.is_file():
            raise FileNotFoundError(
                f"no {file}; only safetensors are read, because opening pickled weights can run code")
        try:
            with safe_open(file, "pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
        except Exception as error: # safetensors has its own error, which is no subclass of anything useful
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    return where


def from_pretrained(folder, dtype: torch.dtype | None = None):
    """(Transformer in evaluation mode, Tokenizer or None) from a Hugging Face folder.

    dtype: of the weights; as stored when not given (the widest, where they differ). The tokenizer is None when the
    folder has no tokenizer.json, and, with a warning, when it is not a byte-level BPE. Raises ValueError naming the
    path for an architecture, a setting or a tensor that is not known, FileNotFoundError.
    """
    from safetensors import safe_open
    folder = Path(folder)
    architecture, config = read_config(folder)
    where, table = weight_files(folder), name_table(config, architecture)
    stored = {_full_name(name, architecture): name for name in where if not name.endswith(IGNORED)}
    unknown = stored.keys() - table.keys()
    if unknown:
        raise ValueError(f"{folder}: {architecture} with this config.json has no tensor {stored[sorted(unknown)[0]]!r} "
                         f"({len(unknown)} unknown in all); refused rather than dropped")
    missing = table.keys() - stored.keys() - ({"lm_head.weight"} if config.tie_embeddings else set())
    if missing:
        raise ValueError(f"{folder}: the tensor {sorted(missing)[0]!r} is missing ({len(missing)} in all)")
    kinds = {}
    for file in set(where.values()):
        with safe_open(file, "pt") as tensors:
            kinds |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    odd = {name: kind for name, kind in kinds.items() if kind not in DTYPES and name in stored.values()}
    if odd:
        raise ValueError(
            f"{folder}: {next(iter(odd))} is stored as {next(iter(odd.values()))}; {', '.join(DTYPES)} are read")
    if dtype is None:
        dtype = max((DTYPES[kinds[name]] for name in stored.values()), key=lambda kind: kind.itemsize)
    model = _empty(config, dtype)
    _fill(model, table, stored, where, folder)
    return model.eval(), _read_tokenizer(folder)


def _full_name(name: str, architecture: str) -> str:
    """GPT-2's first files lack the prefix."""
    bare = architecture == "GPT2LMHeadModel" and not name.startswith(("transformer.", "lm_head."))
    return f"transformer.{name}" if bare else name


def _empty(config: ModelConfig, dtype) -> Transformer:
    """A model whose weights are not drawn, since they are about to be replaced; its counters are 0."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device="cpu")
    if config.tie_embeddings:        # to_empty gives each name its own memory
        model.token_embeddings.weight = model.lm_head.weight
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            for buffer in module.buffers(recurse=False):
                buffer.zero_()
    return model


@torch.no_grad()
def _fill(model, table, stored, where, folder) -> None:
    """Copy every tensor of the files to its place, one file open at a time."""
    from safetensors import safe_open
    own, handles = model.state_dict(), {}
    for their, name in sorted(stored.items(), key=lambda item: (item[0] == "lm_head.weight", str(where[item[1]]))):
        if where[name] not in handles:
            handles = {where[name]: safe_open(where[name], "pt")}
        tensor = handles[where[name]].get_tensor(name)
        ours, transposed = table[their]
        tensor = tensor.T if transposed else tensor
        if tensor.shape[0] != sum(own[our].shape[0] for our in ours) or tensor.shape[1:] != own[ours[0]].shape[1:]:
            raise ValueError(
                f"{where[name]}: {name} has shape {tuple(tensor.shape)}{' transposed' if transposed else ''}, which "
                f"does not fill {' + '.join(ours)} of {tuple(own[ours[0]].shape)}; config.json and weights differ")
        tied = their == "lm_head.weight" and model.config.tie_embeddings      # the embedding came before: see the order
        if tied and not torch.equal(tensor.to(own[ours[0]].dtype), own[ours[0]]):
            raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding matrix")
        for our, part in zip(ours, tensor.split([own[our].shape[0] for our in ours])):
            own[our].copy_(part)


def _read_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.load(path)
    except ValueError as error:
        warnings.warn(f"the model comes without its tokenizer: {error}", stacklevel=3)
        return None


def save_pretrained(model, folder, tokenizer=None) -> None:
    """Write `model` and `tokenizer` as a Hugging Face folder: config.json, model.safetensors, tokenizer.json.

    Weights keep their dtype; a tied head is written once. Raises ValueError for a model that no architecture there
    computes.
    """
    from safetensors.torch import save_file
    config, weights = model.config, model.state_dict()
    architecture = architecture_of(config)
    theirs = their_config(config, model.lm_head.weight.dtype, tokenizer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (ours, transposed) in name_table(config, architecture).items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        tensor = torch.cat([weights[our].cpu() for our in ours])
        tensors[name] = (tensor.T if transposed else tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(theirs, folder / "config.json")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        end = "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None
        _write_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
                "model_max_length": config.context_length, "clean_up_tokenization_spaces": False},
            folder / "tokenizer_config.json")


def _write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- commands ---

def import_folder(folder, out_dir) -> None:
    """A Hugging Face folder to a checkpoint with its tokenizer, which sample.py, evaluate.py and align.py start from.
    """
    model, tokenizer = from_pretrained(folder)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    more = {}
    if tokenizer is not None:
        shutil.copyfile(Path(folder) / "tokenizer.json", out_dir / "tokenizer.json")
        more["tokenizer_sha256"] = sha256(out_dir / "tokenizer.json")
    save_checkpoint(model, None, 0, out_dir / "ckpt.pt", **more)
    print(f"{out_dir / 'ckpt.pt'}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{'with' if tokenizer else 'without'} a tokenizer")


def export_folder(out_dir, folder) -> None:
    """A checkpoint of ours to a Hugging Face folder."""
    model, tokenizer = load_model(out_dir)
    save_pretrained(model, folder, tokenizer)
    print(f"{folder}: {architecture_of(model.config)}, {sum(p.numel() for p in model.parameters()):,} parameters")


def bench(out_dir, repeats: int = 15) -> None:
    """Print the time of forward and backward over 2,048 random tokens: our model and transformers', in turns."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError("bench compares with transformers, which is not installed: pip install transformers==5.23.0")
    ours, _ = load_model(out_dir)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    T, V = ours.config.context_length, ours.config.vocab_size
    x, y = torch.randint(V, (2, max(1, 2048 // T), T))
    losses = {
        "ours": lambda: ours.train()(x, y)[1],
        "transformers": lambda: torch.nn.functional.cross_entropy(
            theirs.train()(input_ids=x, use_cache=False).logits.flatten(0, 1), y.flatten())}
    print(f"{architecture_of(ours.config)}, {x.shape[0]} x {T} tokens, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; ms of forward and backward, median of {repeats} in turns (fastest)")
    for dtype in (torch.float32, torch.bfloat16):
        ms = {name: [] for name in losses}
        for turn in range(repeats + 2):                            # the first two warm up
            for name, loss in losses.items():
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    value = loss()
                value.backward()
                ms[name] += [1000 * (time.perf_counter() - began)] if turn > 1 else []
        print(f"{str(dtype)[6:]:<9}", *(f"{name} {statistics.median(all_ms):.1f} ({min(all_ms):.1f})"
                                        for name, all_ms in ms.items()))


def main(argv: list[str]) -> None:
    """Run one verb of the command line."""
    verbs = {"import": import_folder, "export": export_folder, "bench": bench}
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__)
        return
    try:
        flags, rest = parse_flags(argv)
        if flags:
            raise ValueError(f"--{next(iter(flags))} is not a setting: convert.py has none")
        if rest[0] not in verbs or len(rest) != (2 if rest[0] == "bench" else 3):
            raise ValueError(f"{' '.join(argv)!r} is not `import FOLDER OUT_DIR`, `export OUT_DIR FOLDER` or "
                             f"`bench OUT_DIR`.{nearest(rest[0], verbs)}")
        verbs[rest[0]](*rest[1:])
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
