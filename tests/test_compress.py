"""Claims about compress.py."""
import copy

import pytest
import torch

from common import ids, rng, toy
import checkpoint
import compress
import evaluate
import model as model_module
import onetoken
import sample


def test_the_row_of_the_docstring():
    row = torch.tensor([[0.423, -1.270, 0.056, 0.808]])
    parts = compress.round_int8(row)
    assert parts["q"].tolist() == [[42, -127, 6, 81]] and abs(parts["scale"].item() - 0.01) < 1e-4
    assert (checkpoint.multiplied_out(parts) - row).abs().max() < 0.0055            # half a step, and bfloat16's scale
    parts = compress.round_int4(row.repeat(1, 16))
    assert parts["q"][0, :2].tolist() == [12 * 16 + 0, 10 * 16 + 15]
    back = checkpoint.multiplied_out(parts)
    torch.testing.assert_close(back[:, :4], torch.tensor([[0.392, -1.270, 0.115, 0.808]]), atol=4e-3, rtol=0)


def test_distillation_loss_is_torchs_kl():
    temperature = 2.5
    student, teacher = (torch.randn(2, 5, 7, generator=rng(i)).mul(3).requires_grad_() for i in (0, 1))
    loss = compress.distillation_loss(student, teacher, temperature)
    log_p, log_q = (torch.log_softmax(x.detach() / temperature, -1).view(-1, 7) for x in (teacher, student))
    exact = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature ** 2
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


@pytest.mark.parametrize("kind, error", [("int8", 0.012), ("int4", 0.15)])
@torch.no_grad()
def test_rounded_layers_in_c_and_multiplied_out(kind, error, monkeypatch):
    for d_in, bias, rows in ((128, True, 3), (48, False, 3), (128, True, 70)):   # 48: no multiple of a group, so int8;
        exact = model_module.Linear(d_in, 70, bias)                              # 140 rows: C widens, torch multiplies
        x = torch.randn(2, rows, d_in, generator=rng())
        small, true = compress.RoundedLinear(compress.round_weight(exact.weight, kind), exact.bias), exact(x)
        in_c = small(x)
        with monkeypatch.context() as without_c:
            without_c.setattr(onetoken, "library", lambda: None)
            multiplied_out = small(x)
        assert (multiplied_out - true).abs().max() < error * true.abs().max()
        torch.testing.assert_close(in_c, multiplied_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(small.float()(x), multiplied_out, atol=1e-5, rtol=1e-5)   # scales that C cannot read


@pytest.mark.parametrize("switch", ["tied", "moe", "mla", "gpt2"])
def test_a_quantised_model_still_writes(switch):
    plain, small = toy(switch, d_model=64).eval(), compress.quantize(toy(switch, d_model=64).eval(), "int8")
    text = ids(2, 12)
    assert (small(text) - plain(text)).abs().max() < 0.1 * plain(text).abs().max()
    assert compress.weight_bytes(small) < 0.45 * compress.weight_bytes(plain)
    assert len(sample.generate(small, [1, 2], 8, temperature=0)) == 8
    assert torch.isfinite(compress.quantize(plain, "int4")(text)).all()


def test_magnitude_pruning_takes_the_smallest_weights_of_every_matrix():
    model = toy("tied")
    before = copy.deepcopy(model.state_dict())
    for name, layer in compress.prune(model, 0.3).named_modules():
        if isinstance(layer, model_module.Linear):
            old, zero = before[f"{name}.weight"], layer.weight == 0
            assert zero.sum() == round(0.3 * zero.numel()) and torch.equal(layer.weight[~zero], old[~zero])
            assert old[zero].abs().max() <= old[~zero].abs().min()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "a copy was pruned"


@pytest.mark.parametrize("switch, heads", [("tied", (2, 2)), ("gpt2", (2, 2)), ("qwen3", (2, 1)), ("mqa", (4, 1))])
@torch.no_grad()
def test_width_pruning_gives_a_smaller_dense_model_of_what_matters(switch, heads, tmp_path):
    """Half the heads and neurons do nothing: the half that width pruning leaves computes the same logits."""
    model, text, generator = toy(switch).eval(), ids(3, 20), rng(3)
    c = model.config
    for block in model.layers:
        width = c.n_heads * c.head_dim // c.n_kv_heads
        for unit in torch.randperm(c.n_kv_heads, generator=generator)[:c.n_kv_heads // 2].tolist():
            block.attn.o_proj.weight[:, unit * width:(unit + 1) * width] = 0         # an idle head has no way out
            block.attn.v_proj.weight[unit * c.head_dim:(unit + 1) * c.head_dim] = 0
        idle = torch.randperm(c.d_ff, generator=generator)[:c.d_ff // 2]
        block.ffn.w1.weight[idle] = 0
        if block.ffn.w1.bias is not None:
            block.ffn.w1.bias[idle] = 0
    small = compress.prune(model, 0.5, "width", ids(200))
    assert (small.config.n_heads, small.config.n_kv_heads, small.config.d_ff) == (*heads, c.d_ff // 2)
    torch.testing.assert_close(small(text), model(text), atol=1e-5, rtol=1e-5)
    checkpoint.save_checkpoint(small, None, 0, tmp_path / "ckpt.pt")
    torch.testing.assert_close(model_module.load_model(tmp_path)[0](text), small(text))


def test_what_pruning_cannot_do_is_refused_by_name():
    for switch, share, kind, words in (("moe", 0.5, "width", "n_experts=4"), ("plain", 1.0, "magnitude", "share=1.0"),
                                       ("plain", 0.5, "depth", "kind='depth'")):
        with pytest.raises(ValueError, match=words):
            compress.prune(toy(switch), share, kind)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_folder_opens_everywhere_with_the_same_numbers(kind, little_base, tmp_path, capsys):
    text, small = torch.arange(2, 40)[None], tmp_path / kind
    compress.main(["quantize", str(little_base), str(small), f"--kind={kind}"])
    assert (small / "ckpt.pt").stat().st_size < 0.75 * (little_base / "ckpt.pt").stat().st_size
    loaded, direct = compress.load(small)[0], compress.quantize(model_module.load_model(little_base)[0], kind)
    assert torch.equal(loaded(text), direct(text)), "the file holds what rounding in memory gives"
    plain, _ = model_module.load_model(small)                               # train, align, convert and serve open this
    assert (plain(text) - loaded(text)).abs().max() < 0.03 * plain(text).abs().max()
    (tmp_path / "text.txt").write_text("the cat in the hat " * 9, encoding="utf-8")
    evaluate.main([str(small), f"--data={tmp_path / 'text.txt'}"])
    assert "bits per byte" in capsys.readouterr().out


def test_compress_commands(little_base, tmp_path, capsys):
    base, zeros, thin = str(little_base), str(tmp_path / "zeros"), str(tmp_path / "thin")
    (torch.arange(400) % 300).to(torch.uint16).numpy().tofile(tmp_path / "x.bin")
    compress.main(["prune", base, zeros])
    assert "not zero" in capsys.readouterr().out and (tmp_path / "zeros" / "tokenizer.json").is_file()
    for data in ([], [f"--data={tmp_path / 'x.bin'}"]):
        (tmp_path / "thin").mkdir(exist_ok=True)
        (tmp_path / "thin" / "best.pt").write_bytes(b"of a former run")
        compress.main(["prune", base, thin, "--kind=width", "--share=0.5", "--overwrite=true", *data])
        told = capsys.readouterr().out
        assert "heads 4 -> 2" in told and ("ranked on" in told) == bool(data)
        assert not (tmp_path / "thin" / "best.pt").exists(), "--checkpoint=best.pt would open another model"
