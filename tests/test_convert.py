"""Claims about convert.py."""
import json

import pytest
import torch

from common import ids, toy, weights# noqa: F401

def hugging_face_model(family: str):
    """A tiny random model of transformers, every tensor random, its biases and norms too."""
    transformers = pytest.importorskip("transformers",
                                       reason="a reference for tests only: pip install transformers==5.23.0")
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=101, max_position_embeddings=64, bos_token_id=None,
                 eos_token_id=None)
    llama3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=16)
    name, more = {
        "llama2": ("Llama", {}), "llama3": ("Llama", dict(rope_parameters=llama3, tie_word_embeddings=True)),
        "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
        "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5,
                                max_window_layers=1)), "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True)),
        "mixtral": ("Mixtral", dict(num_local_experts=4, sliding_window=7)), "gpt2": ("GPT2", {})}[family]
    if family == "gpt2":
        shape = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64, bos_token_id=None,
                     eos_token_id=None)
    config = getattr(transformers, f"{name}Config")(**shape, **more)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM")(config).eval()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.15, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize("shards", ["one file", "shards"])
@pytest.mark.parametrize("family", ["llama2", "llama3", "linear", "qwen2", "qwen3", "mixtral", "gpt2"])
def test_hugging_face_models_come_in_and_go_out(family, shards, tmp_path):
    from convert import from_pretrained, save_pretrained
    from safetensors.torch import load_file
    theirs = hugging_face_model(family)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB" if shards == "shards" else "1GB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == (shards == "shards")
    ours, tokenizer = from_pretrained(tmp_path / "in")
    tokens = torch.randint(0, 101, (3, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert tokenizer is None and (ours(tokens) - expected).abs().max() < 1e-4
        save_pretrained(ours, tmp_path / "out")
        import transformers
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert type(again) is type(theirs) and (again(tokens).logits - expected).abs().max() < 1e-4
    before = {
        name: tensor for file in (tmp_path / "in").glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("switch, architecture", [("plain", "Llama"), ("qwen3", "Qwen3"), ("tied", "Llama"),
                                                  ("moe", "Mixtral"), ("gpt2", "GPT2"), ("llama3", "Llama"),
                                                  ("window", None), ("mla", None), ("mtp", None), ("2017", None)])
def test_models_of_ours_go_out_and_come_back(switch, architecture, tmp_path):
    from convert import from_pretrained, save_pretrained
    model = toy(switch).eval()
    if architecture is None:
        with pytest.raises(
                ValueError, match={
                    "window": "window_pattern=SSL", "mla": "attention=mla", "mtp": "mtp_depth=2",
                    "2017": "norm_position=post"}[switch]):
            save_pretrained(model, tmp_path)
        return
    save_pretrained(model.to(torch.bfloat16), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["architectures"][0].startswith(
        architecture) and written["dtype"] == written["torch_dtype"] == "bfloat16"
    for old in (False, True):                                      # config.json as transformers 5, then as 4 writes it
        keys = ("dtype", "rope_parameters") if old else ("torch_dtype", "rope_theta", "rope_scaling")
        (tmp_path / "config.json").write_text(
            json.dumps({key: value for key, value in written.items() if key not in keys}), encoding="utf-8")
        back, _ = from_pretrained(tmp_path)
        assert back.lm_head.weight.dtype == torch.bfloat16 and torch.equal(back(ids(2, 9)), model(ids(2, 9)))
        assert (back.lm_head.weight is back.token_embeddings.weight) == (switch == "tied")
    assert torch.equal(from_pretrained(tmp_path, torch.float32)[0].lm_head.weight, model.lm_head.weight.float())


def test_old_gpt2_files_and_unknown_things_by_name(tmp_path):
    from convert import from_pretrained, save_pretrained
    from safetensors.torch import load_file, save_file
    model = toy("gpt2", tie_embeddings=True).eval()
    save_pretrained(model, tmp_path)
    config, weights = json.loads(
        (tmp_path / "config.json").read_text(encoding="utf-8")), load_file(tmp_path / "model.safetensors")

    def written(tensors, **changes):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return from_pretrained(tmp_path)[0]

    old = {name.removeprefix("transformer."): tensor
           for name, tensor in weights.items()} | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}
    head = {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    assert torch.equal(written(old)(ids(1, 9)), model(ids(1, 9))) and torch.equal(
        written(weights | head)(ids(1, 9)), model(ids(1, 9)))
    for tensors, changes, words in ((weights | {"transformer.h.0.attn.rotary.weight": torch.ones(2)}, {},
                                     "no tensor 'transformer.h.0.attn.rotary.weight'"),
                                    ({name: t for name, t in weights.items()
                                      if "ln_f.bias" not in name}, {}, "'transformer.ln_f.bias' is missing"),
                                    (weights | {"transformer.ln_f.bias": torch.ones(3)}, {}, "ln_f.bias has shape"),
                                    (weights | {"lm_head.weight": torch.ones(61, 48)}, {}, "not the embedding"),
                                    (weights, {"architectures": ["BloomForCausalLM"]},
                                     "BloomForCausalLM"), (weights, {"activation_function": "relu"},
                                                           "activation_function='relu'"),
                                    (weights | {"transformer.ln_f.bias": torch.ones(48, dtype=torch.int8)}, {},
                                     "stored as I8")):
        with pytest.raises(ValueError, match=words) as error:
            written(tensors, **changes)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors are read"):
        from_pretrained(tmp_path)
    save_pretrained(toy(), tmp_path)
    llama = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for changes in ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4,
                                         "factor": 4.0}}, {"attention_bias": True}):
        (tmp_path / "config.json").write_text(json.dumps(llama | changes), encoding="utf-8")
        with pytest.raises(ValueError, match="yarn|attention_bias=True"):
            from_pretrained(tmp_path)


def test_folders_by_command_with_their_tokenizer(tmp_path):
    from bpe import Tokenizer
    from checkpoint import load_model, save_checkpoint
    import convert
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"<|endoftext|>"}, [(b"t", b"h")],
                          ["<|endoftext|>"])
    model = toy("qwen3", vocab_size=258).eval()
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    save_checkpoint(model, None, 0, tmp_path / "run" / "ckpt.pt")
    convert.main(["export", str(tmp_path / "run"), str(tmp_path / "folder")])
    convert.main(["import", str(tmp_path / "folder"), str(tmp_path / "again")])
    back, its_tokenizer = load_model(tmp_path / "again")
    assert torch.equal(back(ids(1, 9)), model(ids(
        1, 9))) and its_tokenizer.encode("the end") == tokenizer.encode("the end")
    for words in (["import", "x"], ["improt", "a", "b"], ["import", str(tmp_path / "nowhere"),
                                                          "b"], ["import", "a", "b", "--x=1"]):
        with pytest.raises(SystemExit) as error:
            convert.main(words)
        assert error.value.code == 2
    transformers = pytest.importorskip("transformers",
                                       reason="a reference for tests only: pip install transformers==5.23.0")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs("the end<|endoftext|>")["input_ids"] == tokenizer.encode(
        "the end<|endoftext|>") and theirs.eos_token == "<|endoftext|>"
