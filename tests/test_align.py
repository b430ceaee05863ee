"""Claims about align.py."""
import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch

from common import ids, random_model, rng# noqa: F401
import align
import bpe
import checkpoint
import model as model_module
import data
import evaluate
import sample
import train

@pytest.mark.parametrize("kind", ["ours", "tokenizers", "transformers"])
def test_prompts_and_responses_become_shifted_rows_with_an_aligned_mask(kind, bpe_trained, tmp_path):
    ours = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>", "<|pad|>"])
    ours.save(tmp_path / "tokenizer.json")
    tokenizer, pad = ours, ours.special_tokens["<|pad|>"]
    if kind == "tokenizers":
        tokenizer, pad = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), 0
    if kind == "transformers":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<|pad|>")
    prompts, responses = ["the cat", "the hat in the hat"], [" sat<|endoftext|>", " x"]
    batch = align.tokenize_prompt_and_output(prompts, responses, tokenizer)
    rows = [(ours.encode(p), ours.encode(r)) for p, r in zip(prompts, responses)]
    width = max(len(p) + len(r) for p, r in rows)
    for i, (prompt, response) in enumerate(rows):
        whole = (prompt + response + [pad] * width)[:width]
        mask = [len(prompt) <= place < len(prompt + response) for place in range(width)]
        assert batch["input_ids"][i].tolist() == whole[:-1] and batch["labels"][i].tolist() == whole[1:]
        assert batch["response_mask"][i].tolist() == mask[1:]
        assert batch["labels"][i][batch["response_mask"][i]].tolist() == response   # the EOS is learnt, padding not
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        align.tokenize_prompt_and_output(prompts, responses[:1], tokenizer)


def test_log_probs_and_entropy_are_those_of_the_logits():
    model, ids = random_model(), torch.randint(0, 50, (3, 9), generator=rng())
    found = align.response_log_probs(model, ids[:, :-1], ids[:, 1:], return_entropy=True)
    log_p = torch.log_softmax(model(ids[:, :-1]).double(), dim=-1)
    expected = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found["log_probs"].double(), expected, atol=1e-5, rtol=0)     # float32 against float64
    torch.testing.assert_close(found["token_entropy"].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)
    assert set(align.response_log_probs(model, ids[:, :-1], ids[:, 1:])) == {"log_probs"}

    def theirs(tokens):
        return type("Output", (), {"logits": model(tokens)})
    assert torch.equal(align.response_log_probs(theirs, ids[:, :-1], ids[:, 1:])["log_probs"], found["log_probs"])
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]])
    torch.testing.assert_close(align.token_entropy(sure), torch.tensor([0.0, math.log(2)]))


def test_masked_sums_and_means_by_hand():
    x, mask = torch.tensor([[1.0, 2, 3], [4, 5, torch.nan]]), torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert align.masked_mean(x, mask).item() == 13 / 4 and align.masked_mean(x, mask, 1).tolist() == [2, 4.5]
    assert align.masked_normalize(x, mask, 0, 2.0).tolist() == [2.5, 2.5, 1.5]
    assert align.masked_normalize(x, mask, constant=10).item() == pytest.approx(1.3)
    assert align.masked_mean(x, torch.zeros(2, 3), -1).isnan().all()
    # The course's example: 4 and 7 of 7 tokens, advantage 2 everywhere.
    ratio, mask = torch.full((2, 7), 2.0), torch.arange(7) < torch.tensor([[4], [7]])
    assert align.masked_mean(ratio, mask, 1).tolist() == [2, 2]
    torch.testing.assert_close(align.masked_normalize(ratio, mask, 1, 7.0), torch.tensor([8 / 7, 2.0]))


def test_sft_step_is_a_sum_per_row_and_a_mean_over_rows():
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]], requires_grad=True)
    loss, _ = align.sft_step(log_probs, torch.tensor([[0, 1, 1], [1, 0, 0]]), 2, constant=3.0)
    assert loss.item() == pytest.approx((5 + 4) / 3 / 2 / 2)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[0, 1, 1], [1, 0, 0]]) / -12)


