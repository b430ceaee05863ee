"""Turn a config file and `--key=value` flags into a checked dataclass: `python train.py config_x.py --max_steps=200`.

    dataclass      lr = 3e-4   max_steps = 1000   seed = 0
    config file    lr = 8e-3                                     wins over the default
    flags                      max_steps = 200                   wins over both
    settings       lr = 8e-3   max_steps = 200    seed = 0

A config file holds plain assignments of numbers, strings, true/false/none and arithmetic. It is read and never run, as
nanoGPT's exec() would: a config that came with somebody else's checkpoint can neither run code nor hang.
An unknown key ends the program with status 2 and the nearest name: an ignored setting is another experiment.
"""
import ast
import dataclasses
import difflib
import inspect
import operator
import re
import sys
import typing

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
SWITCH = {"true": True, "1": True, "false": False, "0": False}


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, its value and what is allowed."""


def coerce(key: str, value, annotation):
    """`value` as what `annotation` names: bool, int, float or str, also `| None`. Raises ConfigError naming `key`.

    >>> coerce("max_steps", "1e4", int)
    10000
    """
    types = typing.get_args(annotation) or (annotation,)             # `int | None` gives int and NoneType
    word = str(value).strip().lower()
    if word == "none" and type(None) in types:
        return None
    if str in types and value is not None:
        return str(value)
    try:
        if bool in types:
            return SWITCH[word]
        number = int(word) if word.lstrip("+-").isdigit() else float(word)       # a float loses digits beyond 2^53
        if int not in types:
            return float(number)
        if number == int(number):
            return int(number)
    except (KeyError, ValueError, OverflowError):
        pass
    names = " or ".join(one.__name__.replace("NoneType", "none") for one in types)
    raise ConfigError(f"{key}={value!r} is not a {names}; give a value of that type")


def evaluate(node: ast.expr, known: dict):
    """The value of a literal, of a name in `known`, or of arithmetic over them. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -float(evaluate(node.operand, known))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:  # of floats: 9**9**9 is an error, not a hang
        return ARITHMETIC[type(node.op)](float(evaluate(node.left, known)), float(evaluate(node.right, known)))
    raise ValueError("not a number, a string, true, false, none, or arithmetic over numbers and names set above")


def read_config_file(path: str) -> dict:
    """The assignments of a config file as a dict, in order. Raises ConfigError naming file and line, or OSError."""
    values, line = {}, 1
    try:
        with open(path, encoding="utf-8") as file:
            body = ast.parse(file.read()).body
        for node in body:
            line = node.lineno
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue                                             # the docstring
            if not isinstance(node, ast.Assign) or [type(target) for target in node.targets] != [ast.Name]:
                raise ValueError("not an assignment `key = value`")
            values[node.targets[0].id] = evaluate(node.value, {"true": True, "false": False, "none": None} | values)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", line)
        raise ConfigError(f"{path}:{line}: {error}; write plain assignments, in UTF-8") from None
    return values


def resolve(config_class: type, flags: dict, config_file: str | None = None):
    """(the dataclass filled from its defaults, then the file, then the flags; {key: "default", the file or "flag"})."""
    hints, values = typing.get_type_hints(config_class), {}
    sources = {field.name: "default" for field in dataclasses.fields(config_class)}
    in_file = read_config_file(config_file) if config_file else {}
    for origin, settings in ((config_file, in_file), ("flag", flags)):
        for key, value in settings.items():
            place = f"--{key}" if origin == "flag" else f"{origin}: {key}"
            if key not in sources:
                raise ConfigError(f"{place} is not a setting.{nearest(key, sources)} --help lists them all")
            values[key], sources[key] = coerce(place, value, hints[key]), origin
    return config_class(**values), sources


def nearest(word: str, allowed) -> str:
    """` Did you mean x?`, or nothing when no name is near."""
    names = difflib.get_close_matches(word, [name for name in allowed if name], n=1)
    return f" Did you mean {names[0]}?" if names else ""


def format_help(config) -> str:
    """`--key=value  comment` a line. config: a dataclass (defaults), or one filled with what applies."""
    bases = (config if isinstance(config, type) else type(config)).__mro__[-2::-1]                # but `object`
    comments = dict(re.findall(r"^ +(\w+):[^#\n]*# *(.*)", "\n".join(map(inspect.getsource, bases)), re.MULTILINE))
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, "")                      # of a class: the default
        setting = f"{field.name}={value if isinstance(value, str) else str(value).lower()}"
        lines.append(f"  --{setting:<34} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


def print_config(config, sources: dict) -> None:
    """Print every setting that is not at its default, and where it came from."""
    print(f"settings ({list(sources.values()).count('default')} more at their defaults; --help lists them):")
    for name, origin in sources.items():
        if origin != "default":
            print(f"  {name:<20} = {getattr(config, name)!s:<24} {origin}")


def command_line(config, argv: list[str], usage: str, reads_scripts: bool = False):
    """Read a command line of the form `[VERB] [FILE…] [--key=value …]`: (verb or None, files, config, sources).

    config: a dataclass, or {verb: its dataclass}, with a key None where the script also runs without a verb. The first
    word that ends in .py is the config file, unless reads_scripts: FILE may be one. `--help` prints the settings that
    apply and exits with 0; a mistake prints its message and exits with 2.
    """
    classes, wants_help = config if isinstance(config, dict) else {None: config}, "--help" in argv or "-h" in argv
    flags, words, settings, sources = {}, [], None, {}
    try:
        for argument in argv:
            if argument in ("--help", "-h"):
                continue
            key, equals, value = argument[2:].partition("=")
            if not argument.startswith("--"):
                words.append(argument)
            elif equals:
                flags[key.replace("-", "_")] = value
            else:
                raise ConfigError(f"{argument} has no value; write {argument}=VALUE (for a switch, {argument}=true)")
        verb = words.pop(0) if words and words[0] in classes else None
        configs = [word for word in words if word.endswith(".py") and not reads_scripts][:1]
        if verb in classes:
            settings, sources = resolve(classes[verb], flags, *configs)
        elif not wants_help:
            mistake = f"{words[0]!r} is no verb.{nearest(words[0], classes)}" if words else "a verb is missing."
            raise ConfigError(f"{mistake} Give one of {', '.join(classes)}. {usage.strip()}")
    except (ValueError, OSError) as error:
        fail(error)
    if wants_help:
        print(usage.strip())
        if settings:
            print("\nsettings (a config file changes defaults, a flag wins over both):\n" + format_help(settings))
        for kind in dict.fromkeys(classes.values()) if verb is None else ():
            if kind is not type(settings) and dataclasses.fields(kind):
                print(f"\n{', '.join(name for name in classes if classes[name] is kind)}:\n{format_help(kind)}")
        sys.exit(0)
    return verb, [word for word in words if word not in configs], settings, sources


def fail(error) -> typing.NoReturn:
    """Print one line to standard error and exit with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
