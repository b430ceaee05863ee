"""Claims about sample.py's commands; decoding.py has those about the ids."""
import pytest

from common import byte_tokenizer, random_model
import checkpoint
import sample


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder with runs "big" and "small" of one tokenizer that has the chat tokens, the tokenizer)."""
    tmp_path, tokenizer = tmp_path_factory.mktemp("sample"), byte_tokenizer()
    for name, width in (("big", 64), ("small", 32)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name / "tokenizer.json")
        checkpoint.save_checkpoint(random_model(vocab_size=264, context_length=64, d_model=width), None, 0,
                                   tmp_path / name / "ckpt.pt")
    return tmp_path, tokenizer


def test_sample_commands(folders, capsys, monkeypatch):
    tmp_path, tokenizer = folders

    def run(*arguments):
        sample.main([*arguments[:-1], str(tmp_path / arguments[-1])])
        return capsys.readouterr().out
    how = ("--prompt=ab", "--temperature=0", "--max_new_tokens=12")
    plain = run(*how, "big")
    assert plain.startswith("ab") and "decode 11 tokens" in plain and "GB/s" not in plain
    for more in (f"--draft={tmp_path / 'small'}", "--draft=ngram"):
        drafted = run(*how, more, "big")
        assert drafted.split("---")[0] == plain.split("---")[0] and "of drafts accepted" in drafted
    assert run(*how, "--dtype=float32", "--device=cpu", "big").split("---")[0] == plain.split("---")[0]
    assert run("--max_new_tokens=3", "--num_samples=2", "--quantize=int4", "big").count("--- sample") == 2
    assert "prefill" in run("--max_new_tokens=3", "--dtype=bfloat16", "--seed=1", "big")
    typed = iter(["hi <|end|>\r", "you\r", "\r"])             # lines of a file from Windows
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert run("--chat=true", "--max_new_tokens=3", "big").count("prefill") == 2
    assert sample.chat_ids(tokenizer, ["a<|end|>", "b", "c"]) == (
        [257, 97, *b"<|end|>", 259, 258, 98, 259, 257, 99, 259, 258], 259)


def test_explain_in_the_terminal(folders, capsys, monkeypatch):
    words = ["explain", "--prompt=<b>", "--max_new_tokens=2", str(folders[0] / "big")]
    sample.main(words)
    told = capsys.readouterr().out
    assert told.count("likeliest:") == 4 and "top_k=3" in told and "\x1b" not in told
    assert told.count("rank 1,") >= 2, "what the model went on with is the likeliest"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    sample.main(words)
    assert "\x1b[30;48;5;" in capsys.readouterr().out, "colours on a terminal"