def test_group_advantages_by_hand():
    reward_fn = lambda response, truth: {"reward": float(response == truth), "format_reward": 1.0}        # noqa: E731
    made = functools.partial(align.group_normalized_rewards, reward_fn, ["a", "b", "b", "b", "c", "c", "c", "c"],
                             ["a"] * 4 + ["c"] * 4, 4)
    advantages, rewards, info = made()
    assert rewards.tolist() == [1, 0, 0, 0, 1, 1, 1, 1] and info["groups_without_variance"] == 0.5
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]) / (0.5 + 1e-6))
    assert made(normalize_by_std=False)[0].tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert align.group_normalized_rewards(reward_fn, ["a"], ["a"], 1)[0].tolist() == [0]
    with pytest.raises(ValueError, match="groups of 3"):
        align.group_normalized_rewards(reward_fn, ["a"] * 4, ["a"] * 4, 3)


def test_policy_gradient_losses_by_hand():
    new, old = torch.log(torch.tensor([[0.5, 0.3], [0.2, 0.9]])), torch.log(torch.tensor([[0.25, 0.3], [0.4, 0.6]]))
    rewards, advantages = torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [-1.0]])
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(align.policy_gradient_loss(new, "no_baseline", rewards)[0], torch.stack((-new[0], torch.zeros(2))))
    close(align.policy_gradient_loss(new, "reinforce_with_baseline", None, advantages)[0], -advantages * new)
    unbounded = align.policy_gradient_loss(new, "grpo_no_clip", None, advantages, old)[0]
    close(unbounded, torch.tensor([[-4.0, -2], [0.5, 1.5]]))
    loss, info = align.policy_gradient_loss(new, "grpo_clip", None, advantages, old, 0.2)
    close(loss, torch.tensor([[-2.4, -2], [0.8, 1.5]]))           # ratios 2, 1, ½, 1½ held to 0.8 … 1.2 where it hurts
    assert info["clipped"].tolist() == [[True, False], [True, False]]
    for kind, words in (("grpo_clip", "old_log_probs, clip"), ("ppo", "must be one of"), ("no_baseline", "rewards")):
        with pytest.raises(ValueError, match=words):
            align.policy_gradient_loss(new, kind, None, advantages)


@pytest.mark.parametrize("normalize, constant, expected", [
    ("sequence", None, (-2 + 1) / 2), ("token", None, (-8 + 1) / 5), ("constant", 7, (-8 + 1) / 7 / 2)])
def test_grpo_step_normalises_as_named_and_survives_an_empty_row(normalize, constant, expected):
    named, advantages = dict(normalize=normalize, constant=constant), torch.tensor([[2.0], [-1.0]])
    old = torch.zeros(2, 7)
    mask = torch.arange(7) < torch.tensor([[4], [1]])
    log_probs = torch.zeros(2, 7, requires_grad=True)
    loss, _ = align.grpo_step(log_probs, mask, 1, "grpo_clip", None, advantages, old, 0.2, **named)
    assert loss.item() == pytest.approx(expected)
    on_policy, log_probs.grad = log_probs.grad, None      # one epoch, one batch: the ratio is 1, REINFORCE's gradient
    align.grpo_step(log_probs, mask, 1, "reinforce_with_baseline", None, advantages, **named)
    torch.testing.assert_close(log_probs.grad, on_policy)
    log_probs.grad, first_row = None, mask & torch.tensor([[True], [False]])
    loss, info = align.grpo_step(log_probs, first_row, 2, "grpo_clip", None, advantages, old, 0.2,
                                 ref_log_probs=torch.ones(2, 7), kl_weight=0.5)
    assert info["kl"].item() == pytest.approx(math.e - 2) and log_probs.grad.isfinite().all()
    assert loss.item() == pytest.approx((-2 + 0.5 * (math.e - 2)) / 2 / 2)


def test_dpo_starts_at_ln_2_with_a_gradient():
    chosen, rejected = torch.tensor([-3.0, -4.0], requires_grad=True), torch.tensor([-2.0, -9.0], requires_grad=True)
    loss = align.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.5)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    loss.sum().backward()
    assert chosen.grad.tolist() == [-0.25] * 2 and rejected.grad.tolist() == [0.25] * 2
    assert align.dpo_loss(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(2.0), 0.5).item() == \
        pytest.approx(math.log(1 + math.exp(-1.5)))


