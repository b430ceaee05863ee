"""Claims about align.py, align_losses.py and align_data.py."""
import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from common import random_model, rng
import align
import align_data
import bpe
import checkpoint
import evaluate
import model as model_module
import optim
import sample


@pytest.fixture(scope="module")
def tokenizer(bpe_trained):
    return bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"])


@pytest.mark.parametrize("kind", ["ours", "tokenizers", "transformers"])
def test_prompts_and_responses_become_shifted_rows_with_an_aligned_mask(kind, bpe_trained, tmp_path):
    tokenizer = ours = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>", "<|pad|>"])
    ours.save(tmp_path / "tokenizer.json")
    pad = ours.special_tokens["<|endoftext|>" if kind == "transformers" else "<|pad|>"]
    if kind == "tokenizers":
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if kind == "transformers":           # without a padding token: the end of text
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    prompts, responses = ["the cat", "the hat in the hat"], [" sat<|endoftext|>", " x"]
    batch = align.tokenize_prompt_and_output(prompts, responses, tokenizer)
    rows = [(ours.encode(p), ours.encode(r)) for p, r in zip(prompts, responses)]
    width = max(len(p) + len(r) for p, r in rows)
    for i, (prompt, response) in enumerate(rows):
        whole = (prompt + response + [pad] * width)[:width]
        mask = [len(prompt) <= place < len(prompt + response) for place in range(width)]
        assert batch["input_ids"][i].tolist() == whole[:-1] and batch["labels"][i].tolist() == whole[1:]
        assert batch["response_mask"][i].tolist() == mask[1:]


def test_log_probs_and_entropy_are_those_of_the_logits():
    model, ids = random_model(), torch.randint(0, 50, (3, 9), generator=rng())
    scored = align.response_log_probs(model, ids[:, :-1], ids[:, 1:], return_entropy=True)
    theirs = align.response_log_probs(lambda ids: SimpleNamespace(logits=model(ids)), ids[:, :-1], ids[:, 1:])
    assert torch.equal(theirs["log_probs"], scored["log_probs"]), "Hugging Face's models give an object with logits"
    log_p = torch.log_softmax(model(ids[:, :-1]).double(), dim=-1)
    expected = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(scored["log_probs"].double(), expected, atol=1e-5, rtol=0)     # float32 against float64
    torch.testing.assert_close(scored["token_entropy"].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]], requires_grad=True)
    entropy = align.token_entropy(sure)
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2)]))
    entropy.sum().backward()
    assert sure.grad.isfinite().all()
    with pytest.raises(ValueError, match="temperature=0"):
        align.response_log_probs(model, ids[:, :-1], ids[:, 1:], temperature=0)


def test_masked_sums_and_means_by_hand():
    x, mask = torch.tensor([[1.0, 2, 3], [4, 5, torch.nan]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert align.masked_mean(x, mask).item() == 13 / 4 and align.masked_mean(x, mask, 1).tolist() == [2, 4.5]
    assert align.masked_normalize(x, mask, 0, 2.0).tolist() == [2.5, 2.5, 1.5]
    assert align.masked_mean(x, torch.zeros(2, 3), -1).isnan().all()


def test_sft_step_is_a_sum_per_row_and_a_mean_over_rows():
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]], requires_grad=True)
    loss, _ = align.sft_step(log_probs, torch.tensor([[0, 1, 1], [1, 0, 0]]), 2, constant=3.0)
    assert loss.item() == pytest.approx((5 + 4) / 3 / 2 / 2)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0, 1, 1], [1, 0, 0]]) / -12)


def test_dpo_starts_at_ln_2_and_its_reference_gets_no_gradient():
    sides = [torch.tensor([-3.0, -4.0], requires_grad=True) for _ in range(4)]
    loss = align.dpo_loss(*sides, 0.5)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    loss.sum().backward()
    assert sides[0].grad.tolist() == [-0.25] * 2 and sides[1].grad.tolist() == [0.25] * 2
    assert sides[2].grad is None and sides[3].grad is None
    assert align.dpo_loss(*map(torch.tensor, (1.0, 0.0, 0.0, 2.0)), 0.5).item() == pytest.approx(
        math.log(1 + math.exp(-1.5)))


# --- policy gradients ---

def equal(response, truth):
    """A reward function, one of whose entries not every response has."""
    return {"reward": response == truth, "format_reward": 1} | ({"odd": 1} if response == "a" else {})


