"""Inside a child process of ``features_child``: engines that decode speculatively, and faults.

The models are random, of so few tokens that drafts hold now and then.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engine_child
import features_child
import standin_child
import workload_child

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,  # of 32: vLLM's CPU attention knows no less
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
DRAFT_VOCAB = 24  # tokens that the head of EAGLE-3 knows
Asked = tuple[list[int], dict[str, Any], int]  # prompt, sampling fields, step of its arrival


def make_models(folder: Path) -> dict[str, str]:
    """A target; a draft model that is nearly the target; heads of EAGLE and EAGLE-3; and MiMo, a
    target with a head of its own (MTP)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **CONFIG))
    _follow_the_last_token(target)
    target.save_pretrained(folder / "target")
    weights = target.state_dict()
    draft = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **CONFIG))
    draft.load_state_dict({k: w + 0.03 * torch.randn_like(w) for k, w in weights.items()})
    draft.save_pretrained(folder / "draft")
    config = LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"], **CONFIG)
    _save(folder / "eagle", config, _eagle_head(weights))
    config.update({"draft_vocab_size": DRAFT_VOCAB, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]})
    config.architectures = ["LlamaForCausalLMEagle3"]
    _save(folder / "eagle3", config, _eagle3_head(weights))
    mimo = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, **CONFIG))
    _follow_the_last_token(mimo)
    config = Qwen2Config(num_hidden_layers=2, architectures=["MiMoForCausalLM"], **CONFIG)
    config.update({"num_nextn_predict_layers": 1})
    weights = mimo.state_dict()
    _save(folder / "mimo", config, weights | _mtp_head(weights))
    return {name: str(folder / name) for name in ("target", "draft", "eagle", "eagle3", "mimo")}


def _follow_the_last_token(model: Any) -> None:
    """The last token says much of the next: a head can know it."""
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight *= 10
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3


def _save(folder: Path, config: Any, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _eagle_head(weights: dict[str, Any]) -> dict[str, Any]:
    """The target's first layer, of the token's embedding alone."""
    import torch

    first, size = "model.layers.0.", CONFIG["hidden_size"]
    tensors = {k.removeprefix("model."): w for k, w in weights.items() if k.startswith(first)}
    del tensors["layers.0.input_layernorm.weight"]  # the head has none
    tensors["fc.weight"] = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)
    return tensors


def _eagle3_head(weights: dict[str, Any]) -> dict[str, Any]:
    """Its attention looks up the token's embedding, to which it adds the target's hidden states of
    three layers, mixed at random. It drafts three tokens of four."""
    import torch

    size, vocab_size = CONFIG["hidden_size"], CONFIG["vocab_size"]
    table = weights["model.embed_tokens.weight"]
    normed = table / table.square().mean(dim=1, keepdim=True).sqrt()
    one_hot = torch.linalg.pinv(normed.T)  # [V, size]: of an embedding, which token it is
    embeds = torch.cat([one_hot, torch.zeros(vocab_size, size)], dim=1)  # not the hidden states
    mlp = {f"midlayer.{k}": weights[f"model.layers.0.{k}"] for k in MLP}
    drafted = torch.arange(vocab_size)[torch.arange(vocab_size) % 4 != 3]
    return mlp | {
        "midlayer.self_attn.q_proj.weight": 8 * embeds.repeat(2, 1),
        "midlayer.self_attn.k_proj.weight": 8 * embeds,  # so that a token looks at its like
        "midlayer.self_attn.v_proj.weight": embeds,
        "midlayer.self_attn.o_proj.weight": torch.cat([table.T, torch.zeros_like(table.T)], dim=1),
        "midlayer.input_layernorm.weight": torch.ones(size),
        "midlayer.hidden_norm.weight": torch.ones(size),
        "midlayer.post_attention_layernorm.weight": torch.ones(size),
        "norm.weight": torch.ones(size),
        "fc.weight": 0.03 * torch.randn(size, 3 * size),
        "lm_head.weight": weights["lm_head.weight"][drafted],
        "d2t": drafted - torch.arange(DRAFT_VOCAB),
    }


def _mtp_head(weights: dict[str, Any]) -> dict[str, Any]:
    """The target's first layer, of the token's embedding and a little of the hidden state."""
    import torch

    first, head, size = "model.layers.0.", "model.mtp_layers.0.", CONFIG["hidden_size"]
    tensors = {head + k.removeprefix(first): w for k, w in weights.items() if k.startswith(first)}
    mix = [0.1 * torch.randn(size, size), torch.eye(size)]
    tensors[head + "input_proj.weight"] = torch.cat(mix, dim=1)
    for name, scale in (("token", 2.0), ("hidden", 1.0), ("final", 1.0)):
        tensors[f"{head}{name}_layernorm.weight"] = scale * torch.ones(size)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def run(
    model: str,
    options: dict[str, Any],
    requests: list[Asked],
    decode_steps: object = 1,
    cut_seed: int | None = None,
) -> dict[str, Any]:
    """``answer`` of an engine with these options."""
    features_child.use(model, options)
    return answer(requests, decode_steps, cut_seed)


