"""The commands: what goes to vLLM, and one line and exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import FUSEDSTEP, SMALL, free_port

from fusedstep.bench import prompts, verify
from fusedstep.cli.main import group
from fusedstep.errors import ConfigError
from fusedstep.options import Options
from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.launch import server, sources, wiring

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Run = Callable[..., tuple[int, str, str]]
MODEL = "MODEL"  # stands for the bundled model's folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``fusedstep`` in this process: exit code, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            group.main(list(args), prog_name="fusedstep")
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def assert_one_line(err: str, words: str) -> None:
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err


@pytest.mark.parametrize(
    ("args", "decode_steps", "stock", "vllm_args"),
    (
        pytest.param((), "auto", False, (), id="nothing"),
        pytest.param(("m", "--decode-steps", "4"), "4", False, ("m",), id="model first"),
        pytest.param(
            ("--enforce-eager", "m", "--decode-steps=4", "--port", "1"),
            "4",
            False,
            ("--enforce-eager", "m", "--port", "1"),
            id="flag first",
        ),
        pytest.param(
            ("--hf-overrides", '{"a": [1]}', "--stock", "-O3", "-tp=2", "-dph", "--seed", "-1"),
            "auto",
            True,
            ("--hf-overrides", '{"a": [1]}', "-O3", "-tp=2", "-dph", "--seed", "-1"),
            id="json and short options",
        ),
        pytest.param(("--help=all",), "auto", False, ("--help=all",), id="help of vLLM"),
        pytest.param(
            ("--compilation-config.mode", "1", "--", "m", "--x"),
            "auto",
            False,
            ("--compilation-config.mode", "1", "--", "m", "--x"),
            id="dots",
        ),
    ),
)
def test_serve_keeps_its_options_and_passes_on_the_others(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    decode_steps: str,
    stock: bool,
    vllm_args: tuple[str, ...],
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *got, verbose: seen.append(got[:3]))
    for name in ("DECODE_STEPS", "OPS", "LOOP"):
        monkeypatch.delenv(f"FUSEDSTEP_{name}", raising=False)
    assert run("serve", *args)[0] == 0
    assert seen == [(Options.parse({"decode_steps": decode_steps}), stock, vllm_args)]


@pytest.mark.parametrize(
    ("args", "words"),
    (
        (("serve", "--decode-steps", "0"), "from 1 to 64, not '0'"),
        (("serve", "--decode-steps=65"), "from 1 to 64, not '65'"),
        (("serve", "--decode-steps"), "requires an argument"),
        (("serve", "--ops", "fast"), "'auto', 'triton', 'native', 'reference'"),
        (("bench", "latency", "--loop=for"), "'while', 'unrolled', 'replay', 'eager'"),
        (("verify", "--limit", "0"), "--limit"),
        (("verify", "--max-tokens", "0"), "--max-tokens"),
        (("verify", "--sampling", "[1]"), "want a JSON object"),
        (("verify", "--json", "no/such/folder/x.json"), "cannot write no/such/folder/x.json"),
        (("verify", "--json", "."), "it is a folder"),
        (("verify", "--prompts", "no-such-file"), "cannot read the prompts file no-such-file"),
        (("verify", "--prompts", "."), "cannot read the prompts file . (Is a directory)"),
        (("verify", "--promts", "x"), "no option --promts: did you mean --prompts?"),
        (("verify", "--port", "1"), "no option --port"),
        (("verify", "--sampling", '{"tempreature": 1}'), "did you mean temperature?"),
        (("verify", "--sampling", '{"top_k": "x"}'), "--sampling: \"top_k\" must be int, not 'x'"),
        (("serve", "--max-model-lenn", "3"), "--max-model-lenn: did you mean --max-model-len?"),
        (("serve", "--max_modl_len=3"), "no option --max_modl_len: did you mean --max-model-len?"),
        (
            ("serve", "--hf-overides.x", "3"),
            "no option --hf-overides: did you mean --hf-overrides?",
        ),
        (("serve", "--decode-step", "3"), "no option --decode-step: did you mean --decode-steps?"),
        (("serve", "no/such/model"), "no model at no/such/model: give a folder"),
        (("serve", "tests"), "no model at tests: the folder has no config.json"),
        (("serve", "--port", "70000"), "cannot listen on 127.0.0.1:70000 (ports go from 0"),
        (("bench", "latency", "--output-len", "100000"), "--output-len 100000: 100032 tokens do"),
        (("bench", "latency", "--batch-size=2,9", MODEL, "--max-num-seqs=8"), "--batch-size 9 is"),
        (("bench", "latency", MODEL, "--max-model-len=9"), "do not fit into the model's context"),
        (("bench", "latency", "--sampling", '{"max_tokens": 3}'), "max_tokens is chosen by bench"),
        (("bench", "latency", "--temperature", "nan"), "want numbers from 0 to 2"),
        (("bench", "latency", "no/such/model"), "no model at no/such/model"),
        (("bench", "rollout", "--output-len", "100000"), "--output-len 100000: 100032 tokens do"),
        (("bench", "rollout", MODEL, "--max-model-len=9"), "do not fit into the model's context"),
        (("bench", "rollout", "--sampling", '{"n": 3}'), "n is chosen by bench rollout"),
        (("bench", "rollout", "--logprobs=1", MODEL, "--max-logprobs=0"), "--logprobs 1 is more"),
        (("bench", "rollout", "--logprobs", "2"), "'0', '1', 'none'"),
        (("bench", "rollout", "--repeats", "1"), "--repeats"),
        (("bench", "rollout", "no/such/model"), "no model at no/such/model"),
        (("verify", "--speculative-config", "{x"), 'want a JSON object like {"method": "ngram"'),
        (("bench", "latency", "-sc", "[1]"), "-sc: want a JSON object like"),
        (("bench", "serve", "--speculative_config=3"), "want a JSON object like"),
        (
            ("verify", "--speculative-config", '{"method": "ngrm"}'),
            "no method 'ngrm': did you mean ngram?",
        ),
        (("serve", "-sc", '{"method": "x"}'), "-sc: no method 'x': use ngram, draft_model, eagle"),
        (
            ("bench", "latency", MODEL, "--without-drafts", "--enforce-eager"),
            "--without-drafts: there are none without --speculative-config",
        ),
        (("bench", "kernels", "--batch-size", "10000000"), "GiB are free: lower it"),
        (("bench", "latancy"), "No such command 'latancy': did you mean latency?"),
        (("explain", "--seconds", "nan"), "is no number"),
        (("explain", "--url", "a b"), "no server address: 'a b'"),
        (("sevre",), "No such command 'sevre': did you mean serve?"),
        (("explain", "--ulr", "x"), "Did you mean '--url'?"),
        (("bench", "latency", "--batch-size", "1,0"), "want numbers from 1 up"),
        (("no-such-command",), "No such command"),
        (("--no-such-option",), "No such option"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, model: str, args: tuple[str, ...], words: str
) -> None:
    """And before anything is started: no process, no vLLM."""
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)
    code, out, err = run(*(model if arg == MODEL else arg for arg in args))
    assert (code, out) == (2, "")
    assert_one_line(err, words)


@pytest.mark.parametrize(
    "command", (("serve",), ("verify",), ("bench", "latency"), ("bench", "rollout")), ids=" ".join
)
@pytest.mark.parametrize(
    ("on_cpu", "args", "line"),
    (
        (True, ("--loop", "replay"), "--loop replay needs a GPU; use eager or auto"),
        (False, ("--ops", "native"), "--ops native needs a CPU; use triton or auto"),
    ),
    ids=("cpu", "gpu"),
)
def test_what_the_platform_has_not_is_one_line_before_any_engine(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    on_cpu: bool,
    args: tuple[str, ...],
    line: str,
) -> None:
    monkeypatch.setattr(wiring, "is_cpu_build", lambda: on_cpu)
    monkeypatch.setattr(subprocess, "Popen", None)
    code, out, err = run(*command, *args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"error: {line}"


@pytest.mark.parametrize("found", ("0.31.9", "0.34.0", None))
@pytest.mark.parametrize("stock", ((), ("--stock",)))
def test_wrong_vllm_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, found: str | None, stock: tuple[str, ...]
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: found)
    code, _, err = run("serve", *stock)
    assert code == 2
    assert_one_line(err, "needs vLLM >=0.32,<0.34")


def test_ctrl_c_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serve", interrupted)
    assert run("serve") == (130, "", "\n")


# Runs argument lists one after the other: vLLM is imported once. Prints [exit code, stderr] each.
CHILD = """
import contextlib, io, json, os, sys
from fusedstep.cli.main import group
results = []
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = group.main(args, prog_name="fusedstep")
        except SystemExit as end:
            code = end.code
    results.append([code, err.getvalue()])
