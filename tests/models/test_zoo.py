"""Discovery on the models that people use, against the table of docs/models.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from models.found import Found, find
from models.semantics import check_gating
from models.table import parse
from models.zoo import zoo
from models.zoo_entry import Entry, drops_paths

pytestmark = pytest.mark.filterwarnings("error::rdp.RdpWarning", "ignore:.* left ungated:rdp.RdpWarning")

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = parse(DOCUMENT.read_text())
ZOO = zoo()


def test_the_table_has_a_row_for_each_model_of_the_zoo() -> None:
    assert sorted(TABLE) == sorted(entry.key for entry in ZOO)
    assert sum(entry.source == "timm" for entry in ZOO) >= 98
    assert len({entry.family for entry in ZOO if entry.source == "timm"}) == 98
    assert sum(entry.source == "transformers" for entry in ZOO) >= 40


_SECONDS = 0.3
"""In the column of the table; with less to do than then."""

CHOSEN: dict[tuple[str, str], Entry] = {}
"""One size of each architecture, one that is checked if there is one."""
for each in sorted(ZOO, key=lambda entry: not entry.check):
    CHOSEN.setdefault((each.source, each.family), each)


def slow(entry: Entry) -> bool:
    """Is it the code of another one once more, as most of torchvision's models are, or does it take its time?"""
    again = not entry.check and CHOSEN[entry.source, entry.family] is not entry
    return again or float(TABLE.get(entry.key, {}).get("s") or 0) >= _SECONDS


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.key, marks=pytest.mark.slow if slow(e) else ()) for e in ZOO])
def test_the_table_says_what_discovery_finds(entry: Entry) -> None:
    found, row = entry.find(), TABLE[entry.key]
    assert len(found.branches) == int(row["branches"])
    assert sum(branch.sums for branch in found.branches) == int(row["sums"])
    assert (f"`{found.branches[-1].name}`" if found.branches else "") == row["last branch"]
    assert len(found.refused) == sum(map(int, re.findall(r"(?:^|; )(\d+): ", row["refused"])))


@pytest.mark.parametrize("key", TABLE)
def test_every_gated_model_of_the_table_is_exact(key: str) -> None:
    assert TABLE[key]["check"] in ("exact", "")


def found_in(create_model: Callable[[str], nn.Module], name: str) -> Found:
    with torch.device("meta"):
        return find(create_model(name), torch.zeros(2, 3, 224, 224), native="off")


def test_resnet_50_ends_its_branches_at_the_last_batch_norm() -> None:
    blocks = [f"layer{stage}.{i}" for stage, depth in enumerate((3, 4, 6, 3), 1) for i in range(depth)]
    for create_model in (timm.create_model, torchvision.models.get_model):
        found = found_in(create_model, "resnet50")
        assert [b.name for b in found.branches] == [f"{block}.bn3" for block in blocks]
        assert [b.kind for b in found.branches] == [
            "projection" if block.endswith(".0") else "identity" for block in blocks
        ]
        layers = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "bn")]
        for branch, block in zip(found.branches, blocks, strict=True):
            expected = {f"{block}.{layer}.weight" for layer in layers} | {f"{block}.bn{i}.bias" for i in (1, 2, 3)}
            assert set(branch.parameters) == expected, "all of the branch, and nothing of the downsampling"


def test_vit_base_has_two_branches_a_block_with_their_norms() -> None:
    found = found_in(timm.create_model, "vit_base_patch16_224")
    assert [b.name for b in found.branches] == [f"blocks.{i}.drop_path{j}" for i in range(12) for j in (1, 2)]
    assert [b.depth for b in found.branches] == [i for i in range(12) for _ in range(2)]
    for i, branch in enumerate(found.branches):
        layers = ("norm1", "attn.qkv", "attn.proj") if i % 2 == 0 else ("norm2", "mlp.fc1", "mlp.fc2")
        expected = {f"blocks.{i // 2}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        assert set(branch.parameters) == expected


@pytest.mark.parametrize(
    ("name", "branches"),
    [("swin_tiny_patch4_window7_224", 24), ("convnext_tiny", 18), ("resnet50", 16), ("vit_base_patch16_224", 24)],
)
def test_well_known_models_have_the_branches_of_their_papers(name: str, branches: int) -> None:
    found = found_in(timm.create_model, name)
    assert (len(found.branches), found.refused) == (branches, ())


def test_bert_has_attention_and_feed_forward_branches() -> None:
    (entry,) = [e for e in ZOO if e.name == "BertModel"]
    assert [b.name for b in entry.find().branches] == [
        f"encoder.layer.{i}.{part}.dropout" for i in range(2) for part in ("attention.output", "output")
    ]


@pytest.mark.parametrize("family", ["densenet", "inception_v3", "inception_v4", "pnasnet", "selecsls", "vgg", "rdnet"])
def test_models_that_concatenate_have_no_branches(family: str) -> None:
    (entry,) = [e for e in ZOO if e.source == "timm" and e.family == family]
    found = entry.find()
    assert (found.branches, found.refused) == ((), ())


@pytest.mark.parametrize("family", ["dpn", "rexnet"])
def test_partial_residual_connections_are_refused_by_name(family: str) -> None:
    (entry,) = [e for e in ZOO if e.source == "timm" and e.family == family]
    found = entry.find()
    assert found.branches == ()
    assert all(refusal.name and refusal.reason for refusal in found.refused)
    assert len(found.refused) > 10


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_nfnet", "test_byobnet"])
def test_all_of_a_models_own_drop_paths_are_on_branches(name: str) -> None:
    (entry,) = [e for e in ZOO if e.name == name]
    torch.manual_seed(0)
    model = entry.build(drop_path_rate=0.1)
    own = {name for name, module in model.named_modules() if drops_paths(module)}
    found = find(model, entry.inputs(2), native="off")
    assert own
    assert own <= {gate.module for branch in found.branches for gate in branch.gates}


SMALL = [
    "test_vit", "test_vit_relpos", "test_resnet", "test_convnext", "test_nfnet", "test_byobnet", "test_mambaout",
    "test_coatnet", "edgenext_xx_small", "mobilevit_xxs", "BertModel", "T5Model", "GPTJModel", "SwinModel",
    "XLNetModel", "DebertaV2Model", "AlbertModel",
]  # fmt: skip


@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in SMALL], ids=lambda entry: entry.key)
def test_gating_small_models_is_exact(entry: Entry) -> None:
    torch.manual_seed(0)
    assert check_gating(*entry.build_quick()) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("entry", [e for e in ZOO if e.check and e.name not in SMALL], ids=lambda entry: entry.key)
def test_gating_every_model_is_exact(entry: Entry) -> None:
    torch.manual_seed(0)
    if int(TABLE[entry.key]["branches"]) == 0:
        with pytest.raises(Exception, match="no residual branch"):
            check_gating(*entry.build_quick())
    else:
        assert check_gating(*entry.build_quick()) == []