@pytest.mark.parametrize("response, truth, rewards", [
    ("so </think> <answer> 1,000 </answer>", 1000, (1, 1)), ("</think> <answer>1/2</answer> and more", "0.5", (1, 1)),
    ("</think> <answer>\\frac{1}{2}</answer>", "1/2", (1, 1)), ("</think> <answer>4</answer>", "5", (1, 0)),
    ("</think> <answer></answer>", "", (1, 0)), ("<answer>5</answer>", "5", (0, 0)), ("5", "5", (0, 0)),
    ("</think> <answer>5", "5", (0, 0)), ("</think> <answer>b a</answer>", "B A", (1, 1)),
    ("</think> <answer>?</answer>", None, (1, 0)),
    ("</think> <answer>1e999999999</answer>", "7", (1, 0)), ("", "", (0, 0))])
def test_r1_zero_reward_wants_the_form_and_the_answer(response, truth, rewards):
    form, right = rewards
    assert align.r1_zero_reward(response, truth) == {"reward": right, "format_reward": form, "answer_reward": right}


def test_boxed_reward_reads_balanced_braces():
    assert align.boxed_reward("so \\boxed{1} or \\boxed{\\frac{3}{4}}.", "0.75")["reward"] == 1
    for response in ("so \\boxed{\\frac{3}{4}", "3/4"):
        assert align.boxed_reward(response, "0.75") == {"reward": 0, "format_reward": 0, "answer_reward": 0}


def test_packed_documents_are_cut_into_shifted_chunks(bpe_trained, tmp_path):
    tokenizer, path = bpe.Tokenizer(*bpe_trained, ["<|endoftext|>"]), tmp_path / "sft.jsonl"
    pairs = [("say one", "one"), ("say two", "two two"), ("say three", "three, three, three")]
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs), encoding="utf-8")
    text = "".join(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{p}\n\n### Response:\n{r}<|endoftext|>" for p, r in pairs)
    ids, data_set = tokenizer.encode(text), align.PackedSFT(tokenizer, path, 32, shuffle=False)
    assert len(data_set) == (len(ids) - 1) // 32 and len(list(data_set)) == len(data_set)
    for i, chunk in enumerate(data_set):
        assert chunk["input_ids"].tolist() == ids[32 * i:32 * i + 32]
        assert chunk["labels"].tolist() == ids[32 * i + 1:32 * i + 33]
    assert not torch.equal(align.PackedSFT(tokenizer, path, 32, shuffle=True).ids, data_set.ids)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "no answer"}\n')
    with pytest.raises(ValueError, match="sft.jsonl:4: .*response"):
        align.PackedSFT(tokenizer, path, 32, shuffle=False)
    batches = align.iterate_batches(data_set, 2, shuffle=True)
    assert len(batches) == math.ceil(len(data_set) / 2) and next(iter(batches))["labels"].shape == (2, 32)


def align_run(verb, base, data, out_dir, **more):
    settings = dict(template="chat", skip_bad=True, batch_size=4, micro_batch_size=3, lr=1e-2, log_every=5) | more
    align.run_verb(verb, align.AlignConfig(base=str(base), data=str(data), out_dir=str(out_dir), **settings))
    return model_module.load_model(out_dir), evaluate.read_jsonl(Path(out_dir) / "log.jsonl")[0][1:]


def test_sft_learns_to_answer_and_to_stop_and_names_every_bad_line(little_base, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"5 bad lines(?s:.*)jsonl:9: (?s:.*)11: empty response"):
        align_run("sft", little_base, little_base / "sft.jsonl", tmp_path, skip_bad=False)
    (model, tokenizer), log = align_run("sft", little_base, little_base / "sft.jsonl", tmp_path, steps=60)
    assert "8 usable lines, 5 bad ones skipped" in capsys.readouterr().out and log[-1]["loss"] < 0.05 < log[0]["loss"]
    stop = tokenizer.special_tokens["<|end|>"]
    for prompt, answer in (("cat<|end|>", "hat<|end|>"), ("hat", "cat cat<|end|>")):
        ids = evaluate.render(tokenizer, "chat", [prompt])
        assert ids.count(stop) == 1                                  # the user's own "<|end|>" is plain text
        assert tokenizer.decode(sample.generate(model, ids, 20, temperature=0, stop_ids=(stop,))) == answer
    config = align.AlignConfig(group_size=4, max_new_tokens=12, temperature=0.7)
    prompts = [evaluate.render(tokenizer, "chat", [word]) for word in ("cat", "hat hat")]
    responses = align.rollout(model, prompts, config, stop, tokenizer.vocab_size, rng())
    rows = [(prompt, row) for prompt, row in zip([p for p in prompts for _ in range(4)], responses)]
    assert align.drift(model, rows, config, tokenizer.vocab_size) < 1e-5
    batch, = align.micro_batches(rows, config, 0)
    at_one = align.response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"][batch["response_mask"]]
    assert (align.sampler_log_probs(model, rows, 0.7) - at_one).abs().mean() > 1e-3      # scored at another temperature


