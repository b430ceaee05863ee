"""Turn a config file and `--key=value` flags into a checked dataclass: defaults < file < flags.

    python train.py config_shakespeare.py --lr=1e-3 --max_steps=200

A config file is plain Python assignments, read as data and never run: numbers, strings, true/false/none,
arithmetic over them and over names assigned above. A key that the dataclass lacks ends the program with the
nearest match and status 2, because an ignored setting is an experiment that was not the one asked for.
`--help` prints every key with its default and the comment that stands beside it in the dataclass.

In the spirit of nanoGPT's configurator, without its exec(): a config that came with a checkpoint from
somebody else cannot run code.
"""
import ast
import dataclasses
import difflib
import inspect
import itertools
import operator
import sys
import typing

NONE_WORDS, TRUE_WORDS, FALSE_WORDS = ("none", "null", ""), ("1", "true", "yes", "on"), ("0", "false", "no", "off")
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, its value, what is allowed and what to do."""


# --- values ---

def coerce(key: str, value, annotation):
    """`value` as the type that `annotation` names; `1e4` is a good int, `true` and `0` are good bools.

    >>> coerce("max_steps", "1e4", int)
    10000

    Raises ConfigError naming the key, the value and the type.
    """
    options = [option for option in typing.get_args(annotation) or (annotation,)
               if isinstance(option, type)]                      # `int | None` gives int and NoneType
    word = str(value).strip().lower()
    if type(None) in options and (value is None or word in NONE_WORDS):
        return None
    for option in options:
        if option is bool and word in TRUE_WORDS + FALSE_WORDS:
            return word in TRUE_WORDS
        if option is int and not isinstance(value, bool):
            try:
                return int(value) if isinstance(value, str) else _exact_int(value)
            except (ValueError, TypeError, OverflowError):
                try:
                    return _exact_int(float(value))
                except (ValueError, TypeError, OverflowError):
                    continue
        if option is float and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, TypeError):
                continue
        if option is str and value is not None:
            return str(value)
    names = " or ".join("none" if option is type(None) else option.__name__ for option in options)
    raise ConfigError(f"{key}={value!r} is not a {names}; give a value of that type")


def _exact_int(value) -> int:
    if value != int(value):
        raise ValueError(f"{value} is not whole")
    return int(value)


def _literal(node: ast.expr, known: dict, where: str):
    """The value of an expression made of literals, arithmetic and names assigned above it."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Name) and node.id in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand, known, where)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _literal(node.left, known, where), _literal(node.right, known, where)
        try:
            return ARITHMETIC[type(node.op)](left, right)
        except (TypeError, ArithmeticError) as error:
            raise ConfigError(f"{where}: {ast.unparse(node)!r} cannot be computed: {error}") from None
    raise ConfigError(f"{where}: {ast.unparse(node)!r} is not a literal; a config file holds plain assignments of "
                      "numbers, strings, True, False, None, and arithmetic over them")


def read_config_file(path: str) -> dict:
    """The assignments of a config file as a dict, in order. Raises ConfigError naming file and line, or OSError."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        body = ast.parse(text, filename=path).body
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}; a config file holds plain assignments") from None
    values = {}
    for node in body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue                                             # the docstring that states hardware, time and target
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ConfigError(f"{where}: {ast.unparse(node)!r} is not a plain assignment `key = value`")
        values[node.targets[0].id] = _literal(node.value, values, where)
    return values


# --- help ---

def describe(config_class: type) -> dict:
    """The comment beside every field of a dataclass (its bases included), by field name: the help text.

    Where the source cannot be read (a frozen program), the comments are empty.
    """
    comments = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:
            continue
        for line in source.splitlines():
            name, colon, rest = line.strip().partition(":")
            if colon and name.isidentifier() and "#" in rest:
                comments[name] = rest.split("#", 1)[1].strip()
    return comments


def format_help(config_class: type, usage: str) -> str:
    """Usage, then one line a key: `--key=default  what it does`."""
    comments = describe(config_class)
    lines = [
        usage.strip(), "", "settings, each with its default (a config file changes defaults, a flag wins over both):"]
    for field in dataclasses.fields(config_class):
        default = field.default if isinstance(field.default, str) else str(field.default).lower()
        lines.append(f"  --{f'{field.name}={default}':<34} {comments.get(field.name, '')}".rstrip())
    return "\n".join(lines)


# --- the whole ---

def nearest(word: str, allowed) -> str:
    """` Did you mean --x?`, or nothing when no name is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f" Did you mean {near[0]}?" if near else ""


