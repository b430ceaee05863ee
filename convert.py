"""Weights in and out: GPT-2, Llama 2 and 3, Qwen2, Qwen2.5, Qwen3 and Mixtral as Hugging Face keeps them.

    python convert.py import FOLDER out/NAME [--overwrite=true]     config.json + *.safetensors -> ckpt.pt
    python convert.py export out/NAME FOLDER                        ckpt.pt -> a folder for AutoModelForCausalLM

All are our Transformer with different switches, so importing is a table of names:

    theirs                                            ours                          shape
    model.embed_tokens.weight                         token_embeddings.weight       (V, C)
    model.layers.0.self_attn.q_proj.weight            layers.0.attn.q_proj.weight   (H D, C)
    model.layers.0.mlp.{gate,up,down}_proj.weight     layers.0.ffn.{w1,w3,w2}       (F, C), (F, C), (C, F)
    transformer.h.0.attn.c_attn.weight (GPT-2)        q_proj, k_proj and v_proj     (C, 3 C), transposed, cut in three

What the table does not know is refused by name: a tensor dropped in silence would still give fluent text, only worse.
Rows of q_proj and k_proj are not permuted: Hugging Face did that once to Meta's files, for the pairs (i, i + D/2) that
our rope() turns too (layers.py). Permuting twice is the classic bug: it loads without a word, since the shapes agree.

A model of ours goes out as what it is: Qwen3 with qk_norm, Qwen2 with qkv_bias, else Llama; Mixtral with experts.
Left out: pickled and quantised weights, sliding windows, RoPE stretched unlike Llama 3's, vocabularies other than BPE.
"""
import json
import math
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bpe import Tokenizer
from checkpoint import claim_out_dir, forget_former, save_checkpoint, sha256, write_atomically, write_text
from configurator import command_line, fail
from model import ModelConfig, Transformer, load_model, with_weights

# config.json's names for our fields.
SHAPE = {"vocab_size": "vocab_size", "max_position_embeddings": "context_length", "hidden_size": "d_model",
         "head_dim": "head_dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
         "num_key_value_heads": "n_kv_heads", "intermediate_size": "d_ff", "rms_norm_eps": "norm_eps",
         "tie_word_embeddings": "tie_embeddings"}
GPT2_SHAPE = {"vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "d_model", "n_layer": "n_layers",
              "n_head": "n_heads", "n_inner": "d_ff", "layer_norm_epsilon": "norm_eps",
              "tie_word_embeddings": "tie_embeddings"}
MIXTRAL_SHAPE = SHAPE | {"num_local_experts": "n_experts", "num_experts_per_tok": "n_experts_per_token",
                         "router_aux_loss_coef": "balance_weight"}
