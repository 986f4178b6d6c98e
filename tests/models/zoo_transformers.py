"""Transformers configurations of two layers and 32 features: the architectures as they are, too small to cost time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.zoo_entry import Entry, Inputs, images

# The same sizes under the names that the configurations use.
_BERT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64,
        "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}  # fmt: skip
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False,
}  # fmt: skip
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
       "decoder_start_token_id": 0, "use_cache": False}  # fmt: skip
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8}  # fmt: skip
_WAV = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": [16, 16],
    "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip


def _tokens(rows: int) -> Inputs:
    return {"input_ids": torch.randint(3, 64, (rows, 16))}


def _pairs(rows: int) -> Inputs:
    return {**_tokens(rows), "decoder_input_ids": torch.randint(3, 64, (rows, 8))}


def _waves(rows: int) -> Inputs:
    return {"input_values": torch.randn(rows, 400)}


def _whisper(rows: int) -> Inputs:
    return {"input_features": torch.randn(rows, 8, 64), "decoder_input_ids": torch.randint(3, 64, (rows, 8))}


def _boxes(rows: int) -> Inputs:
    return {**_tokens(rows), "bbox": torch.randint(0, 15, (rows, 16, 4)).cumsum(-1)}


_PIXELS = images(32, name="pixel_values")
_PIXELS_64 = images(64, name="pixel_values")

# family: (prefix of the configuration class, arguments, inputs)
_CONFIGS: dict[str, tuple[str, dict[str, Any], Callable[[int], Inputs]]] = {
    "albert": ("Albert", {**_BERT, "embedding_size": 16}, _tokens),
    "bart": ("Bart", _BART, _pairs),
    "beit": ("Beit", _VIT, _PIXELS),
    "bert": ("Bert", _BERT, _tokens),
    "bloom": ("Bloom", {**_GPT, "hidden_size": 32}, _tokens),
    "clip_text": ("CLIPText", _BERT, _tokens),
    "clip_vision": ("CLIPVision", _VIT, _PIXELS),
    "convnext": ("ConvNext", {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2}, _PIXELS),
    "cvt": ("Cvt", {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}, _PIXELS_64),
    "deberta_v2": ("DebertaV2", {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, _tokens),
    "deit": ("DeiT", _VIT, _PIXELS),
    "detr": ("Detr", {}, _PIXELS_64),
    "dinov2": ("Dinov2", {**_VIT, "mlp_ratio": 2}, _PIXELS),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        _tokens,
    ),
    "electra": ("Electra", {**_BERT, "embedding_size": 16}, _tokens),
    "falcon": ("Falcon", {**_BERT, "ffn_hidden_size": 64, "use_cache": False}, _tokens),
    "funnel": (
        "Funnel",
        {
            "vocab_size": 64,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
        },
        _tokens,
    ),
    "gemma": ("Gemma", _LLAMA, _tokens),
    "gemma2": ("Gemma2", {**_LLAMA, "sliding_window": 8}, _tokens),
    "gpt2": ("GPT2", _GPT, _tokens),
    "gpt_neox": ("GPTNeoX", _LLAMA, _tokens),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}, _tokens),
    "hubert": ("Hubert", _WAV, _waves),
    "layoutlm": ("LayoutLM", {**_BERT, "max_2d_position_embeddings": 64}, _boxes),
    "llama": ("Llama", _LLAMA, _tokens),
    "longformer": ("Longformer", {**_BERT, "attention_window": 4}, _tokens),
    "marian": ("Marian", _BART, _pairs),
    "mbart": ("MBart", _BART, _pairs),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 8}, _tokens),
    "mixtral": ("Mixtral", {**_LLAMA, "num_local_experts": 4}, _tokens),
    "mobilevit": (
        "MobileViT",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
            "num_attention_heads": 4,
        },
        _PIXELS_64,
    ),
    "mpnet": ("MPNet", _BERT, _tokens),
    "mpt": (
        "Mpt",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 64,
            "vocab_size": 64,
            "use_cache": False,
        },
        _tokens,
    ),
    "olmo": ("Olmo", _LLAMA, _tokens),
    "opt": ("OPT", {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False}, _tokens),
    "pegasus": ("Pegasus", _BART, _pairs),
    "phi": ("Phi", _LLAMA, _tokens),
    "phi3": ("Phi3", _LLAMA, _tokens),
    "qwen2": ("Qwen2", _LLAMA, _tokens),
    "resnet": (
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        _PIXELS,
    ),
    "roberta": ("Roberta", _BERT, _tokens),
    "segformer": (
        "Segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "num_attention_heads": [1, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        _PIXELS,
    ),
    "swin": (
        "Swin",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
        _PIXELS,
    ),
    "swinv2": (
        "Swinv2",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4},
        _PIXELS,
    ),
    "t5": ("T5", _T5, _pairs),
    "vit": ("ViT", _VIT, _PIXELS),
    "wav2vec2": ("Wav2Vec2", _WAV, _waves),
    "whisper": (
        "Whisper",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
        _whisper,
    ),
    "xlnet": ("XLNet", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, _tokens),
}


def transformers_models() -> list[Entry]:
    """One tiny base model per architecture."""
    import transformers

    def entry(family: str, prefix: str, arguments: dict[str, Any], inputs: Callable[[int], Inputs]) -> Entry:
        def build(drop_path_rate: float | None = None) -> nn.Module:
            config = getattr(transformers, f"{prefix}Config")(**arguments)
            if drop_path_rate is not None:
                if not hasattr(config, "drop_path_rate"):
                    raise TypeError(f"{prefix}Config has no drop_path_rate")
                config.drop_path_rate = [drop_path_rate] * 3 if family == "cvt" else drop_path_rate
            elif hasattr(config, "drop_path_rate"):
                config.drop_path_rate = [0.0] * 3 if family == "cvt" else 0.0
            return getattr(transformers, f"{prefix}Model")(config)

        return Entry("transformers", family, f"{prefix}Model", build, inputs, on_meta=False)

    return [entry(family, *rest) for family, rest in _CONFIGS.items()]
