"""Tiny random models that take sound, and their processors: more of ``tiny_vlms``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tiny_models import TEXT, initialise, save_tokenizer
from tiny_vlms import (
    AUDIO,
    END,
    IMAGE,
    QWEN3_VISION,
    START,
    VIDEO,
    VISION,
    gemma3n,
    maker,
    rename_weights,
    tokenizer_with,
)

VISION_START, VISION_END = 2005, 2006
OMNI = {
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}
OMNI_IDS = dict(
    zip(OMNI.values(), (START, END, IMAGE, VIDEO, AUDIO, VISION_START, VISION_END), strict=True)
)
# An encoder of sound as Whisper's; thirty seconds long, as vLLM's models want it.
ENCODER = {
    "num_mel_bins": 80,
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "max_source_positions": 1500,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

# Voxtral's tokenizer: special tokens first, then each byte, then bytes by two.
MISTRAL_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[BEGIN_AUDIO]", "[AUDIO]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]"),
    *("[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[TRANSCRIBE]", "[ARGS]", "[CALL_ID]"),
)
BEGIN_SOUND, SOUND = (MISTRAL_SPECIALS.index(name) for name in ("[BEGIN_AUDIO]", "[AUDIO]"))
SECONDS = 2  # a sound's length, padded to a multiple of it
TOKENS_OF_SOUND = 25  # 12.5 each second
# Tokens that stand for a sound in a prompt.
TOKENS: dict[str, tuple[int, ...]] = {
    "qwen25_omni": (START, AUDIO, END),
    "qwen3_omni": (START, AUDIO, END),
    "ultravox": (AUDIO,),
    "granite_speech": (AUDIO,),
    "voxtral": (BEGIN_SOUND, *[SOUND] * TOKENS_OF_SOUND),
    "gemma3n_sound": (AUDIO,),
    "glm_asr": (AUDIO,),
}


@maker
def qwen25_omni(folder: Path) -> None:
    """The thinker: sound and images, and M-RoPE, whose positions follow the sound's time."""
    import transformers

    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "rope_parameters": MROPE},
        audio_config=ENCODER | {"output_dim": 64, "n_window": 50},
        vision_config={
            **VISION,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
        audio_start_token_id=START,
        audio_end_token_id=END,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    whole = transformers.Qwen2_5OmniConfig(thinker_config=config.to_dict())
    _save_thinker(folder, thinker, whole, "Qwen2_5OmniForConditionalGeneration")
    transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        feature_extractor=transformers.WhisperFeatureExtractor(),
        tokenizer=tokenizer_with(folder, OMNI_IDS, OMNI),
    ).save_pretrained(folder)


@maker
def qwen3_omni(folder: Path) -> None:
    """The thinker: as Qwen2.5-Omni's, with a mixture of experts."""
    import transformers

    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        audio_config=ENCODER | {"output_dim": 64, "downsample_hidden_size": 8},
        vision_config={
            **QWEN3_VISION,
            "depth": 1,
            "deepstack_visual_indexes": [0],
            "image_size": 128,
            "apply_vit_abs_pos_embed": True,
        },
        audio_start_token_id=START,
        audio_end_token_id=END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    thinker = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    whole = transformers.Qwen3OmniMoeConfig(thinker_config=config.to_dict())
    _save_thinker(folder, thinker, whole, "Qwen3OmniMoeForConditionalGeneration")
    transformers.Qwen3OmniMoeProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=16),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=16),
        feature_extractor=transformers.WhisperFeatureExtractor(),
        tokenizer=tokenizer_with(folder, OMNI_IDS, OMNI),
    ).save_pretrained(folder)


def _save_thinker(folder: Path, thinker: Any, whole: Any, name: str) -> None:
    """As the thinker lies in a checkpoint of the whole model, which also talks."""
    initialise(thinker)
    thinker.save_pretrained(folder)
    rename_weights(folder, "", "thinker.")
    whole.architectures = [name]
    whole.save_pretrained(folder)


