"""Networks. A model is any callable `model(x_t, t, y=None)` that returns a tensor like x_t."""

import inspect

from models.attention_unet import ACTIVATIONS, AttentionUNet
from models.unet import SimpleUNet

__all__ = ["ACTIVATIONS", "MODELS", "MODEL_FLAGS", "create_model", "model_defaults"]
MODELS = {"simple": SimpleUNet, "attention": AttentionUNet}


def model_defaults(name):
    """The default settings of a network, without grad_checkpoint, which changes no result."""
    settings = inspect.signature(MODELS[name]).parameters
    return {setting: row.default for setting, row in settings.items()
            if setting != "grad_checkpoint"}


# What a command line may say of a network's shape; what else it is built with follows from the data
# and the objective.
MODEL_FLAGS = tuple(setting for setting in model_defaults("attention")
                    if setting not in ("image_channels", "num_classes", "add_input"))


def create_model(name="simple", **config):
    """Build a network by name: create_model(base_channels=64), or 32 when memory is short.

    add_input=True, the default, suits a network that predicts the noise, which x_t mostly is; one
    that is to predict "x0" or "v" takes add_input=False, as train.py does.
    Raises ValueError for an unknown name or a setting that the network does not have.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {sorted(MODELS)}")
    try:
        return MODELS[name](**config)
    except TypeError as error:
        foreign = sorted(set(config) - set(inspect.signature(MODELS[name]).parameters))
        reason = (f"it has no setting {', '.join(foreign)}" if foreign
                  else str(error).splitlines()[0])
        raise ValueError(f"model {name!r}: {reason}") from error
