"""Checks of vLLM's arguments before vLLM is imported: port, model folder, context."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedstep.errors import ConfigError

HOST, PORT = "127.0.0.1", 8000
WEIGHTS = ("config.json", "params.json", "*.gguf")  # one of these makes a folder a model


def value_of(vllm_args: Sequence[str], name: str) -> str | None:
    """The value of the option ``name`` among arguments; the last one counts."""
    found = None
    for index, arg in enumerate(vllm_args):
        option, equals, value = arg.partition("=")
        if option.replace("_", "-") == name:
            found = value if equals else next(iter(vllm_args[index + 1 : index + 2]), None)
    return found


def model_of(vllm_args: Sequence[str]) -> str | None:
    """MODEL where it comes first, or --model's; None where only vLLM's parser can tell."""
    if vllm_args and not vllm_args[0].startswith("-"):
        return vllm_args[0]
    return value_of(vllm_args, "--model")


def check_server(vllm_args: Sequence[str]) -> None:
    """The port and the model's folder, where the command line names them.

    Raises:
        ConfigError: nothing can listen there, or there is no such folder.
    """
    port = value_of(vllm_args, "--port")
    in_file = value_of(vllm_args, "--config") is not None  # it may say where to listen
    if value_of(vllm_args, "--uds") is None and not (in_file and port is None):
        host = value_of(vllm_args, "--host") or HOST
        if port is None or port.isdecimal():
            check_port(host, PORT if port is None else int(port))
    model = model_of(vllm_args)
    if model is not None:
        check_folder(model)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where nothing can listen. vLLM finds out too, and does not name it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "ports go from 0 to 65535"
            raise ConfigError(
                f"cannot listen on {host}:{port} ({reason}): choose another --host or --port"
            ) from None


def check_folder(model: str) -> None:
    """Raises ConfigError for a model that is a path and not there, or a folder without a model."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise ConfigError(f"no model at {path}: the folder is empty")
        if not any(any(path.glob(name)) for name in WEIGHTS):
            raise ConfigError(f"no model at {path}: the folder has no config.json")
    elif not path.exists() and is_path(model):
        raise ConfigError(
            f"no model at {model}: give a folder that exists, or a hub name (org/name)"
        )


def is_path(model: str) -> bool:
    """Can it be no name on the hub, nor an address?"""
    return "://" not in model and (model.startswith((".", "/", "~")) or model.count("/") > 1)


def context(model: str | None, vllm_args: Sequence[str]) -> int | None:
    """Tokens that no request of this model can pass; None where only vLLM can tell."""
    given = value_of(vllm_args, "--max-model-len")
    if given is not None:
        return int(given) if given.isdecimal() else None
    if model is None or value_of(vllm_args, "--hf-overrides") or value_of(vllm_args, "--config"):
        return None
    try:
        config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    limit = config.get("max_position_embeddings")
    scaled = scaling.get("rope_type", scaling.get("type", "default")) != "default"
    return limit if isinstance(limit, int) and not scaled else None


def check_lengths(model: str | None, vllm_args: Sequence[str], wanted: dict[str, int]) -> None:
    """Raises ConfigError where the lengths ``wanted``, by option, do not fit into the context."""
    limit, total = context(model, vllm_args), sum(wanted.values())
    if limit is not None and total > limit:
        raise ConfigError(too_long(wanted, limit))


def too_long(wanted: dict[str, int], limit: int) -> str:
    """Message for lengths that do not fit."""
    given = " and ".join(f"{option} {length}" for option, length in wanted.items())
    return (
        f"{given}: {sum(wanted.values())} tokens do not fit into the model's context of {limit}: "
        "shorten them, or raise --max-model-len if the model can"
    )


def check_batch(vllm_args: Sequence[str], batch_size: int) -> None:
    """Raises ConfigError where a batch would wait for a row, which is measured as decode time."""
    given = value_of(vllm_args, "--max-num-seqs")
    if given is not None and given.isdecimal() and batch_size > int(given):
        raise ConfigError(batch_too_large(batch_size, int(given)))


def batch_too_large(batch_size: int, limit: int) -> str:
    """Message for a batch of which some requests would wait."""
    return (
        f"--batch-size {batch_size} is more than the {limit} requests that run at a time: "
        "lower it, or raise --max-num-seqs"
    )
