"""The networks of the coverage benchmark: their names, how each is built, and the input that it is shown.

A network is called `family/name`: `torchvision/resnet18`, `segmentation/fcn_resnet50`, `video/r3d_18`,
`timm/levit_128s`. Weights are random; inputs are one sample of the size the network was made for, smaller
for the few whose arithmetic alone would take minutes.
"""

from __future__ import annotations

import inspect
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# One or two small networks of as many kinds as timm has. The order is alphabetical.
TIMM = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_lite_tiny coat_tiny
coatnet_pico_rw_224 coatnext_nano_rw_224 convformer_s18 convit_tiny convmixer_1024_20_ks9_p14 convnext_atto
convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_9_240 crossvit_9_dagger_240 cs3darknet_focus_s
cs3sedarknet_xdw csatv2 cspdarknet53 cspresnext50 davit_tiny deit3_small_patch16_224
deit_tiny_distilled_patch16_224 densenetblur121d dla46x_c dla60_res2net dm_nfnet_f0 dpn48b dpn68b
eca_botnext26ts_256 eca_halonext26ts eca_nfnet_l0 eca_vovnet39b ecaresnet26t edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_b0_g16_evos efficientnet_b0_g8_gn efficientnet_blur_b0
efficientnet_cc_b0_4e efficientnet_lite0 efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0
ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_sa12 fastvit_t8 fbnetv3_b flexivit_small
focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnet33ts gcvit_xxtiny gernet_s ghostnet_100 ghostnetv2_100
ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v4 lambda_resnet26t
lamhalobotnet50ts_256 lcnet_050 legacy_seresnet18 legacy_xception levit_128s levit_conv_128s lowformer_b0
mambaout_femto maxvit_pico_rw_256 maxxvitv2_nano_rw_256 mixer_s32_224 mixnet_s mnasnet_small
mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium mobileone_s0
mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny_jx nextvit_small nf_regnet_b0 nf_resnet26 nfnet_l0
pit_ti_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0 pvt_v2_b2_li rdnet_tiny regnetv_040 regnety_002
regnetz_005 regnetz_b16_evos repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s res2next50 resmlp_12_224
resnest14d resnest50d_4s2x40d resnet10t resnet50_clip resnet50_gn resnet51q resnetaa50 resnetblur18
resnetrs50 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit rexnet_100 samvit_base_patch16_224
sebotnet33ts_256 selecsls42 semnasnet_050 sequencer2d_s seresnext26t_32x4d shvit_s1 skresnet18
skresnext50_32x4d starnet_s1 swiftformer_xs swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 tf_efficientnetv2_b0 tf_mobilenetv3_small_minimal_100 tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 visformer_tiny
vit_dpwee_patch16_reg1_gap_256 vit_relpos_small_patch16_224 vit_small_patch16_18x2_224
vit_small_patch16_dinov3 vit_small_patch16_rope_mixed_224 vit_srelpos_small_patch16_224
vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_wee_patch16_reg1_gap_256 vitamin_small_224 volo_d1_224
xception41p xcit_nano_12_p16_224
""".split()  # noqa: SIM905 -- as 150 literals nobody could read it

SIDE = 224
LARGEST_USUAL_SIDE = 256  # a network of timm made for more is shown SIDE where its size is not fixed
SIDES = {
    "torchvision/convnext_large": 128,  # 34 GMACs at 224
    "torchvision/inception_v3": 299,
    "torchvision/regnet_x_32gf": 128,
    "torchvision/regnet_y_32gf": 128,
    "torchvision/regnet_y_128gf": 64,  # 127 GMACs at 224
    "timm/inception_resnet_v2": 299,
    "timm/inception_v4": 299,
    "timm/legacy_xception": 299,
}
# A vision transformer's input size is fixed when it is built; these have 61 and 167 GMACs at 224.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "torchvision/vit_h_14": {"image_size": 112},
    "torchvision/vit_l_16": {"image_size": 112},
}
SEGMENTATION_SIDE = 128
CLIPS = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}  # frames and side that they demand
CLIP = (8, 112)
FAMILIES = ("torchvision", "segmentation", "video", "timm")


def select(specs: list[str]) -> list[str]:
    """Full names of the networks that some specs name: a family, `family:glob`, or a network's own name.

    Raises:
        ValueError: a spec names nothing.
    """
    chosen: dict[str, None] = {}
    for spec in specs:
        family, _, pattern = spec.partition(":")
        if family in FAMILIES:
            hits = [n for n in _names(family) if fnmatchcase(n.split("/")[1], pattern or "*")]
        else:
            hits = _single(spec)
        if not hits:
            raise ValueError(f"{spec!r} names no network; families are {', '.join(FAMILIES)}")
        chosen.update(dict.fromkeys(hits))
    return list(chosen)


def _names(family: str) -> list[str]:
    if family == "timm":
        return [f"timm/{n}" for n in TIMM]
    from torchvision import models

    module = models if family == "torchvision" else getattr(models, family)
    return [f"{family}/{n}" for n in models.list_models(module=module)]


def _single(name: str) -> list[str]:
    """A network by its own name: torchvision's where both have it, `timm/name` asks for timm's."""
    family, _, short = name.rpartition("/")
    for known in FAMILIES[:3]:
        if family in ("", known) and f"{known}/{short}" in _names(known):
            return [f"{known}/{short}"]
    if family not in ("", "timm"):
        return []
    import timm

    return [f"timm/{short}"] if timm.is_model(short) else []


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network called `family/short` with seeded random weights, in evaluation mode, and one input."""
    import torch

    torch.manual_seed(0)
    family, _, short = name.partition("/")
    model = _timm(short) if family == "timm" else _torchvision(family, name, short)
    return model.eval(), torch.randn(_input_shape(model, family, name, short))


def _timm(short: str) -> nn.Module:
    import timm

    return timm.create_model(short, pretrained=False)  # type: ignore[no-any-return]


def _torchvision(family: str, name: str, short: str) -> nn.Module:
    from torchvision import models

    arguments: dict[str, Any] = {"weights": None, **ARGUMENTS.get(name, {})}
    if family == "segmentation":
        arguments["weights_backbone"] = None
    if "init_weights" in inspect.signature(models.get_model_builder(short)).parameters:
        arguments["init_weights"] = False
    if short in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # theirs takes a minute
    return models.get_model(short, **arguments)  # type: ignore[no-any-return]


def _input_shape(model: nn.Module, family: str, name: str, short: str) -> tuple[int, ...]:
    if family == "video":
        frames, side = CLIPS.get(short, CLIP)
        return (1, 3, frames, side, side)
    if family == "segmentation":
        return (1, 3, SEGMENTATION_SIDE, SEGMENTATION_SIDE)
    side = SIDES.get(name, ARGUMENTS.get(name, {}).get("image_size", SIDE))
    if family == "timm":
        config = model.default_cfg
        wanted = tuple(config["input_size"])
        if config.get("fixed_input_size") or (max(wanted[1:]) <= LARGEST_USUAL_SIDE and name not in SIDES):
            return (1, *wanted)
    return (1, 3, side, side)
