"""Small models of code bases that are not timm, torchvision or transformers, and how many branches there are in each.

`expected` was written down from reading the code: the number of places in a forward where something is added to the
residual stream that it was computed from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """One model of a code base."""

    package: str
    """On the registry."""
    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    expected: int
    reading: str
    """How `expected` was counted."""
    rows: bool = True
    """Can it be called with rows?"""


def images(size: int = 32, count: int = 4, channels: int = 3) -> Tensor:
    """Tensor[count, channels, size, size]."""
    return torch.randn(count, channels, size, size)


def of(module: str) -> Any:
    """A module that is imported where a model is built."""
    return importlib.import_module(module)


def diffusers(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """A model of diffusers."""
    return lambda: getattr(of("diffusers"), name)(**settings)


def _open_clip() -> nn.Module:
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}
    return of("open_clip").model.CLIP(64, vision, text)


def _whisper() -> nn.Module:
    model = of("whisper.model")
    return model.Whisper(model.ModelDimensions(8, 16, 32, 2, 2, 50, 8, 32, 2, 2))


def _lora() -> nn.Module:
    transformers = of("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    settings = of("peft").LoraConfig(r=2, target_modules=["query", "value", "q_proj", "v_proj"])
    return of("peft").get_peft_model(transformers.ViTForImageClassification(config), settings)


class _Graphs(nn.Module):
    """Layers of torch_geometric, one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges)
        return x


def _deep_gcn() -> nn.Module:
    geometric = of("torch_geometric.nn")
    return _Graphs(
        [
            geometric.DeepGCNLayer(geometric.GCNConv(16, 16), nn.LayerNorm(16), nn.ReLU(), block="res+", dropout=0.0)
            for _ in range(3)
        ]
    )


def _gps() -> nn.Module:
    geometric = of("torch_geometric.nn")
    return _Graphs([geometric.GPSConv(16, geometric.GCNConv(16, 16), heads=2, norm=None) for _ in range(2)])


def _graph() -> Inputs:
    return (torch.randn(12, 16), torch.randint(12, (2, 30))), {}


def _yolo() -> nn.Module:
    with redirect_stdout(StringIO()):
        return of("ultralytics.nn.tasks").DetectionModel("yolov8n.yaml", verbose=False)


_UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
_DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}


