"""Claims about convert.py."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
from bpe import Tokenizer
from checkpoint import save_checkpoint
from common import ids, toy
from convert import from_pretrained, save_pretrained
from model import load_model

def read_config(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder, config) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=101, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
GPT2_SHAPE = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
FAMILIES = {"llama2": ("Llama", {}), "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
            "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True)),
            "mixtral": ("Mixtral", dict(num_local_experts=4)), "gpt2": ("GPT2", {})}


def reference():
    return pytest.importorskip("transformers", reason="a reference for tests only: pip install transformers")


def hugging_face_model(family: str):
    """A tiny random model of transformers, every tensor random, its biases and norms too."""
    transformers = reference()
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(GPT2_SHAPE if family == "gpt2" else SHAPE), **more)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM")(config).eval()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.15, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize("family, shards", [*((family, False) for family in FAMILIES), ("llama3", True)])
def test_hugging_face_models_come_in_and_go_out(family, shards, tmp_path):
    """In float32 through both libraries; then in bfloat16 back to ours, with config.json as transformers 5 and as 4
    writes it, and over the files that it was read from."""
    theirs, tokens, out = hugging_face_model(family), ids(3, 37), tmp_path / "out"
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == shards
    ours, tokenizer = from_pretrained(tmp_path / "in")
    save_pretrained(ours, out)
    again = reference().AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert tokenizer is None and (ours(tokens) - expected).abs().max() < 1e-4
        assert type(again) is type(theirs) and (again(tokens).logits - expected).abs().max() < 1e-4
    before, after = {}, load_file(out / "model.safetensors")
    for file in (tmp_path / "in").glob("*.safetensors"):
        before |= load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    back = ours.to(torch.bfloat16)
    for left_out in (("torch_dtype", "rope_theta", "rope_scaling"), ("dtype", "rope_parameters")):
        save_pretrained(back, out)
        write_config(out, {key: value for key, value in read_config(out).items() if key not in left_out})
        back, _ = from_pretrained(out)
        assert {p.dtype for p in back.parameters()} == {torch.bfloat16} and torch.equal(back(tokens), ours(tokens))
        assert (back.lm_head.weight is back.token_embeddings.weight) == back.config.tie_embeddings


SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize("settings, refused", [
    ({"rope_parameters": {"rope_theta": 777.0}, "rope_scaling": SCALED, "rope_theta": 5e5}, ""),
    ({"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_parameters": {"full_attention": LLAMA3}}, "one for all"),
    ({"rope_scaling": {key: value for key, value in SCALED.items() if key[0] != "o"}, "rope_theta": 1e4}, "")])
def test_rope_is_transformers_rope_or_refused(settings, refused, tmp_path):
    hugging_face_model("llama2").save_pretrained(tmp_path)
    write_config(tmp_path, {key: value for key, value in read_config(tmp_path).items() if "rope" not in key} | settings)
    if refused:
        with pytest.raises(ValueError, match=f"config.json.*{refused}"):
            from_pretrained(tmp_path)
        return
    theirs = reference().AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (from_pretrained(tmp_path)[0](ids(2, 24)) - theirs(ids(2, 24)).logits).abs().max() < 1e-4


def test_of_several_weights_in_a_folder_transformers_takes_the_same(tmp_path):
    model = hugging_face_model("llama2")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    kept = {path: path.read_bytes() for path in (*tmp_path.glob("model-*"), tmp_path / "model.safetensors.index.json")}
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    for path, content in kept.items():           # left from before, beside the whole file
        path.write_bytes(content)
    theirs = reference().AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs(ids(1, 9)).logits.abs().max() == from_pretrained(tmp_path)[0](ids(1, 9)).abs().max() == 0


@pytest.mark.parametrize("switch, words", [("window", "window_pattern=SSL"), ("smear", "--smear=false"),
                                           ("shift keys", "--shift_keys=false --rope_pattern=R"),
                                           ("moe bias", "balance=bias")])
def test_what_no_architecture_computes_is_refused_by_name(switch, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_pretrained(toy(switch), tmp_path)
    assert not list(tmp_path.iterdir())


def test_gpt2_files_of_any_age_are_read_and_what_our_layers_lack_is_refused_by_name(tmp_path):
    def saved(switch, **more):
        model = toy(switch, **more).eval()
        save_pretrained(model, tmp_path)
        return model, load_file(tmp_path / "model.safetensors"), read_config(tmp_path)

    def read(tensors, config):
        save_file(tensors, tmp_path / "model.safetensors")
        write_config(tmp_path, config)
        return from_pretrained(tmp_path)[0]
    _, qwen_tensors, qwen = saved("qwen3")
    model, tensors, config = saved("gpt2", tie_embeddings=True)
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)              # the causal mask, a tensor in the first files
    assert torch.equal(read(old, config)(ids(1, 9)), model(ids(1, 9)))
    bias = "transformer.ln_f.bias"
    without = {name: tensor for name, tensor in tensors.items() if name != bias}
    for words, stored, settings in (
            ("no tensor 'transformer.h.0.odd.weight'", tensors | {"transformer.h.0.odd.weight": torch.ones(2)}, config),
            (f"'{bias}' is missing", without, config), ("ln_f.bias is", tensors | {bias: torch.ones(3)}, config),
            ("BloomForCausalLM", tensors, config | {"architectures": ["BloomForCausalLM"]}),
            ("attention_bias=True", qwen_tensors, qwen | {"attention_bias": True}),
            ("sliding_window=5", qwen_tensors, qwen | {"use_sliding_window": True, "sliding_window": 5}),
            ("partial_rotary_factor", qwen_tensors, qwen | {"rope_parameters": {"partial_rotary_factor": 0.5}})):
        with pytest.raises(ValueError, match=words) as error:
            read(stored, settings)
        assert str(tmp_path) in str(error.value)
    write_config(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        from_pretrained(tmp_path)


def test_folders_by_command_with_their_tokenizer(tmp_path, capsys):
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"<|endoftext|>"}, [(b"t", b"h")],
                          ["<|endoftext|>"])
    run, folder, again = (str(tmp_path / name) for name in ("run", "folder", "again"))
    model, weights = toy("qwen3", vocab_size=258).eval(), tmp_path / "run" / "ckpt.pt"
    weights.parent.mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    save_checkpoint(model, None, 0, weights)
    convert.main(["export", run, folder])
    convert.main(["import", folder, again])
    back, its_tokenizer = load_model(again)
    assert torch.equal(back(ids(1, 9)), model(ids(1, 9)))
    assert its_tokenizer.encode("the end") == tokenizer.encode("the end")
    theirs = reference().AutoTokenizer.from_pretrained(folder)
    assert theirs("the<|endoftext|>")["input_ids"] == tokenizer.encode("the<|endoftext|>")
    kept = weights.read_bytes()
    for words in (["import", folder, run], ["export", again, run]):
        with pytest.raises(SystemExit, match="2"):
            convert.main(words)
        assert "--overwrite=true" in capsys.readouterr().err and weights.read_bytes() == kept
    (tmp_path / "run" / "best.pt").write_bytes(b"of the former run")
    convert.main(["import", folder, run, "--overwrite=true"])
    assert not (tmp_path / "run" / "best.pt").exists(), "--checkpoint=best.pt would open another model"
    assert weights.read_bytes() != kept
    (tmp_path / "run" / "tokenizer.json").unlink()
    convert.main(["export", run, folder])
    assert convert.from_pretrained(folder)[1] is None, "the former model's tokenizer is gone"
    tokenizer.with_special(["<|pad|>"]).save(tmp_path / "folder" / "tokenizer.json")
    with pytest.warns(UserWarning, match="more ids than the model's 258"):
        assert convert.from_pretrained(folder)[1] is None