from fusedstep.cli.options import split_model
from fusedstep.vllm_plugin.launch import arguments
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
names = {
    "engine": list(arguments.engine_parser()._option_string_actions),
    "server": list(make_arg_parser(FlexibleArgumentParser())._option_string_actions),
    "sampling": [name for name in SamplingParams.__struct_fields__ if name[0] != "_"],
}
models = [split_model(tuple(args)) for args in json.loads(sys.argv[2])]
print("RESULT" + json.dumps([results, models, names]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def child(model: str) -> tuple[dict[str, tuple[int, str]], list[Any], dict[str, list[str]]]:
    """What ``serve`` says to wrong arguments, where MODEL is found, and what vLLM itself takes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        wrong = {
            "path": ["/no/such/model"],
            "hub": ["no-such-org-of-fusedstep/no-such-model"],
            "short": [model, "-ttp", "3"],
            "value": [model, "--max-model-len", "many"],
            "port": [model, "--port", port],
            "context": [model, "--max-model-len", "100000", "--port", str(free_port())],
        }
        models = [
            ["--enforce-eager", "m", "--dtype", "float32"],
            ["--tokenizer", "m", "m"],
            ["--max-model-len=1k", "--hf-overrides", '{"a": 1}'],
            ["--model", "m"],
        ]
        args = [["serve", *args] for args in wrong.values()]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(args), json.dumps(models)],
            capture_output=True,
            text=True,
            timeout=600,
        )
    result = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    assert result is not None, done.stderr
    results, found, names = json.loads(result.removeprefix("RESULT"))
    return dict(zip(wrong, map(tuple, results), strict=True)), found, names


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("path", "no model at /no/such/model"),
        ("hub", "no model no-such-org-of-fusedstep/no-such-model"),
        ("short", "unrecognized arguments: -ttp 3: did you mean -tp?"),
        ("value", "argument --max-model-len"),
        ("port", "choose another --host or --port"),
    ),
)
def test_what_vllm_cannot_serve_is_one_line(child: Any, name: str, words: str) -> None:
    code, err = child[0][name]
    assert code == 2
    assert_one_line(err, words)


def test_context_longer_than_the_model_is_one_line(child: Any) -> None:
    code, err = child[0]["context"]
    assert code == 2 and "max_model_len (100000) is greater" in err
    assert_one_line(err, "max_model_len (100000) is greater")


@pytest.mark.parametrize("parser", ("engine", "server"))
def test_no_option_of_vllms_parser_is_refused_early(child: Any, parser: str) -> None:
    """What we read out of vLLM's sources against its own parser."""
    long = [name for name in child[2][parser] if name.startswith("--")]
    assert len(long) > 300
    sources.check_options(long, server=parser == "server")
    sources.check_options([name[:-1] for name in long], server=parser == "server")
    with pytest.raises(ConfigError, match="no option --port"):
        sources.check_options(["--port"], server=False)


def test_sampling_fields_are_vllms(child: Any) -> None:
    assert set(sources.sampling_fields()) == set(child[2]["sampling"])


def test_model_is_found_among_options(child: Any, model: str) -> None:
    assert child[1] == [
        ["m", ["--enforce-eager", "--dtype", "float32"]],
        ["m", ["--tokenizer", "m"]],
        [model, ["--max-model-len=1k", "--hf-overrides", '{"a": 1}']],
        ["m", ["--model", "m"]],
    ]


def test_error_of_the_engine_core_is_one_line() -> None:
    """It is raised in another process; nothing of the server may be left, but its log."""
    args = ["--max-model-len", "8192", "--kv-cache-memory-bytes", "20000000", "--enforce-eager"]
    port = free_port()
    done = subprocess.run(
        [FUSEDSTEP, "serve", *args, "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=600,
        start_new_session=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "max seq len (8192)" in errors[0]
    assert len(lines) < 12 and "Traceback" not in done.stderr
    stages = [line.partition("] ")[2] for line in lines if line.startswith("[")]
    assert stages[:2] == ["loading vLLM", "starting the engine"]
    assert "loading the weights" in stages
    log = Path(lines[-2].removeprefix("vLLM's log: "))
    assert log.name == f"serve-{port}.log" and "Initializing a V1 LLM engine" in log.read_text()
    log.unlink()


def completion(tokens: list[int], gap: float = 1.0, finish: str = "length") -> dict[str, Any]:
    """An engine's answer whose best logprob leads by ``gap``; 0 is the second best everywhere."""
    return {
        "prompt": "p",
        "completions": [
            {
                "token_ids": tokens,
                "finish_reason": finish,
                "logprobs": [{t: (-0.5, 1), 0: (-0.5 - gap, 2)} for t in tokens],
            }
        ],
    }


@pytest.mark.parametrize(
    ("stock", "ours", "verdict", "at"),
    (
        pytest.param(completion([1, 2]), completion([1, 2]), "identical", None, id="same"),
        pytest.param(completion([1, 2]), completion([1, 0]), "DIFFERENT", 1, id="wide gap"),
        pytest.param(completion([1, 2], 1e-5), completion([1, 0]), "near-tie", 1, id="near tie"),
        pytest.param(
            completion([1, 2], 1e-5), completion([1, 7]), "DIFFERENT", 1, id="not a candidate"
        ),
        pytest.param(completion([1, 2], 1e-5), completion([1]), "DIFFERENT", 1, id="too short"),
        pytest.param(completion([1]), completion([1, 2]), "DIFFERENT", 1, id="too long"),
        pytest.param(completion([1]), completion([1], finish="stop"), "DIFFERENT", 1, id="end"),
    ),
)
def test_compare_tells_rounding_from_a_defect(
    stock: dict[str, Any], ours: dict[str, Any], verdict: str, at: int | None
) -> None:
    item = verify.compare(stock, ours, 0, gap=1e-4)
    assert (item.verdict, item.at) == (verdict, at)


def test_report_counts() -> None:
    items = [
        verify.compare(completion([1, 2], 1e-5), completion(ours), 0, 1e-4)
        for ours in ([1, 2], [1, 2], [1, 0], [3, 2])
    ]
    report = verify.Report("stock", items, 7.5, {}, "native", "eager").as_dict()
    assert {key: report[key] for key in ("requests", "identical", "near_tie", "different")} == {
        "requests": 4,
        "identical": 2,
        "near_tie": 1,
        "different": 1,
    }
    assert report["tokens"] == 8 and report["steps_per_window_mean"] == 7.5
    assert [item["verdict"] for item in report["items"]][2:] == ["near-tie", "DIFFERENT"]


def test_requests_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("one\n\ntwo\n")
    assert prompts.read_requests(path, {"top_k": 3}) == [
        prompts.Request("one", {"top_k": 3}),
        prompts.Request("two", {"top_k": 3}),
    ]
    path.write_text('{"prompt": "a", "logit_bias": {"7": 1}}\n{"prompt": "b", "top_k": 1}\n')
    assert prompts.read_requests(path, {"top_k": 3}) == [
        prompts.Request("a", {"top_k": 3, "logit_bias": {7: 1}}),
        prompts.Request("b", {"top_k": 1}),
    ]
    assert len(prompts.read_requests(None, {})) >= 40


@pytest.mark.parametrize("mark", (b"", b"\xef\xbb\xbf"), ids=("plain", "byte-order mark"))
@pytest.mark.parametrize("end", ("\n", "\r\n", "\r"), ids=repr)
def test_any_text_editor_writes_a_prompts_file(tmp_path: Path, mark: bytes, end: str) -> None:
    """Byte-order mark, line ends, and characters that only Python takes for line ends."""
    path = tmp_path / "prompts"
    lines = ['{"prompt": "a\u2028b\x85", "top_k": 1}', "", '{"prompt": "c"}']
    path.write_bytes(mark + end.join(lines).encode())
    found = prompts.read_requests(path, {})
    assert found == [prompts.Request("a\u2028b\x85", {"top_k": 1}), prompts.Request("c")]
    assert [request.where for request in found] == [f"{path} line 1", f"{path} line 3"]
    path.write_bytes(mark + end.join(("one", "", "two")).encode())
    assert [request.prompt for request in prompts.read_requests(path, {})] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "words"),
    (
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xff\xfea\0", "(UTF-16?): save it as UTF-8"),
        ("a\nb".encode("utf-16-be"), "(UTF-16?): save it as UTF-8"),
        (b"a\nb\nc\xe4\n", "(line 3 is not UTF-8)"),
        (b'\xef\xbb\xbf\r\n{"text": "a"}\r\n', "line 2: want JSON"),
        (b'{"prompt": "a"}\n\n{"prompt": "a", "temperature": "warm"}\n', 'line 3: "temperature"'),
        (b'{"prompt": "a", "temprature": 1}\n', 'line 1: no sampling field "temprature": did you'),
        (b'{"prompt": "a", "stop": [1]}\n', 'line 1: "stop" must be str | list[str] | null'),
        (b'{"prompt": "a", "ignore_eos": 1}\n', 'line 1: "ignore_eos" must be bool, not 1'),
        (b'{"prompt": "a"}\nb\n', "line 2: want JSON"),
        (b'{"text": "a"}\n', "line 1: want JSON"),
        (b'{"prompt": 3}\n', "line 1: want JSON"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}\n', 'line 1: "logit_bias" must be dict[int'),
    ),
)
def test_wrong_prompts_file_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, words: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # no engine is started
    path = tmp_path / "prompts"
    path.write_bytes(content)
    code, _, err = run("verify", "--prompts", str(path))
    assert code == 2
    assert_one_line(err, words)
    with pytest.raises(ConfigError):
        prompts.read_requests(path, {})


def test_verify_finds_windows_identical_to_stock(model: str) -> None:
    """With the prompts of the examples: several lengths, logprobs, a stop string, two choices."""
    path = EXAMPLES / "own_prompts.jsonl"
    command = [FUSEDSTEP, "verify", model, "--prompts", str(path), "--max-tokens=12", "--json=-"]
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) >= {
        "requests",
        "identical",
        "near_tie",
        "different",
        "tokens",
        "steps_per_window_mean",
        "items",
    }
    assert report["requests"] == len(report["items"]) == 7  # one request has two completions
    assert report["identical"] + report["near_tie"] == 7 and report["different"] == 0
    assert report["tokens"] == sum(item["tokens"] for item in report["items"]) > 50
    assert report["steps_per_window_mean"] > 2


@pytest.mark.exhaustive  # the kernels in real vLLM: test_equality.py
def test_verify_with_the_kernels_of_a_gpu(tmp_path: Path, model: str) -> None:
    """Triton interpreted, inside real vLLM, against stock: few tokens, as it is slow."""
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "The capital of France is"},
        {"prompt": "A robot", "temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"prompt": "la la la", "repetition_penalty": 1.3},
        {"prompt": "not this one"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [FUSEDSTEP, "verify", model, "--ops=triton", "--prompts", str(path), "--limit=3"]
    command += ["--max-tokens=6", "--json=-"]
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["ops"], report["loop"], report["oracle"]) == ("triton", "eager", "oracle")
    assert (report["requests"], report["identical"]) == (3, 3)
    assert report["steps_per_window_mean"] > 1 and set(report["stock_steps"]) == {"prefill"}