def answer(
    requests: list[Asked], decode_steps: object = 1, cut_seed: int | None = None
) -> dict[str, Any]:
    """Each request's tokens, how it ended, and vLLM's own counts of its drafts, step by step."""
    engine_child.reset_prefix_cache()
    before = features_child.counts()
    if before:
        engine_child.set_decode_steps(decode_steps)
    engine, answers = engine_child.ENGINE, {}
    waiting, step = dict(enumerate(requests)), 0
    with workload_child._cut_windows(cut_seed if before else None):
        while waiting or engine.has_unfinished_requests():
            for number in [n for n, (_, _, at) in waiting.items() if at <= step]:
                token_ids, asked, _ = waiting.pop(number)
                fields = {"detokenize": False} | asked
                bad_words = fields.pop("bad_words_token_ids", None)  # a tokenizer would give them
                lora = features_child.lora_request(fields.pop("lora", None))
                params = features_child.sampling_params(fields)
                params._bad_words_token_ids = bad_words
                prompt = {"prompt_token_ids": token_ids}
                engine.add_request(str(number), prompt, params, lora_request=lora)
            for output in engine.step():
                answers[int(output.request_id)] = output
            step += 1
            assert step < 3000, sorted(waiting)
    ordered = [answers[n] for n in range(len(requests))]
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in ordered],
        "ends": [(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in ordered],
        "logprobs": [engine_child.logprobs(o.outputs[0].logprobs) for o in ordered],
        "drafts": [engine_child.drafts_of(o.outputs[0].spec_decode_metrics) for o in ordered],
        "counts": features_child.since(before),
    }


def answer_on_the_stand_in(
    seed: int | None, requests: list[Asked], *windows: Any
) -> dict[str, Any]:
    """``answer``; and what the host waited for inside windows, and the graphs replayed."""
    from standin.device import GPU

    from fusedstep.vllm_plugin.runner import runner

    standin_child.use_timing(seed)
    run_window, waits = runner.run_window, Counter[str]()

    def counted(*args: Any) -> None:
        before = Counter(GPU.asked)
        run_window(*args)
        waits.update(GPU.asked - before)

    replays = standin_child.num_replays()
    with patch.object(runner, "run_window", counted):
        answered = answer(requests, *windows)
    graphs = {kind: n - replays[kind] for kind, n in standin_child.num_replays().items()}
    return answered | {"waits": dict(waits), "graphs": graphs}


def prove(fault: str | None) -> str | None:
    """What the proof of the recorded rounds says; ``fault``: replays do nothing."""
    import torch
    from standin.engine import python_ops
    from standin.modes import on_device

    from fusedstep.window.proof import WrongTokensError

    store = engine_child.runner().graph_store
    graphs = [*store.graphs._single.values(), *store.graphs._many.values()]
    with ExitStack() as stack:
        stack.callback(engine_child.reset_prefix_cache)  # the proof has used its blocks
        for graph in graphs if fault else ():
            stack.enter_context(patch.object(graph, "replay", lambda: None))
        try:
            with torch.inference_mode(), on_device(python_ops()):
                store.prove()
        except WrongTokensError as error:
            return str(error)
        return None


def run_with_wrong_drafts(*args: Any) -> dict[str, Any]:
    """Each draft is another token than the drafter's, in stock steps and in rounds."""
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    from fusedstep.vllm_plugin.runner.drafter import DraftModel

    def wrong(propose: Any) -> Any:
        return lambda *args, **kwargs: (propose(*args, **kwargs) + 1) % CONFIG["vocab_size"]

    with (
        patch.object(StandaloneARSpeculator, "propose", wrong(StandaloneARSpeculator.propose)),
        patch.object(DraftModel, "propose", wrong(DraftModel.propose)),
    ):
        return run(*args)


def run_with_adapters(*args: Any, without: bool = False) -> dict[str, Any]:
    """None changes lm_head, whose adapters end vLLM's steps with drafts on a CPU: it is told those
    of requests, and has several logits of each. ``without``: windows forget them."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(PunicaWrapperCPU, "add_lora_logits", lambda *_, **__: None)
        )
        if without:
            stack.enter_context(features_child.without_adapters())
        return run(*args)


def run_without_the_device_s_lengths(*args: Any) -> dict[str, Any]:
    """A round takes its tokens, but not into the request: the next begins where it began."""
    from fusedstep.ops.native import NativeStep

    accept = NativeStep.accept

    def forgetful(self: Any, tokens: Any, num_tokens: Any, rows: Any, num_reqs: int) -> None:
        before = self._requests.num_computed_tokens.copy()
        accept(self, tokens, num_tokens, rows, num_reqs)
        self._requests.num_computed_tokens[:] = before

    with patch.object(NativeStep, "accept", forgetful):
        return run(*args)
