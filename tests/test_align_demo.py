"""Claims about align_demo.py."""
import re
from dataclasses import replace

import pytest

import align
import align_demo

TINY = {stage: replace(config, steps=2, batch_size=4, log_every=1) for stage, config in align_demo.STAGES.items()}


def test_tasks_of_the_experiment_are_disjoint_and_right():
    tasks = {split: align_demo.make_tasks(300, split, 0) for split in ("train", "val", "test")}
    assert len({task["question"] for split in tasks.values() for task in split}) == 900
    assert align_demo.make_tasks(300, "test", 0) == tasks["test"] != align_demo.make_tasks(300, "test", 1)
    for task in tasks["test"]:
        for style in ("think", "guess"):
            assert align.r1_zero_reward(align_demo.answered(task, style), task["answer"])["reward"] == 1
        if task["kind"] == "sum":
            assert int(task["answer"]) == sum(map(int, re.findall("[0-9]", task["question"])))


def test_the_whole_way_leaves_four_models_figures_curves_and_a_dialogue(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(align_demo.Laboratory, "pairs", lambda lab, model, split, n: [
        (lab.prompt(task), *(lab.tokenizer.encode(align_demo.answered(task, style)) for style in ("think", "guess")))
        for task in lab.pick(split, 8)])
    config = align_demo.DemoConfig(out_dir=str(tmp_path))
    tiny = TINY | {"grpo": replace(TINY["grpo"], prompts_per_step=2, max_new_tokens=4)}
    table = align_demo.demonstrate(config, tiny, align_demo.Laboratory(tmp_path, 0, (300, 100, 60)))
    said, stages = capsys.readouterr().out, ["base", "sft", "dpo", "grpo"]
    assert list(table) == re.findall(r"^(\w+) done: .* s so far, about \d+ s to go$", said, re.M) == stages
    assert re.findall(r"^(?=sum|count|reverse|close|open).{32} (\w+) ", said, re.M) == 2 * stages, "the dialogue"
    assert (tmp_path / "curves.png").is_file() and all((tmp_path / stage / "ckpt.pt").is_file() for stage in tiny)
    assert "8 held-out preferences" in said and f"{tmp_path / 'curves.png'}; ask" in said and "python sample.py" in said
    with pytest.raises(ValueError, match="--overwrite=true"):
        align_demo.demonstrate(config, tiny)
