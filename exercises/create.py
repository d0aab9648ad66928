"""Exercise 3 of 3: a diffusion model of your own, in four functions.

python exercises/create.py tells what is right. When all is, your sampler draws digits with the
weights that come with the project: outputs/exercises/my_digits.png.

In all of them alpha_bar is a tensor [T], and a model is called with (x_t [B, C, H, W], t [B]
integers, a tensor) and answers with the noise that it sees in x_t. diffusion.py and loop.py do the
same things, with more choices.
"""

import torch  # for what you write

from grader import grade


def noisy(x_0, t, noise, alpha_bar):
    """Each image of x_0 [B, C, H, W] at its own noise level t [B] (Ho et al. 2020, eq. 4)."""
    ...


def loss(model, x_0, t, noise, alpha_bar):
    """With noisy: how wrong the model is about the noise, as a number (Ho et al. 2020, eq. 14)."""
    ...


def learn(model, images, alpha_bar, steps):
    """Train the model in so many steps of 32 images, with t and noise drawn anew for every image.

    images: [N, 1, 16, 16] in [-1, 1]. torch.optim.Adam at a learning rate of 2e-3 will do.
    Returns nothing: the model is changed.
    """
    ...


def draw(model, x_T, alpha_bar, steps):
    """From pure noise x_T [B, C, H, W] to pictures by DDIM: `steps` calls of the model.

    Begin at T - 1 and end with the clean image, where alpha_bar is 1. T is a multiple of `steps`:
    step k of 0, 1, ... goes from T - 1 - k T / steps to T - 1 - (k + 1) T / steps.
    Returns a tensor like x_T.
    """
    ...


if __name__ == "__main__":
    grade("create", globals())
