"""Turn a config file and `--key=value` flags into a checked dataclass: `python train.py config_x.py --max_steps=200`.

    dataclass      lr = 3e-4   max_steps = 1000   seed = 0
    config file    lr = 8e-3                                     wins over the default
    flags                      max_steps = 200                   wins over both
    settings       lr = 8e-3   max_steps = 200    seed = 0

Every part of a config file is checked before it is run: a stranger's can neither call anything nor hang, as it can in
nanoGPT. An unknown key is an error: an ignored setting is another experiment.
"""
import ast
import dataclasses
import difflib
import inspect
import re
import sys
import typing

ALLOWED = (ast.Assign, ast.Name, ast.expr_context, ast.Expr, ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.Mult,
           ast.Div, ast.FloorDiv, ast.Pow)           # no sums: strings added to themselves would fill the memory
SWITCH = {"true": True, "1": True, "false": False, "0": False}


def coerce(key: str, value, annotation):
    """`value` as a bool, int, float, str or None by `annotation`: "1e4" as int is 10000. ValueError names `key`."""
    kind, *optional = typing.get_args(annotation) or (annotation,)   # `int | None` gives int and NoneType
    word = str(value).strip().lower()
    if word == "none" and optional:
        return None
    if kind is str and isinstance(value, str):
        return value
    try:
        if kind is bool:
            return SWITCH[word]
        number = int(word) if word.lstrip("+-").isdigit() else float(word)       # a float loses digits beyond 2^53
        if kind is float or (kind is int and number == int(number)):
            return kind(number)
    except (KeyError, ValueError, OverflowError):
        pass
    raise ValueError(f"{key}={value!r} is not a {kind.__name__}; give a value of that type")


def read_config_file(path: str) -> dict:
    """The assignments of a config file as a dict, in order. Raises ValueError naming file and line, or OSError."""
    values, line, names = {}, 1, {"true": True, "false": False, "none": None, "__builtins__": {}}
    try:
        with open(path, encoding="utf-8-sig") as file:
            body = ast.parse(file.read()).body
        for node in body:
            line = node.lineno
            for part in ast.walk(node):
                if not isinstance(part, ALLOWED):
                    raise ValueError("not `key = value` with a string, true, false, none, or products of numbers")
                if isinstance(part, ast.Constant) and type(part.value) is int:
                    exact, part.value = part.value, float(part.value)            # 9**9**9 is an error then, not a hang
                    if part.value != exact:
                        raise ValueError(f"{exact} loses digits as a float; give a flag, or write it as 6e23")
            exec(compile(ast.Module([node], []), path, "exec"), names, values)
    except (SyntaxError, ValueError, TypeError, NameError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', line)}: {error}; write assignments in UTF-8") from None
    return {key: value for key, value in values.items() if key != "__doc__"}


def resolve(config_class: type, flags: dict, config_file: str | None = None):
    """(the dataclass filled from its defaults, then the file, then the flags; {key: "default", the file or "flag"})."""
    hints, values = typing.get_type_hints(config_class), {}
    sources = {field.name: "default" for field in dataclasses.fields(config_class)}
    in_file = read_config_file(config_file) if config_file else {}
    for origin, settings in ((config_file, in_file), ("flag", flags)):
        for key, value in settings.items():
            place = f"--{key}" if origin == "flag" else f"{origin}: {key}"
            if key not in sources:
                raise ValueError(f"{place} is not a setting.{nearest(key, sources)} --help lists them all")
            values[key], sources[key] = coerce(place, value, hints[key]), origin
    return config_class(**values), sources


def nearest(word: str, allowed) -> str:
    """` Did you mean x?`, or nothing when no name is near."""
    names = difflib.get_close_matches(word, [name for name in allowed if name], n=1)
    return f" Did you mean {names[0]}?" if names else ""


def print_config(config, sources: dict) -> None:
    """Print every setting that is not at its default, and where it came from."""
    print("settings (--help lists them all):")
    for name, origin in sources.items():
        if origin != "default":
            print(f"  {name:<20} = {getattr(config, name)!s:<24} {origin.rpartition('/')[2]}")


def command_line(config, argv: list[str], usage: str, reads_scripts: bool = False):
    """Read a command line of the form `[VERB] [FILE…] [--key=value …]`: (verb or None, files, config, sources).

    config: a dataclass, or {verb: its dataclass}, with a key None where no verb is needed. The first word in .py is the
    config file, unless reads_scripts: FILE may be one. `--help` prints what applies and exits with 0, a mistake with 2.
    """
    classes = config if isinstance(config, dict) else {None: config}
    words = [word for word in argv if not word.startswith("--")]
    options = [word for word in argv if word.startswith("--") and word != "--help"]
    verb = words.pop(0) if words and words[0] in classes else None
    configs = [word for word in words if word.endswith(".py") and not reads_scripts][:1]
    if verb not in classes and "--help" not in argv:
        mistake = f"{words[0]!r} is no verb.{nearest(words[0], classes)}" if words else "a verb is missing."
        fail(f"{mistake} Give one of {', '.join(classes)}. {usage.strip()}")
    for option in options:
        if "=" not in option:
            fail(f"{option} has no value; write {option}=VALUE (for a switch, {option}=true)")
    flags = {key.replace("-", "_"): value for key, _, value in (option[2:].partition("=") for option in options)}
    try:
        settings, sources = resolve(classes[verb], flags, *configs) if verb in classes else (None, {})
    except (ValueError, OSError) as error:
        fail(error)
    if "--help" in argv:
        print(usage.strip())
        for kind in dict.fromkeys(classes.values() if verb is None else [classes[verb]]):
            print(f"\n{', '.join(name or 'settings' for name in classes if classes[name] is kind)}:")
            source = "\n".join(map(inspect.getsource, kind.__mro__[-2::-1]))                      # parents first
            comments = dict(re.findall(r"^ +(\w+):[^#\n]*# *(.*)", source, re.MULTILINE))
            for field in dataclasses.fields(kind):
                value = getattr(settings if kind is type(settings) else kind, field.name)
                print(f"  --{f'{field.name}={value}':<34} {comments.get(field.name, '')}")
        sys.exit(0)
    return verb, [word for word in words if word not in configs], settings, sources


def fail(error) -> typing.NoReturn:
    """Print one line to standard error and exit with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
