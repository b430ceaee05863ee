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

SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=101, max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
GPT2_SHAPE = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=101, n_positions=64, bos_token_id=None, eos_token_id=None)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
FAMILIES = {
    "llama2": ("Llama", {}),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
    "gpt2": ("GPT2", {})}


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
    theirs = hugging_face_model(family)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="60KB" if shards else "1GB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == shards
    ours, tokenizer = from_pretrained(tmp_path / "in")
    tokens = torch.randint(0, 101, (3, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert tokenizer is None and (ours(tokens) - expected).abs().max() < 1e-4
        save_pretrained(ours, tmp_path / "out")
        again = reference().AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert type(again) is type(theirs) and (again(tokens).logits - expected).abs().max() < 1e-4
    before = {}
    for file in (tmp_path / "in").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize("settings, refused", [
    ({"rope_parameters": {"rope_theta": 777.0}, "rope_scaling": SCALED, "rope_theta": 5e5}, ""),
    ({"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_parameters": {"full_attention": LLAMA3}}, "one for all"),
    ({"rope_scaling": {key: value for key, value in SCALED.items() if key[0] != "o"}, "rope_theta": 1e4}, "")])
def test_rope_is_transformers_rope_or_refused(settings, refused, tmp_path):
    transformers = reference()
    hugging_face_model("llama2").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    written = {key: value for key, value in written.items() if "rope" not in key} | settings
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    if refused:
        with pytest.raises(ValueError, match=f"config.json.*{refused}"):
            from_pretrained(tmp_path)
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (from_pretrained(tmp_path)[0](ids(2, 24)) - theirs(ids(2, 24)).logits).abs().max() < 1e-4


def test_of_several_weights_in_a_folder_transformers_takes_the_same(tmp_path):
    transformers, model = reference(), hugging_face_model("llama2")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    kept = {path: path.read_bytes() for path in (*tmp_path.glob("model-*"), tmp_path / "model.safetensors.index.json")}
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    for path, content in kept.items():           # left from before, beside the whole file
        path.write_bytes(content)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs(ids(1, 9)).logits.abs().max() == from_pretrained(tmp_path)[0](ids(1, 9)).abs().max() == 0


@pytest.mark.parametrize("switch, architecture", [("qwen3", "Qwen3"), ("tied", "Llama"), ("moe", "Mixtral"),
                                                  ("gpt2", "GPT2")])
def test_models_of_ours_go_out_and_come_back_in_bfloat16(switch, architecture, tmp_path):
    model = toy(switch).eval().to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["architectures"][0].startswith(architecture)
    for left_out in (("torch_dtype", "rope_theta", "rope_scaling"), ("dtype", "rope_parameters")):
        # config.json as transformers 5 and as 4 writes it
        spelled = {key: value for key, value in written.items() if key not in left_out}
        (tmp_path / "config.json").write_text(json.dumps(spelled), encoding="utf-8")
        back, _ = from_pretrained(tmp_path)
        assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
        assert torch.equal(back(ids(2, 9)), model(ids(2, 9)))
        assert (back.lm_head.weight is back.token_embeddings.weight) == (switch == "tied")
    save_pretrained(back, tmp_path)                # over the files that it was read from
    assert torch.equal(from_pretrained(tmp_path)[0](ids(2, 9)), model(ids(2, 9)))


@pytest.mark.parametrize("switch, words", [("window", "window_pattern=SSL"), ("smear", "--smear=false"),
                                           ("moe bias", "balance=bias")])
def test_what_no_architecture_computes_is_refused_by_name(switch, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_pretrained(toy(switch), tmp_path)
    assert not list(tmp_path.iterdir())


def test_gpt2_files_of_any_age_are_read_and_what_our_layers_lack_is_refused_by_name(tmp_path):
    def write(tensors, config):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return from_pretrained(tmp_path)[0]

    def saved(switch, **more):
        model = toy(switch, **more).eval()
        save_pretrained(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        return model, load_file(tmp_path / "model.safetensors"), config

    model, tensors, config = saved("gpt2", tie_embeddings=True)
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)              # the causal mask, a tensor in the first files
    assert torch.equal(write(old, config)(ids(1, 9)), model(ids(1, 9)))
    bias = "transformer.ln_f.bias"
    without = {name: tensor for name, tensor in tensors.items() if name != bias}
    _, qwen_tensors, qwen = saved("qwen3")
    for stored, settings, words in (
            (tensors | {"transformer.h.0.odd.weight": torch.ones(2)}, config, "no tensor 'transformer.h.0.odd.weight'"),
            (without, config, f"'{bias}' is missing"), (tensors | {bias: torch.ones(3)}, config, "ln_f.bias is"),
            (tensors, config | {"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM"),
            (qwen_tensors, qwen | {"attention_bias": True}, "attention_bias=True"),
            (qwen_tensors, qwen | {"use_sliding_window": True, "sliding_window": 5}, "sliding_window=5"),
            (qwen_tensors, qwen | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor")):
        with pytest.raises(ValueError, match=words) as error:
            write(stored, settings)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for content, error in ((b"not tensors", ValueError), (None, FileNotFoundError)):
        (tmp_path / "model.safetensors").unlink()
        if content:
            (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(error, match="safetensors"):
            from_pretrained(tmp_path)


def test_folders_by_command_with_their_tokenizer(tmp_path, capsys):
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"<|endoftext|>"}, [(b"t", b"h")],
                          ["<|endoftext|>"])
    run, folder, again = (str(tmp_path / name) for name in ("run", "folder", "again"))
    model = toy("qwen3", vocab_size=258).eval()
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    save_checkpoint(model, None, 0, tmp_path / "run" / "ckpt.pt")
    for words, message in ((["export", run, run], run), (["import", "x"], "import FOLDER OUT_DIR")):
        with pytest.raises(SystemExit, match="2"):
            convert.main(words)
        assert message in capsys.readouterr().err
    convert.main(["export", run, folder])
    convert.main(["import", folder, again])
    back, its_tokenizer = load_model(again)
    assert torch.equal(back(ids(1, 9)), model(ids(1, 9)))
    assert its_tokenizer.encode("the end") == tokenizer.encode("the end")
    kept = (tmp_path / "run" / "ckpt.pt").read_bytes()
    for words in (["import", folder, run], ["export", again, run]):
        with pytest.raises(SystemExit, match="2"):
            convert.main(words)
        assert "--overwrite=true" in capsys.readouterr().err and (tmp_path / "run" / "ckpt.pt").read_bytes() == kept
    (tmp_path / "run" / "best.pt").write_bytes(b"of the former run")
    convert.main(["import", folder, run, "--overwrite=true"])
    assert not (tmp_path / "run" / "best.pt").exists(), "--checkpoint=best.pt would open another model"
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() != kept
    theirs = reference().AutoTokenizer.from_pretrained(folder)
    assert theirs("the<|endoftext|>")["input_ids"] == tokenizer.encode("the<|endoftext|>")