def test_dpo_starts_at_ln_2_and_turns_a_model_round(little_base, tmp_path):
    align_run("sft", little_base, little_base / "sft.jsonl", tmp_path / "sft", steps=40)
    settings = dict(steps=30, lr=3e-3, val_fraction=0.25)
    _, log = align_run("dpo", tmp_path / "sft", little_base / "dpo.jsonl", tmp_path / "dpo", **settings)
    held = [line for line in log if "val_loss" in line]
    assert held[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-4) and held[0]["val_accuracy"] == 0.5
    assert held[-1]["val_accuracy"] == 1 and held[-1]["val_margin"] > 0.1
    assert {"chosen", "rejected", "margin"} <= set(log[1]) and log[1]["norm"] > 0
    with pytest.raises(ValueError, match="(?s)9: chosen and rejected are equal.*10: .* answer different prompts"):
        align_run("dpo", tmp_path / "sft", little_base / "dpo.jsonl", tmp_path / "dpo", skip_bad=False)


@pytest.mark.parametrize("more", [dict(), dict(kind="reinforce_with_baseline", normalize="token"),
                                  dict(kind="grpo_clip", normalize="constant", epochs=2, kl_weight=0.1, batch_size=5),
                                  dict(kind="expert_iteration")])
def test_grpo_raises_a_reward_that_can_be_had(little_base, tmp_path, monkeypatch, more):
    monkeypatch.setitem(align.REWARDS, "boxed", lambda response, truth: {"reward": float(response[:1] in "aeiou ")})
    settings = dict(reward="boxed", prompts_per_step=4, group_size=8, batch_size=32, micro_batch_size=16,
                    max_new_tokens=4, lr=1e-2, steps=25, log_every=1)
    _, log = align_run("grpo", little_base, little_base / "grpo.jsonl", tmp_path, **settings | more)
    first, last = (sum(line["reward"] for line in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.15, (first, last)       # of 160 answers each: some four standard deviations
    assert {"length", "truncated", "groups_without_variance", "drift", "entropy", "norm"} <= set(log[-1])
    assert all(line["drift"] < 1e-4 for line in log)
    assert ("clip_fraction" in log[-1]) == (more.get("kind", "grpo_clip") == "grpo_clip")
    if not more:                                                     # one batch, one epoch: on-policy
        assert all(line["ratio"] == pytest.approx(1, abs=1e-4) and abs(line["loss"]) < 0.2 for line in log)


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_weight_decay_is_adamws_beside_muon_too(muon_lr):
    model = random_model()
    learner = align.Learner(model, align.AlignConfig(muon_lr=muon_lr, weight_decay=0.3), 10)
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in groups] == [0.3] + [0.0] * (muon_lr > 0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_log_probs_of_hugging_face_models_are_ours(little_base, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
    ids = torch.randint(0, 400, (2, 12), generator=rng())
    found = align.response_log_probs(theirs, ids[:, :-1], ids[:, 1:])["log_probs"]
    assert -found.mean().item() == pytest.approx(theirs(ids, labels=ids).loss.item(), abs=1e-5)
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copy(little_base / "tokenizer.json", tmp_path / "hf")
    _, log = align_run("sft", tmp_path / "hf", little_base / "sft.jsonl", tmp_path / "out", steps=5, template="alpaca")
    assert log[-1]["loss"] < log[0]["loss"]


def test_tasks_of_the_experiment_are_disjoint_and_right():
    tasks = {split: align.make_tasks(300, split, 0) for split in ("train", "val", "test")}
    questions = [task["question"] for split in tasks.values() for task in split]
    assert len(set(questions)) == 900
    assert align.make_tasks(300, "test", 0) == tasks["test"] != align.make_tasks(300, "test", 1)
    for task in tasks["test"]:
        for style in ("think", "guess"):
            assert align.r1_zero_reward(align.answered(task, style), task["answer"])["reward"] == 1
        if task["kind"] == "sum":
            assert int(task["answer"]) == sum(map(int, re.findall("[0-9]", task["question"])))
