"""Claims about configurator.py."""
import dataclasses
import re

import pytest

import configurator


@dataclasses.dataclass
class Toy:
    width: int = 4             # how wide
    rate: float = 0.1          # how fast
    name: str | None = None    # what it is called
    loud: bool = False         # whether to shout


@dataclasses.dataclass
class Loud(Toy):
    volume: int = 11           # how loud


@pytest.mark.parametrize("key, text, value", [
    ("width", "1e4", 10_000), ("width", "9007199254740993", 2 ** 53 + 1), ("rate", "3", 3.0), ("loud", "true", True),
    ("loud", "0", False), ("name", "None", None), ("name", "7", "7"), ("name", "", "")])
def test_values_take_the_type_of_the_field(key, text, value):
    config, _ = configurator.resolve(Toy, {key: text})
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("text, words", [
    ("import os", ":1: "), ("rate = 2\nwidth = __import__('os').getpid()", ":2: "), ("width = 9**9**9", ":1: "),
    ("name = 'a'\nname = name + name", ":2: "), ("name = 'a' * 10**12", ":1: "), ("width = 1 / 0", ":1: "),
    ("width = " + "1 * " * 20_000 + "1", "config_toy.py"), (b"name = '\xe9'", "config_toy.py:1: 'utf-8'"),
    ("rate = lr", "'lr' is not defined"), ("width = 9007199254740993", ":1: 9007199254740993 loses"),
    ("name = 3", "name=3.0 is not a str"), ("loud = None", "config_toy.py: loud=None"), ("widht = 3", "mean width")])
def test_config_files_cannot_run_code_or_hang(tmp_path, text, words):
    (tmp_path / "config_toy.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(words)):
        configurator.resolve(Toy, {}, str(tmp_path / "config_toy.py"))


def test_defaults_then_file_then_flags_and_what_applies_in_the_help(tmp_path, capsys):
    path, verbs = str(tmp_path / "config_toy.py"), {None: Toy, "sing": Loud}
    text = '"""Text."""\nwidth = 2**3 * 3\nrate = -width * 0.5\nname = "a"\nloud = true\n'
    (tmp_path / "config_toy.py").write_text(text, encoding="utf-8")
    verb, files, config, sources = configurator.command_line(verbs, ["a.txt", "--rate=1e-2", "--name=b.py", path], "")
    assert (verb, files, config) == (None, ["a.txt"], Toy(24, 0.01, "b.py", True)), "a flag's value is no config file"
    assert sources == {"width": path, "rate": "flag", "name": "flag", "loud": path}
    assert configurator.command_line(verbs, ["sing", "--volume=3"], "")[::2] == ("sing", Loud(volume=3))
    assert configurator.command_line(Toy, [path], "", reads_scripts=True)[1:3] == ([path], Toy())
    for argv, lines in (([path], r"--rate=-12.0 +how fast\n(.*\n)+sing:\n  --width=4(.*\n)+.*--volume=11 +how l"),
                        (["sing", "--rate=2"], r"^usage\n\nsing:\n  --width=4 .*\n  --rate=2.0 (.*\n)+.*--volume=11 ")):
        with pytest.raises(SystemExit) as ended:
            configurator.command_line(verbs, [*argv, "--help"], "usage")
        assert ended.value.code == 0 and re.search(lines, capsys.readouterr().out)


@pytest.mark.parametrize("argv, words", [
    (["--widht=3"], "--widht is not a setting. Did you mean width"), (["--width=2.5"], "--width='2.5'"),
    (["--width=inf"], "--width='inf'"), (["--loud"], "write --loud=VALUE"), (["missing.py"], "missing.py"),
    (["--help", "--rate=x"], "--rate='x'"), (["sign"], "'sign' is no verb. Did you mean sing?"),
    (["say", "--volume=3"], "--volume is not a setting")])
def test_mistakes_say_what_and_what_instead_before_any_listing(capsys, argv, words):
    with pytest.raises(SystemExit) as ended:
        configurator.command_line({"sing": Loud, "say": Toy} if argv[0] in ("sign", "say") else Toy, argv, "usage")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and words in err and err.startswith("error: ")
