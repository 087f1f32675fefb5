"""The embedded transformer: a small ViT for scikit-learn's 8 x 8 digits, shipped with its weights."""

from importlib.resources import as_file, files

from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

WEIGHTS = files("pack_ptq.models") / "digits_vit.safetensors"


class DigitsViT(VisionTransformer):
    """timm's ViT on the 16 patches of 2 x 2 pixels and a class token, 64 wide, with four blocks of four heads.

    It has 136 thousand parameters, under timm's names. It maps standardised images `(batch, 1, 8, 8)` to scores
    `(batch, 10)`. `scripts/train_digits_vit.py` makes the shipped weights.

    Args:
        pretrained: Load the shipped weights instead of random ones.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=4,
            num_heads=4,
            mlp_ratio=2,
            weight_init="jax",  # scales with the width; timm's default, a fixed 0.02, is for wide networks
        )
        if pretrained:
            with as_file(WEIGHTS) as file:
                self.load_state_dict(load_file(file))
