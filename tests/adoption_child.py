"""Programs of others, run here one after the other, with a look at the engines that they make.

``python adoption_child.py RESULT PROGRAM...``: a PROGRAM is a JSON list, a module or a path and its
arguments. Nothing is done to a program but that its engines are kept until it has ended, and asked
what they are. RESULT is written in the end.
"""

from __future__ import annotations

import json
import runpy
import sys
from functools import wraps
from pathlib import Path
from typing import Any


def functions_of_ours() -> list[str]:
    """Functions of vLLM's classes, and classes of its modules, that are fusedstep's now."""
    found = set()
    modules = [(n, m) for n, m in sys.modules.items() if n.split(".")[0] == "vllm" and m]
    for name, module in modules:
        for word, value in list(vars(module).items()):
            if getattr(value, "__module__", None) is None or not isinstance(value, type):
                continue
            if value.__module__.startswith("fusedstep."):
                found.add(f"{name}.{word}")
            if not value.__module__.startswith("vllm."):
                continue
            for method, function in list(vars(value).items()):
                if isinstance(function, property):
                    function = function.fset or function.fget
                code = getattr(function, "__code__", None)
                if code is not None and "/vllm_plugin/" in code.co_filename:
                    found.add(f"{value.__qualname__}.{method}")
    return sorted(found)


def describe(engine: Any) -> dict[str, Any]:
    config = engine.vllm_config
    try:
        stats = engine.collective_rpc("window_stats")[0]
    except Exception:  # vLLM's own worker
        stats = None
    return {
        "worker": str(config.parallel_config.worker_cls),
        "scheduler": str(config.scheduler_config.scheduler_cls),
        "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes,
        "config": config_text(config),
        "windows": stats,
    }


def config_text(config: Any) -> str:
    """All of it, without what is new in every run."""
    fields = {name: value for name, value in vars(config).items() if name != "instance_id"}
    return repr(fields)


def main(result: str, programs: list[list[str]]) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    engines: list[Any] = []
    stock = LLMEngine.from_engine_args.__func__

    @wraps(stock)
    def from_engine_args(cls: Any, *args: Any, **kwargs: Any) -> Any:
        engines.append(stock(cls, *args, **kwargs))
        return engines[-1]

    LLMEngine.from_engine_args = classmethod(from_engine_args)
    told = []
    for program, *args in programs:
        sys.argv = [program, *args]
        run = runpy.run_path if program.endswith(".py") else runpy.run_module
        run(program, run_name="__main__")
        told.append([describe(engine) for engine in engines])
        for engine in engines:
            engine.engine_core.shutdown()
        engines.clear()
    found = {"engines": told, "ours": functions_of_ours()}
    Path(result).write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(sys.argv[1], [json.loads(program) for program in sys.argv[2:]])
