"""Configurations that vLLM makes of arguments, without an engine; prints JSON.

``python config_child.py MODEL CASES``: CASES is a JSON list of [variables, arguments].
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from typing import Any

from adoption_child import config_text, functions_of_ours
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class OwnScheduler(AsyncScheduler):
    """A user's."""


class OwnWorker:
    """A user's."""


def make(model: str, variables: dict[str, str], given: dict[str, Any]) -> dict[str, Any]:
    """What comes of one case: the configuration, or the error; and what was said."""
    before = dict(os.environ)
    os.environ.update(variables)
    said, stderr = io.StringIO(), io.StringIO()
    log = logging.getLogger("vllm.fusedstep")

    def hear(record: logging.LogRecord) -> bool:
        said.write(f"{record.getMessage()}\n")
        return True

    log.addFilter(hear)  # vLLM's configuration would take a handler away
    cls = AsyncEngineArgs if given.pop("asynchronous", False) else EngineArgs
    found: dict[str, Any] = {}
    try:
        with contextlib.redirect_stderr(stderr):
            config = cls(model=model, **given).create_engine_config()
        found |= {
            "worker": str(config.parallel_config.worker_cls),
            "scheduler": str(config.scheduler_config.scheduler_cls),
            "async": config.scheduler_config.async_scheduling,
            "options": config.additional_config,
            "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
            "v2": config.use_v2_model_runner,
            "text": config_text(config),
        }
    except Exception as error:
        ends_with = error.code if isinstance(error, SystemExit) else None
        found |= {"error": type(error).__name__, "words": str(error), "code": ends_with}
    finally:
        log.removeFilter(hear)
        os.environ.clear()
        os.environ.update(before)
    return found | {"said": said.getvalue().splitlines(), "stderr": stderr.getvalue().splitlines()}


if __name__ == "__main__":
    made = [make(sys.argv[1], *case) for case in json.loads(sys.argv[2])]
    from vllm.platforms import current_platform

    platform = type(current_platform).__qualname__
    found = {"made": made, "ours": functions_of_ours(), "platform": platform}
    print("\n" + json.dumps(found, default=str))
