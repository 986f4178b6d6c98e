"""Branches that are too small to gain from running on some of their rows run dense, by an estimate of their cost."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from laws.training import after_forward
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rdp


@pytest.fixture(autouse=True)
def nothing_is_too_small() -> None:
    """Here it is."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def net(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(width), Block(width), Block(width))


def attach(model: nn.Module, x: Tensor | dict[str, Tensor], **options: Any) -> rdp.ResidualDropPath:
    return rdp.attach(model, 0.5, decay="constant", sampling="fixed", example_inputs=x, **options)


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(64, 8), (256, 32), (2, 16, 8)], ids=str)
def test_a_tiny_branch_does_what_a_dense_one_does(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = net(shape[-1])
    twin = copy.deepcopy(model)
    handles = attach(model, x), attach(twin, x, compute="dense")
    assert all(branch.compute == "dense" for branch in handles[0].branches)
    assert all(branch.note.startswith("dense: too small to gain") for branch in handles[0].branches)
    assert "dense: too small to gain" in str(handles[0])
    for step in range(4):
        calls = []
        for net_, handle in zip((model, twin), handles, strict=True):
            with Calls() as counted:
                net_(x).sum().backward()
            handle.advance()
            calls.append(counted.counts)
        assert step < 2 or calls[0] == calls[1]  # in the first cycle, something is remembered for all handles


def test_rows_are_forced_by_name() -> None:
    x = torch.randn(4, 8)
    with attach(net(8), x, compute="rows") as handle:
        assert [(branch.compute, branch.note) for branch in handle.branches] == [("rows", "")] * 3


@pytest.mark.parametrize("first", ["few", "many"])
def test_the_rows_of_the_batch_decide(first: str) -> None:
    model = net(64)
    few = attach(model, torch.randn(4, 64))
    fewest = few.branches[0].fewest
    few.remove()
    assert 2 < fewest < 10_000
    x = {"few": torch.randn(fewest - 1, 64), "many": torch.randn(fewest, 64)}
    handle, seen = attach(model, x[first]), list[int]()
    after_forward(model[0].f, lambda args, _: seen.append(len(args[0])))
    for name in (first, "few", "many", "few"):
        seen.clear()
        model(x[name])
        rows, compute = len(x[name]), "rows" if name == "many" else "dense"
        assert seen == [rows - (rows + 1) // 2 if name == "many" else rows]
        assert [branch.compute for branch in handle.branches] == [compute] * 3
        small = "" if name == "many" else f"dense: too small to gain with fewer than {fewest} rows"
        assert handle.branches[0].note == small


_TEXT = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0, "use_cache": False}
_PAIRS = {"vocab_size": 64, "d_model": 256, "pad_token_id": 0, "decoder_start_token_id": 1, "use_cache": False}
_BERT = {**_TEXT, "num_hidden_layers": 1, "intermediate_size": 1024}
_IDS = {"input_ids": (4, 64), "labels": (4, 64)}
# Architecture: the model, a configuration of ordinary sizes, without dropout, and the shapes of its inputs.
ORDINARY: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "Llama": ("ForCausalLM", {**_BERT, "num_key_value_heads": 2}, _IDS),
    "GPT2": (
        "LMHeadModel",
        {
            "vocab_size": 64, "n_embd": 256, "n_layer": 1, "n_head": 4, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": 0, "eos_token_id": 0, "use_cache": False,
        },
        _IDS,
    ),
    "Bert": ("ForMaskedLM", {**_BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, _IDS),
    "T5": (
        "ForConditionalGeneration",
        {**_PAIRS, "d_kv": 64, "d_ff": 1024, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0},
        _IDS,
    ),
    "ViT": (
        "ForImageClassification",
        {**_TEXT, "num_hidden_layers": 1, "intermediate_size": 1024, "image_size": 64, "patch_size": 8},
        {"pixel_values": (4, 3, 64, 64), "labels": (4,)},
    ),
    "Whisper": (
        "ForConditionalGeneration",
        {
            **_PAIRS, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "num_mel_bins": 8,
            "max_source_positions": 64, "dropout": 0.0,
        },
        {"input_features": (4, 8, 128), "labels": (4, 64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ORDINARY)
def test_language_and_vision_models_called_with_labels_run_on_rows_by_default(architecture: str) -> None:
    import transformers

    head, arguments, shapes = ORDINARY[architecture]
    torch.manual_seed(0)
    model = getattr(transformers, architecture + head)(getattr(transformers, f"{architecture}Config")(**arguments))
    floats = ("pixel_values", "input_features")
    inputs = {n: torch.randn(s) if n in floats else torch.randint(2, size=s) for n, s in shapes.items()}
    for compute in ("auto", "rows"):
        with attach(model, inputs, compute=compute, verify=compute == "rows") as handle:
            assert len(handle.branches) >= 2
            assert {branch.compute for branch in handle.branches} == {"rows"}, str(handle)
