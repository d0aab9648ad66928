"""Networks. A model is any callable `model(x_t, t, y=None)` that returns a tensor shaped like x_t."""

from models.attention_unet import ACTIVATIONS, AttentionUNet
from models.unet import SimpleUNet

__all__ = ["ACTIVATIONS", "MODELS", "create_model"]
MODELS = {"simple": SimpleUNet, "attention": AttentionUNet}


def create_model(name="simple", **config):
    """Build a network by name: create_model(base_channels=64), or 32 when memory is short.

    Raises ValueError for an unknown name or a setting that the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {sorted(MODELS)}")
    try:
        return MODELS[name](**config)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {str(error).splitlines()[0]}") from error