@pytest.mark.parametrize("baseline, normalizer, expected", [
    ("mean", "std", [1.5, -0.5, -0.5, -0.5]), ("mean", "none", [0.75, -0.25, -0.25, -0.25]),
    ("mean", "mean", [3, -1, -1, -1]), ("none", "none", [1, 0, 0, 0])])
def test_group_advantages_by_hand(baseline, normalizer, expected):
    rewards, info = align.rollout_rewards(equal, list("abbbcccc"), list("aaaacccc"))
    assert info == {"reward": 5 / 8, "format_reward": 1} and rewards.dtype == torch.float32
    with pytest.raises(ValueError, match="as many of both"):
        align.rollout_rewards(equal, ["a"], ["a", "b"])
    advantages, info = align.group_advantages(rewards, 4, baseline, normalizer)
    torch.testing.assert_close(advantages[:4], torch.tensor(expected).float(), atol=1e-4, rtol=0)
    assert advantages[4:].tolist() == [float(baseline == "none")] * 4       # equal rewards: exactly 0 with a baseline
    assert info["dead_groups"] == (0 if baseline == "none" else 0.5)
    for same in (0.0, 0.1):                                                  # no 0 / 0, no rounding over eps
        alike = torch.full((3,), same, dtype=torch.float64)
        assert align.group_advantages(alike, 3, "mean", normalizer)[0].tolist() == [0, 0, 0]


def test_policy_gradient_losses_by_hand():
    new = torch.log(torch.tensor([[0.5, 0.3], [0.2, 0.9]])).requires_grad_()
    old, advantages = torch.log(torch.tensor([[0.25, 0.3], [0.4, 0.6]])), torch.tensor([2.0, -1.0])
    loss = functools.partial(align.policy_gradient_loss, new, advantages)
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(loss()[0], -advantages[:, None] * new)
    close(loss("noclip", old)[0], torch.tensor([[-4.0, -2], [0.5, 1.5]]))
    clipped, info = loss("grpo", old, 0.2)
    close(clipped, torch.tensor([[-2.4, -2], [0.8, 1.5]]))        # ratios 2, 1, ½, 1½ held to 0.8 … 1.2 where it hurts
    assert float(info["clip_fraction"]) == 0.5
    close(loss("gspo", old, 0.3)[0], torch.tensor([[-2.6] * 2, [0.75 ** 0.5] * 2]))   # means √2 and √¾; 0.7 … 1.3
    soft, info = loss("cispo", old, 0.2)
    close(soft, torch.tensor([[-2.4, -2], [0.5, 1.2]]) * new)
    assert float(info["clip_fraction"]) == 0.5
    close(torch.autograd.grad(soft.sum(), new)[0], torch.tensor([[-2.4, -2], [0.5, 1.2]]))  # none through the ratio


@pytest.mark.parametrize("reweight", align.REWEIGHTS)
def test_what_the_mask_leaves_out_may_be_infinite(reweight):
    values, mask = torch.tensor([[-1.0, -2, -torch.inf]]), torch.tensor([[1, 1, 0]])
    log_probs = values.clone().requires_grad_()
    loss, _ = align.grpo_step(log_probs, mask, 1, torch.tensor([1.0]), reweight, values, 0.2)
    assert loss.isfinite() and log_probs.grad.tolist() == [[-0.5, -0.5, 0]]      # on policy all five are the same


@pytest.mark.parametrize("normalize, constant, expected", [
    ("sequence", None, (-2 + 1) / 2), ("token", None, (-8 + 1) / 5), ("constant", 14, (-8 + 1) / 14)])
def test_three_ways_to_average(normalize, constant, expected):
    mask, per_token = torch.arange(7) < torch.tensor([[4], [1]]), torch.tensor([[-2.0] * 7, [1.0] * 7])
    assert align.aggregate_loss(per_token, mask, normalize, constant).item() == pytest.approx(expected)
    log_probs = torch.zeros(2, 7, requires_grad=True)
    loss, _ = align.grpo_step(log_probs, mask, 2, torch.tensor([2.0, -1]), "noclip", torch.zeros(2, 7), None, normalize,
                              constant)
    assert loss.item() == pytest.approx(expected / (1 if normalize == "constant" else 2))
    empty = align.aggregate_loss(per_token, mask & torch.tensor([[True], [False]]), normalize, constant)
    assert empty.item() == pytest.approx({"sequence": -1, "token": -2, "constant": -8 / 14}[normalize])


