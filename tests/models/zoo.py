"""The models that discovery is held to: one per timm family, torchvision's classifiers, small transformers.

Nothing is downloaded: every model is built from its code with random weights, by default on the `meta` device, where
it costs no memory and hardly any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.zoo_entry import Entry, images

# The smallest model of each family that has residual branches, if the family has any.
TIMM = """
beit:beit_base_patch16_224 byoanet:halonet_h1 byobnet:test_byobnet cait:cait_xxs24_224 coat:coat_tiny
convit:convit_tiny convmixer:convmixer_768_32 convnext:test_convnext cpubone:cpubone_nano crossvit:crossvit_tiny_240
csatv2:csatv2 cspnet:cs3darknet_focus_s cspnext:cspnext_tiny davit:davit_tiny deepseek_vit:deepseek_vit_412m
deit:deit_tiny_patch16_224 densenet:densenet121 dla:dla46x_c dpn:dpn48b edgenext:edgenext_xx_small
efficientformer:efficientformer_l1 efficientformer_v2:efficientformerv2_s0 efficientnet:efficientnet_b0
efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0 efficientvit_msra:efficientvit_m0
eva:vit_tiny_patch16_dinov3_qkvb fasternet:fasternet_t0 fastvit:fastvit_t8 focalnet:focalnet_tiny_srf
gcvit:gcvit_xxtiny gemma4_vit:gemma4_vit_167m ghostnet:ghostnet_050 hardcorenas:hardcorenas_b hgnet:hgnetv2_b0
hiera:hiera_tiny_224 hieradet_sam2:sam2_hiera_tiny hrnet:hrnet_w18_small iformer:iformer_t
inception_next:inception_next_atto inception_resnet_v2:inception_resnet_v2 inception_v3:inception_v3
inception_v4:inception_v4 lcnetv2:lcnetv2_small levit:levit_128s lowformer:lowformer_b0 mambaout:test_mambaout
maxxvit:test_coatnet metaformer:poolformerv2_s12 mlp_mixer:gmlp_ti16_224 mobilenetv3:mobilenetv3_small_050
mobilenetv5:mobilenetv5_base mobilevit:mobilevit_xxs mvitv2:mvitv2_tiny naflexvit:naflexvit_base_patch16_parfac_gap
nasnet:nasnetalarge nest:nest_tiny nextvit:nextvit_small nfnet:test_nfnet pit:pit_ti_224 pnasnet:pnasnet5large
pvt_v2:pvt_v2_b0 qwen3_vit:qwen3_vit_88m rdnet:rdnet_tiny regnet:regnetx_002 repghost:repghostnet_050 repvit:repvit_m1
res2net:res2next50 resnest:resnest14d resnet:test_resnet resnetv2:resnetv2_18 rexnet:rexnet_100 selecsls:selecsls42
senet:legacy_seresnet18 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18 starnet:starnet_s050
swiftformer:swiftformer_xs swin_transformer:swin_tiny_patch4_window7_224 swin_transformer_v2:swinv2_tiny_window8_256
swin_transformer_v2_cr:swinv2_cr_tiny_224 tiny_vit:tiny_vit_5m_224 tnt:tnt_s_legacy_patch16_224 tresnet:tresnet_m
twins:twins_svt_small vgg:vgg11 visformer:visformer_tiny vision_transformer:test_vit
vision_transformer_hybrid:vit_tiny_r_s16_p8_224 vision_transformer_relpos:test_vit_relpos
vision_transformer_sam:samvit_base_patch16_224 vitamin:vitamin_small_224 volo:volo_d1_224
vovnet:ese_vovnet19b_slim_dw xception:legacy_xception xception_aligned:xception41p xcit:xcit_nano_12_p8_224
"""
# Families whose usual form is worth a row of its own.
TIMM_MORE = """
resnet:resnet50 vision_transformer:vit_base_patch16_224 convnext:convnext_tiny deit:deit3_small_patch16_224
byobnet:repvgg_a0 byobnet:mobileone_s0 byobnet:gernet_s vovnet:ese_vovnet39b metaformer:caformer_s18
vision_transformer:vit_base_patch16_plus_240 nfnet:dm_nfnet_f0 resnet:seresnext26t_32x4d resnet:ecaresnet50d
"""
# Side length at which checks compute, where the model takes images of that size; a multiple of its patches.
_SIDE = {"deepseek_vit_412m": 98, "gemma4_vit_167m": 96, "inception_resnet_v2": 139, "nasnetalarge": 127}
# These drop paths by default.
_DROPPING = {"focalnet", "nest", "nextvit", "swin_transformer", "swin_transformer_v2"}
# Of torchvision's architectures the sizes on which checks that compute are quick enough.
_CHECKED = {
    "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "swin_t",
    "swin_v2_t", "vit_b_32", "wide_resnet50_2",
}  # fmt: skip
# The same code as the smaller RegNets, but too large to build for a count.
_LEFT_OUT = {"regnet_x_16gf", "regnet_x_32gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"}


def timm_models() -> list[Entry]:
    """One model per timm family, and some well-known ones."""
    import timm

    def entry(family: str, name: str) -> Entry:
        def build(**kwargs: Any) -> nn.Module:
            quiet = {"drop_path_rate": 0.0} if family in _DROPPING else {}
            if family == "tnt":
                kwargs["global_pool"] = (
                    "avg"  # the class token alone sees the blocks' projections through attention only
                )
            return timm.create_model(name, **quiet | kwargs)

        def build_small() -> nn.Module:
            return build(img_size=side)

        size = timm.get_pretrained_cfg(name).input_size
        side = _SIDE.get(name, 96)
        smaller = ((build_small, images(side)), (build, images(side)))
        on_meta = family != "sequencer"  # LSTMs are slower there than with numbers
        return Entry("timm", family, name, build, images(size), smaller, on_meta=on_meta)

    return [entry(*pair.split(":")) for pair in sorted(TIMM.split()) + TIMM_MORE.split()]


def torchvision_models() -> list[Entry]:
    """The classification models of torchvision, but for the largest RegNets."""
    import torchvision

    def entry(name: str, family: str) -> Entry:
        def build(drop_path_rate: float = 0.0) -> nn.Module:
            kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            device = torch.get_default_device()
            with torch.device("cpu" if family == "regnet" else device):  # RegNet computes its widths with tensors
                model = torchvision.models.get_model(name, **kwargs).to(device)
            drops = [m for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
            if drop_path_rate and not drops:
                raise TypeError(f"{name} has no StochasticDepth")
            for drop in drops:  # several builders take no rate, so the default rates are kept or silenced
                drop.p = drop.p if drop_path_rate else 0.0
            return model

        size = 299 if name == "inception_v3" else 224
        return Entry("torchvision", family, name, build, images(size), check=name in _CHECKED)

    names = sorted(set(torchvision.models.list_models(torchvision.models)) - _LEFT_OUT)
    return [entry(name, name.split("_")[0].rstrip("0123456789")) for name in names]


def zoo() -> list[Entry]:
    """Every model."""
    from models.zoo_transformers import transformers_models

    return [*timm_models(), *torchvision_models(), *transformers_models()]
