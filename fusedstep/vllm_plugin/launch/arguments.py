"""vLLM's own options, parsed by vLLM's own parser: MODEL found, mistakes in one line."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fusedstep.demo import demo_model
from fusedstep.errors import ConfigError
from fusedstep.vllm_plugin.launch import early, sources

HUB_SECONDS = 10.0
UNKNOWN = re.compile(r"^unrecognized arguments: (-[^\s=]+)")  # the first of them, by argparse


def engine_parser() -> ArgumentParser:
    """Parser of ``[MODEL]`` and the options that vLLM's engine takes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    parser.add_argument("model_tag", nargs="?")
    return parser  # type: ignore[no-any-return]


def parse(parser: ArgumentParser, vllm_args: Sequence[str]) -> Namespace:
    """Parse ``[MODEL]`` and options; ``model`` is MODEL, ``--model`` or the bundled model.

    Only the parser knows which options take a value, so only it can tell MODEL from one.

    Raises:
        ConfigError: a wrong option, or the bundled model cannot be made.
    """

    def refuse(message: str) -> NoReturn:
        wrong = UNKNOWN.search(message)
        known = parser._option_string_actions
        raise ConfigError(message + (sources.did_you_mean(wrong[1], known) if wrong else ""))

    parser.error = refuse  # type: ignore[method-assign]
    parser.set_defaults(model=None)
    args = parser.parse_args(list(vllm_args))
    args.model = args.model_tag or args.model or str(demo_model())
    return args


def given(parser: ArgumentParser, args: Namespace) -> dict[str, Any]:
    """The options of ``args`` that differ from vLLM's defaults."""
    return {
        name: value
        for name, value in vars(args).items()
        if name != "model_tag" and value != parser.get_default(name)
    }


def check_model(args: Namespace) -> None:
    """Is there such a model? vLLM tells only after a minute, and in many lines.

    Raises:
        ConfigError: no such folder, no such name on the hub, or no way to reach the hub.
    """
    early.check_folder(args.model)
    if "://" not in args.model and not Path(args.model).expanduser().exists():
        _check_hub(args)


def _check_hub(args: Namespace) -> None:
    """One short question to the hub, unless the model is in its cache or from elsewhere."""
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache
    from vllm import envs

    name = args.model.split(":")[0]  # org/name:QUANT is a GGUF file of org/name
    if envs.VLLM_USE_MODELSCOPE or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return
    if isinstance(try_to_load_from_cache(name, "config.json", revision=args.revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"no model {name}: it is not in the hub's cache, and the hub is offline")
    token = args.hf_token if isinstance(args.hf_token, str) else None
    try:
        HfApi().model_info(name, revision=args.revision, timeout=HUB_SECONDS, token=token)
    except errors.GatedRepoError:
        raise ConfigError(f"model {name} is gated: accept its terms, set HF_TOKEN") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ConfigError(
            f"no model {name}: neither a folder nor on the hub (a private one needs HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"model {name} has no revision {args.revision}") from None
    except Exception as error:
        raise ConfigError(
            f"no model {name} in this folder or the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}): give a folder"
        ) from None
