"""Makes tests/fixtures/weights: small random models of transformers and timm, and what they give for two images.

    pip install torch transformers timm safetensors
    python tests/reference/weights.py

NAME.safetensors holds a state dict under its own names, NAME.case.safetensors the images, the noise and the outputs. Names and shapes were checked
with transformers 4.57.6 and timm 1.0.31.
"""

import os

import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

FOLDER = os.path.join(os.path.dirname(__file__), "..", "fixtures", "weights")
HUGGING_FACE = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8, layer_norm_eps=1e-6
)
TIMM = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=5)
DECODER = dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32)


def save(name, model, forward):
    torch.manual_seed(0)
    model.eval()
    for key, value in model.named_parameters():
        if value.requires_grad:
            is_norm = "norm" in key and key.endswith("weight")
            torch.nn.init.normal_(value, mean=1.0 if is_norm else 0.0, std=0.2)
    case = {"images": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}
    with torch.no_grad():
        case["output"] = forward(model, case["images"], case["noise"])
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, os.path.join(FOLDER, name + ".safetensors"))
    save_file({key: value.contiguous() for key, value in case.items()}, os.path.join(FOLDER, name + ".case.safetensors"))


os.makedirs(FOLDER, exist_ok=True)
save("hf_vit_mae", ViTMAEForPreTraining(ViTMAEConfig(**HUGGING_FACE, **DECODER)), lambda m, x, noise: m(x, noise=noise).logits)
save("hf_vit", ViTForImageClassification(ViTConfig(**HUGGING_FACE, num_labels=5)), lambda m, x, _: m(x).logits)
save("hf_deit", DeiTForImageClassificationWithTeacher(DeiTConfig(**HUGGING_FACE, num_labels=5)), lambda m, x, _: m(x).logits)
save("timm_deit3", VisionTransformer(**TIMM, no_embed_class=True, init_values=1e-4), lambda m, x, _: m(x))
save("timm_pooled", VisionTransformer(**TIMM, global_pool="avg"), lambda m, x, _: m(x))
save("timm_distilled", VisionTransformerDistilled(**TIMM), lambda m, x, _: m(x))