OPTIONAL = ("head_dim", "num_key_value_heads", "n_inner", "tie_word_embeddings", "router_aux_loss_coef")
GPT2_SWITCHES = dict(norm="layer", position="learned", ffn="gelu", bias=True)
ARCHITECTURES = {          # name: (model_type, names, our switches, what transformers takes when a key is not there)
    "GPT2LMHeadModel": ("gpt2", GPT2_SHAPE, GPT2_SWITCHES, {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("qwen3", SHAPE, {"qk_norm": True}, {"rms_norm_eps": 1e-6, "head_dim": 128}),
    "Qwen2ForCausalLM": ("qwen2", SHAPE, {"qkv_bias": True}, {"rms_norm_eps": 1e-6}),
    "LlamaForCausalLM": ("llama", SHAPE, {}, {"rms_norm_eps": 1e-6}),
    "MixtralForCausalLM": ("mixtral", MIXTRAL_SHAPE, {}, {       # last: without experts it is a Llama
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2})}
ROPE = {"factor": "rope_factor", "low_freq_factor": "rope_low_freq", "high_freq_factor": "rope_high_freq",
        "original_max_position_embeddings": "rope_original_context"}
# What must be so in a config.json for our layers to compute the same, where it is said at all.
MUST_BE = {"hidden_act": ["silu"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "attention_bias": [False],
           "mlp_bias": [False], "rope_type": ["default", "llama3"], "partial_rotary_factor": [1],
           "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "quantization_config": []}
# Fields of ours that may have any value: of training alone, or checked or written elsewhere.
FREE = {"zero_init", "balance", "balance_weight", "balance_rate", "mtp_weight", "attention_backend", "fused_loss",
        "d_ff_expert", "n_experts_per_token", "rope_theta", *ROPE.values()}
IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")    # constants that old versions saved as tensors

# Modules of a block and around it; several of ours lie in one of theirs one after the other.
GPT2_BLOCK = {"ln_1": "ln1", "attn.c_attn": "attn.q_proj attn.k_proj attn.v_proj", "attn.c_proj": "attn.o_proj",
              "ln_2": "ln2", "mlp.c_fc": "ffn.w1", "mlp.c_proj": "ffn.w2"}
GPT2_ENDS = {"transformer.wte": "token_embeddings", "transformer.wpe": "position_embeddings",
             "transformer.ln_f": "ln_final", "lm_head": "lm_head"}
BLOCK = {"input_layernorm": "ln1", "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj",
         "self_attn.v_proj": "attn.v_proj", "self_attn.o_proj": "attn.o_proj", "self_attn.q_norm": "attn.q_norm",
         "self_attn.k_norm": "attn.k_norm", "post_attention_layernorm": "ln2", "mlp.gate_proj": "ffn.w1",
         "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2", "block_sparse_moe.gate": "ffn.router"}
ENDS = {"model.embed_tokens": "token_embeddings", "model.norm": "ln_final", "lm_head": "lm_head"}


def name_table(config: ModelConfig, architecture: str, names) -> dict:
    """{their tensor: ([our tensors], transposed)} for the names in our state dict. GPT-2's Conv1D computes x W: its
    matrices are (in, out) and are transposed."""
    gpt2 = architecture == "GPT2LMHeadModel"
    block, modules, stack = (GPT2_BLOCK, GPT2_ENDS, "transformer.h") if gpt2 else (BLOCK, ENDS, "model.layers")
    experts = {f"block_sparse_moe.experts.{e}.{w}": f"ffn.experts.{e}.{w}"
               for e in range(config.n_experts) for w in ("w1", "w2", "w3")}
    for i in range(config.n_layers):
        modules = modules | {f"{stack}.{i}.{their}": " ".join(f"layers.{i}.{our}" for our in ours.split())
                             for their, ours in (block | experts).items()}
    table = {}
    for their, ours in modules.items():
        for kind in ("weight", "bias"):
            tensors = [f"{our}.{kind}" for our in ours.split()]
            if tensors[0] in names:                              # of all these, those that this model has
                conv1d = gpt2 and kind == "weight" and their.endswith(("c_attn", "c_proj", "c_fc"))
                table[f"{their}.{kind}"] = tensors, conv1d
    return table


def read_config(folder) -> tuple[str, ModelConfig]:
    """(architecture, our config) of a folder's config.json, as transformers 4 or 5 wrote it. Raises ValueError naming
    the path and the first thing that our model cannot do."""
    path = Path(folder) / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        name = (theirs.get("architectures") or [None])[0]
        if name not in ARCHITECTURES:
            raise ValueError(f"the architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
        model_type, shape, switches, defaults = ARCHITECTURES[name]
        theirs = defaults | {key: value for key, value in theirs.items() if value is not None}
        # As in transformers 5, rope_scaling, where a stretch is added by hand, wins over rope_parameters.
        rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"RoPE {rope} is not supported; only one for all layers is")
        theirs = {"original_max_position_embeddings": theirs.get("max_position_embeddings"), "rope_theta": 10_000.0,
                  "rope_type": rope.get("type", "default")} | theirs | rope
        for key, allowed in MUST_BE.items():
            if key in theirs and theirs[key] not in allowed:
                raise ValueError(f"{key}={theirs[key]!r} is not supported; allowed: {allowed or 'none'}")
        slides = model_type == "mixtral" or theirs.get("use_sliding_window", False)      # the others' code has none
        if slides and theirs.get("sliding_window", math.inf) < theirs["max_position_embeddings"]:
            raise ValueError(f"sliding_window={theirs['sliding_window']} is in use; only full attention is read")
        ours = {our: theirs[their] for their, our in shape.items() if their in theirs or their not in OPTIONAL}
        if theirs["rope_type"] == "llama3":
            ours |= {our: theirs[their] for their, our in ROPE.items()}
        return name, ModelConfig(rope_theta=float(theirs["rope_theta"]), **ours | switches)
    except (ValueError, TypeError, AttributeError, RecursionError, KeyError) as error:
        raise ValueError(f"{path} describes no model that can be read: {error}") from error


def architecture_of(config: ModelConfig) -> str:
    """The Hugging Face architecture that computes what this config does. Raises ValueError naming what has no place."""
    lacking = {}
    for name, (_, shape, switches, _) in ARCHITECTURES.items():
        plain = ModelConfig(**switches | dict(d_model=config.d_model, n_heads=config.n_heads))
        free = {*shape.values(), *FREE}
        if name in ("GPT2LMHeadModel", "Qwen2ForCausalLM"):      # there a head is always d_model / n_heads wide
            free -= {"head_dim"}
        if config.n_experts and config.balance == "bias":        # sigmoid scores: none of them routes so
            free -= {"balance"}
        lacking[name] = [f"{key}={getattr(config, key)}" for key in sorted(asdict(plain).keys() - free)
                         if getattr(config, key) != getattr(plain, key)]
        if not lacking[name]:
            return name
    hint = "; train with --smear=false --shift_keys=false --rope_pattern=R" if config.smear or config.shift_keys else ""
    raise ValueError(f"none of {', '.join(ARCHITECTURES)} has {', '.join(min(lacking.values(), key=len))}{hint}")


def their_config(config: ModelConfig, dtype: torch.dtype, tokenizer=None) -> dict:
    """config.json for transformers 4 and 5 alike: both spellings where they differ."""
    name = architecture_of(config)
    model_type, shape, _, _ = ARCHITECTURES[name]
    written = str(dtype).removeprefix("torch.")
    end = tokenizer.special_tokens.get("<|endoftext|>") if tokenizer is not None else None
    theirs = {"architectures": [name], "model_type": model_type, "dtype": written, "torch_dtype": written,
              "bos_token_id": end, "eos_token_id": end} | {their: getattr(config, our) for their, our in shape.items()}
    if config.n_experts:
        theirs["intermediate_size"] = config.d_ff_expert
    if name == "GPT2LMHeadModel":
        return theirs | {"activation_function": "gelu_new"}
    stretch = {their: getattr(config, our) for their, our in ROPE.items()} if config.rope_factor != 1 else {}
    rope = {"rope_type": "llama3" if stretch else "default"} | stretch
    return theirs | {"rope_theta": config.rope_theta, "rope_scaling": rope if stretch else None,
                     "rope_parameters": rope | {"rope_theta": config.rope_theta}, "hidden_act": "silu",
                     "sliding_window": None, "use_sliding_window": False}


def stored_tensors(folder):
    """Each (name, tensor) of a folder's model.safetensors or, only without one, of the files that its index names: as
    transformers does, for parts may be left from an earlier save. Raises ValueError naming the file."""
    from safetensors import SafetensorError, safe_open
    files, index = [Path(folder) / "model.safetensors"], Path(folder) / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise FileNotFoundError(f"no {files[0]}; only safetensors are read: opening pickled weights can run code")
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [index.with_name(name) for name in sorted(set(names))]
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name).clone()       # a view would change with the file
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def from_pretrained(folder):
    """(Transformer in evaluation mode, Tokenizer or None) from a Hugging Face folder, in the dtype of its weights (the
    widest, where they differ). Raises ValueError naming the path."""
    architecture, config = read_config(folder)
    with torch.device("meta"):                                   # shapes without memory
        state = Transformer(config).state_dict()
    table = name_table(config, architecture, state)
    missing = set(table) - ({"lm_head.weight"} if config.tie_embeddings else set())
    for name, tensor in stored_tensors(folder):
        if name.endswith(IGNORED):
            continue
        bare = architecture == "GPT2LMHeadModel" and not name.startswith(("transformer.", "lm_head."))
        their = f"transformer.{name}" if bare else name          # GPT-2's first files lack the prefix
        if their not in table:
            raise ValueError(f"{folder}: {architecture} with this config.json has no tensor {name!r}; none is dropped")
        ours, transposed = table[their]
        tensor = tensor.T.contiguous() if transposed else tensor
        rows = [state[our].shape[0] for our in ours]
        shape = torch.Size((sum(rows), *state[ours[0]].shape[1:]))
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{folder}: {their} is {tensor.dtype} {tuple(tensor.shape)}, {' + '.join(ours)} have "
                             f"{tuple(shape)}; config.json and weights differ")
        for our, part in zip(ours, tensor.split(rows)):
            state[our] = part if len(ours) == 1 else part.clone()
        missing.discard(their)
    if missing:
        raise ValueError(f"{folder}: the tensor {min(missing)!r} is missing ({len(missing)} in all)")
    if config.tie_embeddings:
        state["lm_head.weight"] = state["token_embeddings.weight"]
    dtype = max((tensor.dtype for tensor in state.values()), key=lambda kind: kind.itemsize)
    model = with_weights(config, {name: tensor.to(dtype) for name, tensor in state.items()}).eval()
    path, tokenizer = Path(folder) / "tokenizer.json", None
    try:
        tokenizer = Tokenizer.load(path) if path.is_file() else None
        if tokenizer and tokenizer.vocab_size > config.vocab_size:
            tokenizer = None
            raise ValueError(f"{path} has more ids than the model's {config.vocab_size}")
    except ValueError as error:                                  # no byte-level BPE, or of another model
        warnings.warn(f"the model comes without its tokenizer: {error}", stacklevel=2)
    return model, tokenizer


def save_pretrained(model, folder, tokenizer=None) -> None:
    """Write `model` and `tokenizer` as a Hugging Face folder: config.json, model.safetensors, tokenizer.json. Weights
    keep their dtype; a tied head is written once. Raises ValueError for a model that no architecture there computes."""
    from safetensors.torch import save
    config, weights, folder = model.config, model.state_dict(), Path(folder)
    files = {"config.json": their_config(config, model.lm_head.weight.dtype, tokenizer)}
    table, tensors = name_table(config, architecture_of(config), weights), {}
    folder.mkdir(parents=True, exist_ok=True)
    for their, (ours, transposed) in table.items():
        if their != "lm_head.weight" or not config.tie_embeddings:
            tensor = torch.cat([weights[our].cpu() for our in ours])
            tensors[their] = (tensor.T if transposed else tensor).contiguous()
    write_atomically(folder / "model.safetensors", lambda file: file.write(save(tensors, {"format": "pt"})))
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        end = "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
            "model_max_length": config.context_length, "clean_up_tokenization_spaces": False}
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")


@dataclass
class ConvertConfig:
    overwrite: bool = False          # replace the run in the second folder


def main(argv: list[str]) -> None:
    """Run one verb of the command line."""
    usage = "usage: python convert.py import FOLDER OUT_DIR [--overwrite=true] | export OUT_DIR FOLDER"
    verb, folders, config, _ = command_line({"import": ConvertConfig, "export": ConvertConfig}, argv, usage)
    try:
        if len(folders) != 2:
            raise ValueError(f"{verb} takes two folders. {usage}")
        source, target = map(Path, folders)
        claim_out_dir(target, config.overwrite, inputs=[source])
        if verb == "export":
            model, tokenizer = load_model(source)
            save_pretrained(model, target, tokenizer)
            for name in () if tokenizer else ("tokenizer.json", "tokenizer_config.json"):      # of a former export
                (target / name).unlink(missing_ok=True)
        else:
            model, tokenizer = from_pretrained(source)
            target.mkdir(parents=True, exist_ok=True)
            (target / "tokenizer.json").unlink(missing_ok=True)        # an overwritten run's is not this model's
            if tokenizer is not None:
                shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
            save_checkpoint(model, None, 0, target / "ckpt.pt",
                            tokenizer_sha256=sha256(source / "tokenizer.json") if tokenizer else None)
            forget_former(target)
        print(f"{target} is written, {'with' if tokenizer else 'without'} a tokenizer")
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