ALIASES = {"learning_rate": "lr"}        # what others call a setting


def parse_flags(argv: list[str]) -> tuple[dict, list[str]]:
    """Split arguments into `{key: text}` from `--key=value`, and the rest in order.

    >>> parse_flags(["out/x", "--top_k=5"])
    ({'top_k': '5'}, ['out/x'])
    >>> parse_flags(["--learning-rate=1e-3"])
    ({'lr': '1e-3'}, [])
    """
    flags, rest = {}, []
    for argument in argv:
        if not argument.startswith("--"):
            rest.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            raise ConfigError(f"{argument} has no value; write --{key}=VALUE (for a switch, --{key}=true)")
        key = key.replace("-", "_")
        flags[ALIASES.get(key, key)] = value
    return flags, rest


def resolve(config_class: type, flags: dict, config_file: str | None = None):
    """(config, sources): the dataclass filled from its defaults, then the file, then the flags.

    sources: {key: "default" | the file's name | "flag"}. Raises ConfigError for an unknown key or a wrong type.
    """
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    values, sources = {}, dict.fromkeys(names, "default")
    for origin, given in ((config_file, read_config_file(config_file) if config_file else {}), ("flag", flags)):
        for key, value in given.items():
            if key not in hints or key not in names:
                place = f"--{key}" if origin == "flag" else f"{key} in {origin}"
                raise ConfigError(f"{place} is not a setting.{nearest(key, names)} --help lists them all")
            values[key] = coerce(key, value, hints[key])
            sources[key] = origin
    return config_class(**values), sources


def grid(config_class: type, words: list[str]) -> list[dict]:
    """The settings of each point that words such as `lr=1e-3,3e-3` and `seed=1,2` span; the last word moves fastest.

    Raises ConfigError for a word that is no setting with values. `learning_rate` is understood as `lr`.
    """
    hints, axes = typing.get_type_hints(config_class), []
    for word in words:
        key, _, values = word.partition("=")
        key = ALIASES.get(key, key)
        if not values or key not in hints or key in ("out_dir", "resume"):
            raise ConfigError(f"{word!r} spans no axis; write key=a,b with a setting as key.{nearest(key, hints)} "
                              "--help lists them all")
        axes.append([(key, coerce(key, value, hints[key])) for value in values.split(",")])
    return [dict(point) for point in itertools.product(*axes)]


def print_config(config, sources: dict) -> None:
    """Every setting that is not at its default, with its value and where it came from."""
    changed = [name for name, origin in sources.items() if origin != "default"]
    width = max((len(name) for name in changed), default=0)
    print(f"settings ({len(sources) - len(changed)} more at their defaults; --help lists them):")
    for name in changed:
        print(f"  {name:<{width}} = {getattr(config, name)!s:<24} {sources[name]}")


def command_line(config_class: type, argv: list[str], usage: str, verbs: tuple = ()):
    """Read a command line of the form `[VERB] [FILE…] [--key=value …]`: (verb or None, files, config, sources).

    A `config_*.py` among the files is the config file. `--help` prints and exits with 0; a mistake prints its message
    and exits with 2.
    """
    if any(argument in ("--help", "-h") for argument in argv):
        print(format_help(config_class, usage))
        sys.exit(0)
    try:
        flags, rest = parse_flags(argv)
        verb = rest.pop(0) if rest and rest[0] in verbs else None
        files = [word for word in rest if not _is_config(word)]
        configs = [word for word in rest if _is_config(word)]
        if len(configs) > 1:
            raise ConfigError(f"{len(configs)} config files given ({', '.join(configs)}); give one")
        config, sources = resolve(config_class, flags, configs[0] if configs else None)
    except (ValueError, OSError) as error:
        fail(error)
    return verb, files, config, sources


def _is_config(word: str) -> bool:
    return word.endswith(".py")


def fail(error) -> typing.NoReturn:
    """Print one line to standard error and exit with status 2, the status of a command line that cannot be used."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