@pytest.mark.parametrize("wrong, match", [
    (dict(baseline="median"), "baseline='median'"), (dict(normalizer="max"), "normalizer='max'"),
    (dict(reweight="ppo"), "reweight='ppo'"), (dict(normalize="row"), "normalize='row'"),
    (dict(reweight="noclip"), "old_log_probs"), (dict(reweight="grpo", old_log_probs=torch.zeros(8, 4)), "needs clip"),
    (dict(normalize="constant"), "needs constant"), (dict(group_size=3), "groups"), (dict(group_size=1), "deviation"),
    (dict(responses=["a"]), "8 prompts and 1 responses")])
def test_what_is_unknown_or_missing_is_named(wrong, match, tokenizer):
    with pytest.raises(ValueError, match=match):
        grpo_once(tokenizer, **wrong)


def grpo_once(tokenizer, responses=tuple("abbbcccc"), group_size=4, **more):
    """(model, rows of each forward pass, what the step returned, weights before) of a step with plain SGD."""
    model, rows = random_model(vocab_size=340), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.SGD(model.parameters(), lr=1.0, momentum=0.0)
    result = align.grpo_train_step(model, tokenizer, optimizer, ["the cat "] * 8, list(responses), list("aaaacccc"),
                                   equal, group_size, **more)
    return model, rows, result, before


@pytest.mark.parametrize("normalize, constant", [("sequence", None), ("token", None), ("constant", 30)])
def test_a_step_is_the_plain_ten_lines_however_it_is_divided(tokenizer, normalize, constant):
    responses = ("a", "bb", "b", "bbb", "a", "cc", "b", "a")                   # the second group is dead
    plain = random_model(vocab_size=340)
    groups = torch.tensor([float(r == t) for r, t in zip(responses, "aaaacccc")]).view(-1, 4)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    batch = align.tokenize_prompt_and_output(["the cat "] * 8, list(responses), tokenizer)
    mask, log_p = batch["response_mask"], align.response_log_probs(plain, batch["input_ids"], batch["labels"])
    per_token = -advantages.view(-1, 1) * log_p["log_probs"] * mask
    loss = {"sequence": (per_token.sum(1) / mask.sum(1)).mean(), "token": per_token.sum() / mask.sum(),
            "constant": per_token.sum() / 30}[normalize]
    loss.backward()
    for parts in (1, 3, 8):
        model, rows, (got, info), before = grpo_once(tokenizer, responses, accumulation_steps=parts,
                                                     normalize=normalize, constant=constant)
        assert sum(rows) == 4 and max(rows) <= math.ceil(8 / parts)
        torch.testing.assert_close(got, loss.detach(), atol=1e-6, rtol=0)
        for old, p, q in zip(before, model.parameters(), plain.parameters()):
            torch.testing.assert_close(old - p, q.grad, atol=1e-6, rtol=1e-4)
            assert p.grad is None
        assert info["dead_groups"] == 0.5 and info["reward"] == 1 / 8 and info["format_reward"] == 1
        assert info["norm"] > 0 and info["entropy"] > 0 and info["clip_fraction"] == 0


def test_a_step_over_dead_groups_moves_nothing(tokenizer):
    model, rows, (loss, info), before = grpo_once(tokenizer, "bbbbbbbb")
    assert loss.item() == 0 and info["dead_groups"] == 1 and rows == [] and math.isnan(info["entropy"])
    assert all(torch.equal(old, p) and p.grad is None for old, p in zip(before, model.parameters()))


# --- verifiers and lines ---

@pytest.mark.parametrize("response, truth, rewards", [
    ("so </think> <answer> 1,000 </answer>", 1000, (1, 1)), ("</think> <answer>1/2</answer> and", ["2", "0.5"], (1, 1)),
    ("</think> <answer>4</answer>", "5", (1, 0)), ("</think> <answer></answer>", "", (1, 0)),
    ("<answer>5</answer>", "5", (0, 0)), ("</think> <answer>5", "5", (0, 0)), ("", "", (0, 0))])
def test_r1_zero_reward_wants_the_form_and_the_answer(response, truth, rewards):
    form, right = rewards
    assert align.r1_zero_reward(response, truth) == {"reward": right, "format_reward": form, "answer_reward": right}
    assert align.boxed_reward("so \\boxed{1} or \\boxed{\\frac{3}{4}}.", "0.75")["reward"] == 1
    assert align.boxed_reward("3/4", "0.75") == {"reward": 0, "format_reward": 0, "answer_reward": 0}


