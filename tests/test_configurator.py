"""Claims about configurator.py."""
import dataclasses
import re

import pytest

from common import ROOT  # noqa: F401 - puts the pages on the path
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


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file and gives its path."""
    def write(text, name="config_toy.py"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)
    return write


def run(capsys, config, argv, **more):
    """(exit status, standard output, standard error) of a command line that ends in command_line."""
    with pytest.raises(SystemExit) as ended:
        configurator.command_line(config, argv, "usage: x.py [VERB]", **more)
    return ended.value.code, *capsys.readouterr()


def test_defaults_then_file_then_flags(config_file):
    path = config_file('"""A docstring."""\nwidth = 2**3 * 3 - -1\nrate = width * 0.5\nname = "a"\nloud = true\n')
    config, sources = configurator.resolve(Toy, {"rate": "1e-2", "loud": "0"}, path)
    assert config == Toy(25, 0.01, "a", False)
    assert sources == {"width": path, "rate": "flag", "name": path, "loud": "flag"}


@pytest.mark.parametrize("key, text, value", [
    ("width", "1e4", 10_000), ("width", "-3", -3), ("width", "9007199254740993", 2 ** 53 + 1), ("width", "0", 0),
    ("rate", "3", 3.0), ("loud", "true", True), ("loud", "0", False), ("name", "None", None), ("name", "7", "7"),
    ("name", "", "")])
def test_values_take_the_type_of_the_field(key, text, value):
    config, _ = configurator.resolve(Toy, {key: text})
    assert getattr(config, key) == value and type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("flags, words", [
    ({"widht": "3"}, "--widht is not a setting. Did you mean width"), ({"width": "2.5"}, "--width='2.5'"),
    ({"width": "inf"}, "--width='inf'"), ({"loud": "perhaps"}, "--loud='perhaps'"), ({"width": "none"}, "not a int")])
def test_bad_settings_say_what_and_what_instead(flags, words):
    with pytest.raises(configurator.ConfigError, match=re.escape(words)):
        configurator.resolve(Toy, flags)


@pytest.mark.parametrize("text, words", [
    ("import os", ":1: "), ("width = __import__('os').getpid()", ":1: "), ("width: int = 3", ":1: "),
    ("width = 1\nrate = [1]", ":2: "), ("width = 9**9**9", ":1: "), ("name = 'a' * 10**12", ":1: "),
    ("width = 1 / 0", ":1: "), ("width = rate = 1", ":1: "), ("width =", ":1: "),
    ("width = " + "(" * 300 + "1" + ")" * 300, "config_toy.py"),
    ("width = " + "1 + " * 20_000 + "1", "config_toy.py"), (b"name = '\xe9'", "config_toy.py:1: 'utf-8'"),
    ("width = (0 - 8) ** 0.5", "config_toy.py: width="), ("loud = None", "config_toy.py: loud=None"),
    ("width = true", "config_toy.py: width=True"), ("widht = 3", "Did you mean width")])
def test_config_files_cannot_run_code_or_hang(config_file, text, words):
    with pytest.raises(configurator.ConfigError, match=re.escape(words)):
        configurator.resolve(Toy, {}, config_file(text))


def test_a_flag_that_ends_in_py_is_no_config_file(config_file):
    path = config_file("width = 7")
    verb, files, config, sources = configurator.command_line(
        Toy, ["go", "a.txt", "--name=b.py"], "usage", ("go",), config_file=path)
    assert (verb, files, config) == ("go", ["a.txt"], Toy(7, name="b.py")) and sources["width"] == path
    named = config_file("width = 8", "config_other.py")
    assert configurator.command_line(Toy, [named], "usage", config_file=path)[1:3] == ([], Toy(8))


def test_each_verb_has_its_own_keys(capsys, config_file):
    classes = {None: Toy, "sing": Loud}
    path = config_file("width = 7")
    verb, _, config, _ = configurator.command_line(classes, ["sing", "--volume=3"], "usage", config_file=path)
    assert (verb, config) == ("sing", Loud(volume=3))                # the default file belongs to the other dataclass
    status, out, err = run(capsys, classes, ["--volume=3"])
    assert (status, out) == (2, "") and "--volume is not a setting" in err
    status, out, err = run(capsys, {"sing": Loud, "say": Toy}, ["sign"])
    assert status == 2 and "'sign' is no verb. Did you mean sing?" in err and "usage: x.py" in err
    assert run(capsys, {"sing": Loud}, [])[0] == 2


def test_help_shows_what_applies(capsys, config_file):
    path = config_file("width = 7")
    status, out, _ = run(capsys, {None: Toy, "sing": Loud}, ["--help"], config_file=path)
    assert status == 0 and re.search(r"--width=7 +how wide\n(.*\n)+sing:\n  --width=4(.*\n)+.*--volume=11 +how lo", out)
    status, out, _ = run(capsys, {None: Toy, "sing": Loud}, ["sing", "-h", "--rate=2"])
    assert status == 0 and "--rate=2.0 " in out and "--volume=11" in out and out.count("--width") == 1
    status, out, _ = run(capsys, {"sing": Loud, "say": Toy}, ["--help"])
    assert status == 0 and "\nsing:\n" in out and "\nsay:\n" in out
    for argv, words in ((["--help", path, path], "2 config files"), (["--help", "--rate=x"], "rate='x'"),
                        (["--loud"], "write --loud=VALUE"), (["missing.py"], "missing.py")):
        status, out, err = run(capsys, Toy, argv)                    # a mistake comes before any listing
        assert (status, out) == (2, "") and words in err