@maker
def ultravox(folder: Path) -> None:
    """Whisper's encoder and a projector, before a Llama."""
    import torch
    import transformers
    from safetensors.torch import save_file

    text = {**TEXT, "num_hidden_layers": 2, "model_type": "llama"}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    whisper = transformers.WhisperConfig(**ENCODER, decoder_layers=1, vocab_size=8)
    encoder = transformers.models.whisper.modeling_whisper.WhisperEncoder(whisper)
    for model in (llama, encoder):
        initialise(model)
    generator = torch.Generator().manual_seed(1)
    width = 8 * ENCODER["d_model"]
    projector = {
        "ln_pre.weight": torch.ones(width),
        "linear_1.weight": torch.randn(128, width, generator=generator) * 0.2,
        "ln_mid.weight": torch.ones(64),
        "linear_2.weight": torch.randn(64, 64, generator=generator) * 0.2,
    }
    weights = {
        f"{part}.{name}": tensor.contiguous()
        for part, tensors in (
            ("language_model", llama.state_dict()),
            ("audio_tower", encoder.state_dict()),
            ("multi_modal_projector", projector),
        )
        for name, tensor in tensors.items()
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "ultravox",
        "architectures": ["UltravoxModel"],
        "text_config": text,
        "audio_config": {**ENCODER, "model_type": "whisper", "decoder_layers": 1},
        "audio_token_index": AUDIO,
        "hidden_size": 128,
        "projector_ln_mid": True,
        "vocab_size": TEXT["vocab_size"],
        **{name: TEXT[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, {"<|audio|>": AUDIO})
    shutil.copy(Path(__file__).with_name("ultravox_processing.py"), folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    own = {
        "processor_class": "UltravoxProcessor",
        "auto_map": {"AutoProcessor": "ultravox_processing.UltravoxProcessor"},
        "stack_factor": 8,
    }
    (folder / "processor_config.json").write_text(json.dumps(own))


@maker
def granite_speech(folder: Path) -> None:
    """A conformer and a Q-Former, before a Granite."""
    import transformers

    config = transformers.GraniteSpeechConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "model_type": "granite"},
        encoder_config={
            "num_layers": 2,
            "hidden_dim": 64,
            "num_heads": 2,
            "output_dim": 8,
            "context_size": 20,
            "max_pos_emb": 32,
        },
        projector_config={
            **VISION,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "encoder_hidden_size": 64,
            "cross_attention_frequency": 1,
        },
        audio_token_index=AUDIO,
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )
    model = transformers.GraniteSpeechForConditionalGeneration(config)
    initialise(model)
    model.save_pretrained(folder)
    rename_weights(folder, "language_model.model.model.", "language_model.model.")
    transformers.GraniteSpeechProcessor(
        audio_processor=transformers.GraniteSpeechFeatureExtractor(),
        tokenizer=save_tokenizer(folder, {"<|audio|>": AUDIO}),
    ).save_pretrained(folder)


@maker
def voxtral(folder: Path) -> None:
    """Whisper's encoder before a Mistral, in the form that Mistral publishes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    width, inner, size = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (size, width),
        "output.weight": (size, width),
        "norm.weight": (width,),
    }
    for layer in range(2):
        at = f"layers.{layer}"
        shapes |= _mistral_layer(at, width, inner, width // 2)
        shapes[f"{at}.feed_forward.w3.weight"] = (inner, width)
    tower = "mm_whisper_embeddings.whisper_encoder"
    shapes |= {
        f"{tower}.conv_layers.0.weight": (width, 80, 3),
        f"{tower}.conv_layers.1.weight": (width, width, 3),
        f"{tower}.transformer.norm.weight": (width,),
        "mm_whisper_embeddings.audio_language_projection.0.weight": (width, 4 * width),
        "mm_whisper_embeddings.audio_language_projection.2.weight": (width, width),
    }
    at = f"{tower}.transformer.layers.0"
    shapes |= _mistral_layer(at, width, inner, width)
    biased = "conv_layers.0", "conv_layers.1", "norm", "wq", "wv", "wo", "w1", "w2", "ffn_norm"
    biased = *biased, "attention_norm"
    for name in [name for name in shapes if name.startswith(tower)]:
        if name.removesuffix(".weight").endswith(biased):
            shapes[f"{name.removesuffix('weight')}bias"] = shapes[name][:1]
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        if tensor.dim() > 1:
            tensor.normal_(std=0.2, generator=generator)
        elif name.endswith("norm.weight"):
            tensor.fill_(1)
    folder.mkdir()
    save_file(weights, folder / "consolidated.safetensors", metadata={"format": "pt"})
    (folder / "params.json").write_text(json.dumps(_voxtral_params(width, inner, size)))
    (folder / "tekken.json").write_text(json.dumps(_tekken(size)))


def _mistral_layer(at: str, width: int, inner: int, kv_width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.attention.wq.weight": (width, width),
        f"{at}.attention.wk.weight": (kv_width, width),
        f"{at}.attention.wv.weight": (kv_width, width),
        f"{at}.attention.wo.weight": (width, width),
        f"{at}.attention_norm.weight": (width,),
        f"{at}.feed_forward.w1.weight": (inner, width),
        f"{at}.feed_forward.w2.weight": (width, inner),
        f"{at}.ffn_norm.weight": (width,),
    }


def _voxtral_params(width: int, inner: int, size: int) -> dict[str, Any]:
    encoder = {
        "dim": width,
        "n_layers": 1,
        "head_dim": 32,
        "hidden_dim": inner,
        "n_heads": 2,
        "vocab_size": size,
        "max_source_positions": 50 * SECONDS,
        "audio_encoding_args": {
            "sampling_rate": 16000,
            "num_mel_bins": 80,
            "hop_length": 160,
            "window_size": 400,
        },
    }
    return {
        "dim": width,
        "n_layers": 2,
        "head_dim": 32,
        "hidden_dim": inner,
        "n_heads": 2,
        "n_kv_heads": 1,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "vocab_size": size,
        "max_position_embeddings": TEXT["max_position_embeddings"],
        "multimodal": {
            "whisper_model_args": {
                "encoder_args": encoder,
                "downsample_args": {"downsample_factor": 4},
            }
        },
    }


def _tekken(size: int) -> dict[str, Any]:
    import base64

    first = len(MISTRAL_SPECIALS)
    singles = [bytes([one]) for one in range(256)]
    pairs = [bytes([one, two]) for one in range(97, 123) for two in range(33, 127)]
    words = [*singles, *pairs][: size - first]
    return {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": len(words),
            "default_vocab_size": size,
            "default_num_special_tokens": first,
            "version": "v7",
        },
        "vocab": [
            {"rank": n, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for n, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": n, "token_str": name, "is_control": True}
            for n, name in enumerate(MISTRAL_SPECIALS)
        ],
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "chunk_length_s": SECONDS,
            "audio_encoding_config": {"num_mel_bins": 80, "hop_length": 160, "window_size": 400},
        },
    }


@maker
def gemma3n_sound(folder: Path) -> None:
    """The same model as for images."""
    gemma3n(folder)


@maker
def glm_asr(folder: Path) -> None:
    """An encoder of sound with rotary embeddings, four of whose steps are a token, and a Llama."""
    import transformers

    config = transformers.GlmAsrConfig(
        text_config={**TEXT, "num_hidden_layers": 2},
        audio_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": 80,
        },
        audio_token_id=AUDIO,
        tie_word_embeddings=False,
    )
    model = transformers.GlmAsrForConditionalGeneration(config)
    initialise(model)
    model.save_pretrained(folder)
    rename_weights(folder, "language_model.model.model.", "language_model.model.")
    transformers.GlmAsrProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(),
        tokenizer=save_tokenizer(folder, {"<|pad|>": AUDIO}),
    ).save_pretrained(folder)