def models() -> list[Model]:
    """All of them."""
    tokens = (torch.randint(100, (4, 16)),)
    return [
        Model(
            "diffusers", "UNet2DModel",
            diffusers("UNet2DModel", **_UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                      up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8),
            lambda: ((images(16), torch.arange(4)), {}),
            12, "ResNet blocks: 1 + 1 down, 2 in the middle, 2 + 2 up; attention: 1 + 1 + 2",
        ),
        Model(
            "diffusers", "UNet2DConditionModel",
            diffusers("UNet2DConditionModel", **_UNET, cross_attention_dim=32, attention_head_dim=8,
                      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                      up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
            lambda: ((images(16, channels=4), torch.arange(4), torch.randn(4, 5, 32)), {}),
            24, "8 ResNet blocks; 4 transformers of 1 block: 3 sums and 1 around it",
        ),
        Model(
            "diffusers", "AutoencoderKL",
            diffusers("AutoencoderKL", block_out_channels=(32, 64), norm_num_groups=8,
                      down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
            lambda: ((images(16),), {}),
            12, "encoder 1 + 1 + 2 ResNet blocks and 1 attention; decoder 2 + 2 + 2 and 1",
        ),
        Model(
            "diffusers", "DiTTransformer2DModel",
            diffusers("DiTTransformer2DModel", **_DIT, in_channels=4, num_embeds_ada_norm=10),
            lambda: ((images(8, channels=4),), {"timestep": torch.arange(4), "class_labels": torch.arange(4)}),
            4, "2 blocks: attention, feed-forward",
        ),
        Model(
            "diffusers", "PixArtTransformer2DModel",
            diffusers("PixArtTransformer2DModel", **_DIT, in_channels=4, cross_attention_dim=32, caption_channels=32,
                      use_additional_conditions=False),
            lambda: (
                (images(8, channels=4), torch.randn(4, 5, 32), torch.arange(4)),
                {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
            ),
            6, "2 blocks: attention, cross attention, feed-forward",
        ),
        Model(
            "diffusers", "SD3Transformer2DModel",
            diffusers("SD3Transformer2DModel", **_DIT, in_channels=4, joint_attention_dim=32, caption_projection_dim=32,
                      pooled_projection_dim=32, pos_embed_max_size=8),
            lambda: ((images(8, channels=4), torch.randn(4, 5, 32), torch.randn(4, 32), torch.arange(4)), {}),
            6, "2 joint blocks: attention and feed-forward of images and of text, of text not in the last",
        ),
        Model(
            "diffusers", "FluxTransformer2DModel",
            diffusers("FluxTransformer2DModel", in_channels=16, num_layers=2, num_single_layers=2,
                      attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                      axes_dims_rope=(4, 4, 8)),
            lambda: (
                (torch.randn(4, 16, 16), torch.randn(4, 5, 32), torch.randn(4, 32), torch.arange(4) / 4),
                {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
            ),
            10, "2 double blocks of 4 sums; 2 single blocks of 1",
        ),
        Model(
            "open_clip_torch", "CLIP (ViT, 2 layers each)", _open_clip,
            lambda: ((images(), torch.randint(100, (4, 16))), {}),
            8, "attention and MLP, 2 layers, image and text",
        ),
        Model(
            "monai", "ViT",
            lambda: of("monai.networks.nets").ViT(1, (16, 16), (8, 8), hidden_size=32, mlp_dim=64, num_layers=2,
                                                  num_heads=2, spatial_dims=2),
            lambda: ((images(16, channels=1),), {}),
            4, "2 layers: attention, MLP",
        ),
        Model(
            "monai", "SwinUNETR",
            lambda: of("monai.networks.nets").SwinUNETR(1, 2, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8),
                                                        feature_size=12, spatial_dims=2),
            lambda: ((images(64, 2, 1),), {}),
            26, "8 Swin blocks of 2 sums; 5 encoders and 5 decoders with a residual block",
        ),
        Model(
            "monai", "SegResNet",
            lambda: of("monai.networks.nets").SegResNet(2, init_filters=8, blocks_down=(1, 2), blocks_up=(1,)),
            lambda: ((images(16, channels=1),), {}),
            4, "residual blocks: 1 + 2 down, 1 up; the skip is a sum of two streams",
        ),
        Model(
            "monai", "UNet (2 residual units)",
            lambda: of("monai.networks.nets").UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2),
            lambda: ((images(16, channels=1),), {}),
            5, "residual units: 2 down, 1 at the bottom, 2 up",
        ),
        Model(
            "x-transformers", "Decoder",
            lambda: of("x_transformers").TransformerWrapper(
                num_tokens=100, max_seq_len=16, attn_layers=of("x_transformers").Decoder(dim=32, depth=2, heads=2)
            ),
            lambda: (tokens, {}),
            4, "2 layers: attention, feed-forward",
        ),
        Model(
            "x-transformers", "Encoder, scale_residual",
            lambda: of("x_transformers").ContinuousTransformerWrapper(
                max_seq_len=16,
                attn_layers=of("x_transformers").Encoder(dim=32, depth=2, heads=2, scale_residual=True),
            ),
            lambda: ((torch.randn(4, 16, 32),), {}),
            4, "2 layers: attention, feed-forward; the shortcut is scaled in a module that adds",
        ),
        Model(
            "x-transformers", "Decoder, gate_residual",
            lambda: of("x_transformers").TransformerWrapper(
                num_tokens=100, max_seq_len=16,
                attn_layers=of("x_transformers").Decoder(dim=32, depth=2, heads=2, gate_residual=True),
            ),
            lambda: (tokens, {}),
            0, "a GRU joins stream and branch: nothing is added",
        ),
        Model(
            "vit-pytorch", "ViT",
            lambda: of("vit_pytorch").ViT(image_size=32, patch_size=16, num_classes=5, dim=32, depth=2, heads=2,
                                          mlp_dim=64),
            lambda: ((images(),), {}),
            4, "2 layers: attention, MLP",
        ),
        Model(
            "vit-pytorch", "CaiT",
            lambda: of("vit_pytorch.cait").CaiT(image_size=32, patch_size=16, num_classes=5, dim=32, depth=2,
                                                cls_depth=1, heads=2, mlp_dim=64),
            lambda: ((images(),), {}),
            6, "2 layers and 1 of class attention: attention, MLP",
        ),
        Model(
            "vit-pytorch", "CrossViT",
            lambda: of("vit_pytorch.cross_vit").CrossViT(
                image_size=32, num_classes=5, depth=1, sm_dim=32, sm_patch_size=8, sm_enc_depth=1, sm_enc_heads=2,
                sm_enc_mlp_dim=64, sm_enc_dim_head=16, lg_dim=32, lg_patch_size=16, lg_enc_depth=1, lg_enc_heads=2,
                lg_enc_mlp_dim=64, lg_enc_dim_head=16, cross_attn_depth=1, cross_attn_heads=2, cross_attn_dim_head=16,
            ),
            lambda: ((images(),), {}),
            6, "2 encoders of 1 layer: attention, MLP; cross attention both ways",
        ),
        Model(
            "vit-pytorch", "MobileViT",
            lambda: of("vit_pytorch.mobile_vit").MobileViT(
                image_size=(64, 64), dims=[32, 48, 64], num_classes=5,
                channels=[16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 64],
            ),
            lambda: ((images(64),), {}),
            21, "inverted residuals of stride 1 and equal widths: 3; transformers of 2, 4 and 3 layers of 2 sums",
        ),
        Model(
            "segmentation-models-pytorch", "Unet (resnet18)",
            lambda: of("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None),
            lambda: ((images(),), {}),
            8, "the blocks of its encoder",
        ),
        Model(
            "segmentation-models-pytorch", "FPN (resnet34)",
            lambda: of("segmentation_models_pytorch").FPN("resnet34", encoder_weights=None),
            lambda: ((images(64),), {}),
            16, "the blocks of its encoder; the pyramid adds resampled streams",
        ),
        Model(
            "ultralytics", "YOLOv8n", _yolo, lambda: ((images(64),), {}),
            6, "bottlenecks of the backbone's C2f: 1 + 2 + 2 + 1; those of the neck do not add",
        ),
        Model(
            "torch_geometric", "DeepGCNLayer(res+) x 3", _deep_gcn, _graph,
            3, "one a layer", rows=False,
        ),
        Model(
            "torch_geometric", "GPSConv x 2", _gps, _graph,
            6, "2 layers: message passing, attention, MLP", rows=False,
        ),
        Model(
            "rtdl_revisiting_models", "FTTransformer",
            lambda: of("rtdl_revisiting_models").FTTransformer(
                n_cont_features=5, cat_cardinalities=[], d_out=2, n_blocks=2, d_block=16, attention_n_heads=2,
                attention_dropout=0.0, ffn_d_hidden_multiplier=2, ffn_dropout=0.0, residual_dropout=0.0,
            ),
            lambda: ((torch.randn(8, 5), None), {}),
            4, "2 blocks: attention, feed-forward",
        ),
        Model(
            "rtdl_revisiting_models", "ResNet",
            lambda: of("rtdl_revisiting_models").ResNet(
                d_in=5, d_out=2, n_blocks=2, d_block=16, d_hidden=32, d_hidden_multiplier=None, dropout1=0.0,
                dropout2=0.0,
            ),
            lambda: ((torch.randn(8, 5),), {}),
            2, "2 blocks",
        ),
        Model(
            "peft", "LoRA on transformers' ViT", _lora, lambda: ((images(),), {}),
            4, "2 layers: attention, MLP; what LoRA adds is no residual sum",
        ),
        Model(
            "hyper-connections", "manual hyper-connections x 3", _hyper, lambda: ((torch.randn(4, 16),), {}),
            3, "one a layer, over 4 streams",
        ),
        Model(
            "denoising-diffusion-pytorch", "KarrasUnet",
            lambda: of("denoising_diffusion_pytorch").KarrasUnet(
                image_size=16, dim=16, dim_max=32, channels=3, num_downsamples=1, num_blocks_per_stage=1,
                attn_res=(8,), attn_dim_head=8,
            ),
            lambda: ((images(16), torch.rand(4)), {}),
            16, "encoder 3 blocks, 2 with attention; middle 2 of 2; decoder 5 and 2; mp_add mixes stream and branch",
        ),
        Model(
            "conformer", "Conformer",
            lambda: of("conformer").Conformer(dim=32, depth=2, dim_head=16, heads=2),
            lambda: ((torch.randn(4, 16, 32),), {}),
            8, "2 layers: two feed-forwards at a half, attention, convolution",
        ),
        Model(
            "openai-whisper", "Whisper",
            _whisper, lambda: ((torch.randn(4, 8, 32), torch.randint(50, (4, 6))), {}),
            10, "encoder of 2 layers: attention, MLP; decoder of 2: attention, cross attention, MLP",
        ),
    ]  # fmt: skip


def _hyper() -> nn.Module:
    make, expand, reduce = of("hyper_connections").get_init_and_expand_reduce_stream_functions(4)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(make(dim=16, branch=nn.Linear(16, 16)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = expand(x)
            for layer in self.layers:
                x = layer(x)
            return reduce(x)

    return Layers()