def test_packed_documents_are_cut_into_shifted_chunks(tokenizer, tmp_path):
    path = tmp_path / "sft.jsonl"
    pairs = [("say one", "one"), ("say two", "two two"), ("say three", "three, three, three")]
    path.write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in pairs), encoding="utf-8")
    form = evaluate.TEMPLATES["alpaca"][0]
    text = "".join(form.format(prompt=p) + r + "<|endoftext|>" for p, r in pairs)
    ids, data_set = tokenizer.encode(text), align.PackedSFT(tokenizer, path, 32, shuffle=False)
    assert len(data_set) == (len(ids) - 1) // 32 and len(list(data_set)) == len(data_set)
    for i, chunk in enumerate(data_set):
        assert chunk["input_ids"].tolist() == ids[32 * i:32 * i + 32]
        assert chunk["labels"].tolist() == ids[32 * i + 1:32 * i + 33]
    assert not torch.equal(align.PackedSFT(tokenizer, path, 32, shuffle=True).ids, data_set.ids)
    batches = align.iterate_batches(data_set, 2, shuffle=True)
    assert len(batches) == math.ceil(len(data_set) / 2) and next(iter(batches))["labels"].shape == (2, 32)


ASKED = "What does 'Assistant: ' mean?\nHuman: is a word"                   # a name inside a message begins no turn
LINES = {  # what a verb reads alike, and what it cannot read
    "sft": ([{"prompt": ASKED, "response": "4"}, {"instruction": ASKED, "input": "", "output": "4"},
             {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "4"}]}],
            [{"messages": []}, {"messages": [{"role": "system", "content": "x"}]}, {"messages": [{"role": "user"}]},
             {"prompt": 5, "response": "x"}, {"prompt": "x"}]),
    "dpo": ([{"prompt": ASKED, "chosen": "4", "rejected": "5"},
             {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: 4", "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: 5"}],
            [{"chosen": [], "rejected": []}, {"prompt": "a", "chosen": "b", "rejected": "b"},
             {name: f"\n\nHuman: {name}\n\nAssistant: a" for name in ("chosen", "rejected")}]),
    "grpo": ([{"question": ASKED, "answer": "2 and 2 #### 4"}], [{"question": {}, "answer": "x"}])}


@pytest.mark.parametrize("verb", LINES)
def test_published_layouts_read_alike_and_any_bad_line_is_named_and_can_be_skipped(verb, tokenizer, tmp_path):
    path, (good, bad) = tmp_path / "x.jsonl", LINES[verb]
    path.write_text("\n".join(map(json.dumps, good + bad)), encoding="utf-8")
    reader = align_data.make_reader(verb, tokenizer, "alpaca", 999)
    rows, complaints = evaluate.read_jsonl(path, reader, skip=True)
    prompt, *answers = (part if isinstance(part, str) else tokenizer.decode(part) for part in rows[0])
    assert ASKED in prompt and [answer[:1] for answer in answers] == {"dpo": ["4", "5"]}.get(verb, ["4"])
    assert rows == [rows[0]] * len(good) and len(complaints) == len(bad)
    with pytest.raises(ValueError, match=f"x.jsonl:{len(good) + 1}: "):
        evaluate.read_jsonl(path, reader)


# --- the loops ---

CONFIGS = {"sft": align.SFTConfig, "dpo": align.DPOConfig, "grpo": align.GRPOConfig}


def align_run(verb, base, data, out_dir, **more):
    settings = dict(template="chat", skip_bad=True, batch_size=4, micro_batch_size=3, lr=1e-2, log_every=5) | more
    align.run_verb(verb, CONFIGS[verb](base=str(base), data=str(data), out_dir=str(out_dir), **settings))
    return model_module.load_model(out_dir), evaluate.read_jsonl(Path(out_dir) / "log.jsonl")[0][1:]


def test_sft_teaches_answers_and_to_stop_and_dpo_turns_the_model_round(little_base, tmp_path, capsys):
    data = little_base / "sft.jsonl"
    with pytest.raises(ValueError, match=r"5 bad lines(?s:.*)jsonl:9: (?s:.*)11: an empty response"):
        align_run("sft", little_base, data, tmp_path / "sft", skip_bad=False)
    (model, tokenizer), log = align_run("sft", little_base, data, tmp_path / "sft", steps=60)
    assert "8 usable lines, 5 bad ones skipped" in capsys.readouterr().out and log[-1]["loss"] < 0.05 < log[0]["loss"]
    stop = tokenizer.special_tokens["<|end|>"]
    for prompt, answer in (("cat<|end|>", "hat<|end|>"), ("hat", "cat cat<|end|>")):
        ids = evaluate.render(tokenizer, "chat", [prompt])
        assert ids.count(stop) == 1                                  # the user's own "<|end|>" is plain text
        assert tokenizer.decode(sample.generate(model, ids, 20, temperature=0, stop_ids=(stop,))) == answer
    with pytest.raises(ValueError, match="--overwrite=true"):
        align_run("sft", little_base, data, tmp_path / "sft")
    _, log = align_run("dpo", tmp_path / "sft", little_base / "dpo.jsonl", tmp_path / "dpo", steps=30, lr=3e-3,
                       val_fraction=0.25)
    held = [line for line in log if "val_loss" in line]
    assert held[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4) and held[0]["val_accuracy"] == 0.5
    assert held[-1]["val_accuracy"] == 1 and held[-1]["val_margin"] > 0.1


def vowel(response, truth):
    """A reward that an untrained model can earn."""
    return {"reward": float(response[:1] in "aeiou ")}


@pytest.mark.parametrize("more", [dict(reweight="none", baseline="none", normalizer="none", normalize="token"),
                                  dict(reweight="gspo", normalize="constant", epochs=2, batch_size=5)])
def test_grpo_raises_a_reward_that_can_be_had(little_base, tmp_path, monkeypatch, more):
    settings = dict(reward="boxed", prompts_per_step=4, group_size=8, batch_size=32, micro_batch_size=16,
                    max_new_tokens=4, lr=1e-2, steps=25, log_every=1) | more
    with pytest.raises(ValueError, match="5 rollouts in a row.*align.py sft.*--group_size"):       # no answer is right
        align_run("grpo", little_base, little_base / "grpo.jsonl", tmp_path, **settings | dict(baseline="mean"))
    assert not (tmp_path / "ckpt.pt").exists()
    monkeypatch.setitem(align.REWARDS, "boxed", vowel)
    _, log = align_run("grpo", little_base, little_base / "grpo.jsonl", tmp_path, **settings)
    first, last = (sum(line["reward"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.15, (first, last)       # of 160 answers each: some four standard deviations
    assert {"dead_groups", "distinct", "eos_rate", "length", "entropy", "clip_fraction", "norm"} <= set(log[0])


def test_figures_of_a_rollout_are_means_over_all_its_batches_that_teach_something(monkeypatch):
    steps = iter([{"norm": float(c < 1), "clip_fraction": c % 1} for c in (0.0, 0.2, 0.4, 0.6, 1.0, 1.0)])
    monkeypatch.setattr(align, "policy_step", lambda *arguments, **settings: (None, next(steps)))
    batch = {name: torch.zeros(6, 4, dtype=torch.long) for name in ("input_ids", "labels", "response_mask")}
    config = align.GRPOConfig(reweight="none", epochs=2, batch_size=2)
    info = align.learn(None, [], batch, torch.zeros(6), config, torch.Generator().manual_seed(0))
    assert info == {"norm": 1.0, "clip_fraction": pytest.approx(0.3)} and next(steps, None) is None


@pytest.mark.parametrize("verb", CONFIGS)
def test_a_base_of_nan_is_named_and_an_older_run_stays_whole(verb, little_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(align.REWARDS, "boxed", vowel)
    base, out, new = (shutil.copytree(little_base, tmp_path / name) for name in ("base", "out", "new"))
    (new / "ckpt.pt").unlink()                                           # no run: no flag to start again
    state = checkpoint.read_checkpoint(base / "ckpt.pt")
    state["model"]["layers.0.ffn.w1.weight"][0, 0] = math.nan
    torch.save(state, base / "ckpt.pt")
    before = {path: path.read_bytes() for folder in (out, new) for path in folder.iterdir()}
    words = [verb, f"--data={little_base / verb}.jsonl", "--skip_bad=true", "--template=chat"]
    words += ["--reward=boxed", "--max_new_tokens=4"] if verb == "grpo" else []
    for more in ([f"--base={little_base}", f"--out_dir={new}", "--lr=1e30", "--grad_clip=1e30", "--warmup_steps=0"],
                 [f"--base={base}", f"--out_dir={out}", "--steps=2", "--overwrite=true"]):
        with pytest.raises(SystemExit) as end:
            align.main(words + more)
        assert end.value.code == 2
    assert "the model gives NaN" in capsys.readouterr().err
    after = {path: path.read_bytes() for folder in (out, new) for path in folder.iterdir()}
    assert {path: after[path] for path in after if path.name != "log.new.jsonl"} == before
