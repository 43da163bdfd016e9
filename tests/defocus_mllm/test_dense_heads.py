"""A short fine-tuning with detection and segmentation heads of Transformers: the loss on one batch falls."""

import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from defocus_mllm import DefocusBackbone, DefocusVisionConfig

PYRAMID = ["fpn1", "fpn2", "fpn3", "fpn4"]
STAGES = ["stem", "stage1", "stage2"]
LEARNING_RATE = 1e-6
WIDTHS = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 6, "num_labels": 3, **WIDTHS}
RT_DETR = {
    **{"d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3},
    **{
        "feat_strides": [4, 8, 16],
        "decoder_layers": 2,
        "num_queries": 6,
        "num_labels": 3,
        "num_denoising": 4,
        **WIDTHS,
    },
}
UPERNET = {"hidden_size": 16, "num_labels": 3, "pool_scales": [1, 2], "use_auxiliary_head": False}
MASKFORMER = {
    **{"decoder_config": DetrConfig(**{**DETR, "backbone_config": None}), "num_labels": 3},
    **{"fpn_feature_size": 32, "mask_feature_size": 32},
}
MASK2FORMER = {
    **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16, "num_labels": 3},
    **{"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6},
    "train_num_points": 64,
}


def backbone_config(mixer="attention", **fields):
    preset = {"attention": "defocus_vit_tiny", "retention": "defocus_retnet_tiny", "mamba": "defocus_mamba_tiny"}[mixer]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "fpn_channels": 32}
    widths = {"intermediate_size": 32, "group_norm_size": 16} if mixer == "mamba" else {"intermediate_size": 32}
    return DefocusVisionConfig.from_preset(preset, image_size=32, **sizes, **widths, **fields)


def batch(task):
    pixels = torch.randn(2, 3, 32, 48)  # padded to 32 x 64, two sections
    if task == "detection":
        boxes = [torch.tensor([[0.5, 0.5, 0.4, 0.3]]), torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.4]])]
        classes = [torch.tensor([1]), torch.tensor([0, 2])]
        labels = [{"class_labels": c, "boxes": b} for c, b in zip(classes, boxes, strict=True)]
        return {"pixel_values": pixels, "labels": labels}
    if task == "semantic segmentation":
        return {"pixel_values": pixels, "labels": (torch.arange(48) // 16).expand(2, 32, 48)}
    masks = (torch.arange(48) // 24 == torch.arange(2).view(2, 1, 1)).expand(2, 32, 48).float()  # left and right half
    return {"pixel_values": pixels, "mask_labels": [masks] * 2, "class_labels": [torch.tensor([0, 1])] * 2}


HEADS = {
    "DETR": (DetrForObjectDetection, DetrConfig, DETR, ["fpn3"], "detection"),
    "DETR on a stage": (DetrForObjectDetection, DetrConfig, DETR, ["stage2"], "detection"),
    "Conditional DETR": (ConditionalDetrForObjectDetection, ConditionalDetrConfig, DETR, ["fpn3"], "detection"),
    "Deformable DETR": (
        *(DeformableDetrForObjectDetection, DeformableDetrConfig),
        *({**DETR, "num_feature_levels": 4}, PYRAMID, "detection"),
    ),
    "RT-DETR": (RTDetrForObjectDetection, RTDetrConfig, RT_DETR, PYRAMID[1:], "detection"),
    "UperNet": (UperNetForSemanticSegmentation, UperNetConfig, UPERNET, PYRAMID, "semantic segmentation"),
    "UperNet on stages": (UperNetForSemanticSegmentation, UperNetConfig, UPERNET, STAGES, "semantic segmentation"),
    "MaskFormer": (MaskFormerForInstanceSegmentation, MaskFormerConfig, MASKFORMER, PYRAMID, "instances"),
    "Mask2Former": (Mask2FormerForUniversalSegmentation, Mask2FormerConfig, MASK2FORMER, PYRAMID, "instances"),
}


def fine_tune(head, mixer="attention", steps=10):
    """Train on one batch; return the losses, and the names of the backbone's weights that had no gradient."""
    model_class, config_class, sizes, out_features, task = HEADS[head]
    model = model_class(config_class(backbone_config=backbone_config(mixer, out_features=out_features), **sizes))
    (backbone,) = (module for module in model.modules() if isinstance(module, DefocusBackbone))
    inputs, losses, still = batch(task), [], set()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        torch.manual_seed(1)  # the same dropout, noise and points in every step
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        still = {name for name, parameter in backbone.named_parameters() if not parameter.grad.any()}
        optimizer.step()
        losses.append(loss.item())
    return losses, still


@pytest.mark.parametrize("head", HEADS)
def test_ten_steps_lower_the_loss_and_reach_the_whole_backbone(head):
    losses, still = fine_tune(head)
    assert losses[-1] < losses[0]
    assert still == {"encoder.embeddings.cls_token"}  # it ends the sequence: no patch has seen it


@pytest.mark.parametrize("mixer", ["retention", "mamba"])
@pytest.mark.parametrize("head", ["Deformable DETR", "UperNet"])
def test_so_it_is_with_the_other_mixers(head, mixer):
    losses, still = fine_tune(head, mixer)
    assert losses[-1] < losses[0]
    assert still == {"encoder.embeddings.cls_token"}
