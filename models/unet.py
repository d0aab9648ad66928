"""The first network to read: a small U-Net that sees a noisy image and predicts a tensor like it.

    x_t [B, 1, 28, 28]                                                output [B, 1, 28, 28]
        |                                                                 |
      conv_in -> down1 (b) ---------------- skip ----------------> up2 (3b -> b) -> conv_out (+ x_t)
                   | max-pool, 28 -> 14                             | transposed conv, 14 -> 28
                 down2 (2b) --------------- skip --------> up1 (4b -> 2b)
                   | max-pool, 14 -> 7                       | transposed conv, 7 -> 14
                   +------------ bottleneck (2b) ------------+

The way down trades resolution for channels, so that the bottleneck sees the whole digit; the skips
carry the fine detail, which pooling throws away, straight across. Every block is told the time t,
because the same pixels mean something else at another noise level.

    model = SimpleUNet()                     # b = 64: 1,971,137 parameters
    eps = model(x_t, t)                      # t: [B] integers
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class TimeEmbedding(nn.Module):
    """Turn t into sines and cosines of many wavelengths (Vaswani et al. 2017, section 3.5).

    t: [B] integers -> [B, dim], dim even. Short wavelengths tell neighbours apart, long ones tell
    early from late. Nothing is learned here.
    """

    def __init__(self, dim):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"the time embedding needs an even dim of at least 2, got {dim}")
        self.dim = dim

    def forward(self, t):
        half = self.dim // 2
        exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponents)[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class DownBlock(nn.Module):
    """Two 3x3 convolutions, told the time between them; the resolution stays. Also the bottleneck.

    x: [B, in_channels, H, W], t_emb: [B, time_emb_dim] -> [B, out_channels, H, W]
    """

    def __init__(self, in_channels, out_channels, time_emb_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.time = nn.Linear(time_emb_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, out_channels)

    def forward(self, x, t_emb):
        # One number per channel, at every pixel, before the SiLU: so t opens and closes channels.
        x = F.silu(self.norm1(self.conv1(x)) + self.time(t_emb)[:, :, None, None])
        return F.silu(self.norm2(self.conv2(x)))


class UpBlock(DownBlock):
    """The same two convolutions, after the skip has been laid beside x.

    x: [B, c, H, W], skip: [B, in_channels - c, H, W] -> [B, out_channels, H, W]
    """

    def forward(self, x, skip, t_emb):
        return super().forward(torch.cat([x, skip], dim=1), t_emb)


class UNet(nn.Module):
    """What the networks here have in common: their settings, and the embedding of time and class.

    multiple: height and width must be multiples of this.  The other arguments: see SimpleUNet.
    """

    def __init__(self, image_channels, multiple, time_emb_dim, time_hidden_dim, num_classes,
                 add_input, grad_checkpoint):
        super().__init__()
        if image_channels < 1 or num_classes is not None and num_classes < 1:
            raise ValueError("image_channels and num_classes must be at least 1, "
                             f"got {image_channels} and {num_classes}; None for no classes")
        self.image_channels = image_channels
        self.add_input = add_input
        self.multiple = multiple
        self.num_classes = num_classes
        self.grad_checkpoint = grad_checkpoint
        self.time_mlp = nn.Sequential(
            TimeEmbedding(time_emb_dim),
            nn.Linear(time_emb_dim, time_hidden_dim),
            nn.SiLU(),
            nn.Linear(time_hidden_dim, time_emb_dim),
        )
        # Row 0 is "no class" (y = -1), rows 1.. are the classes. Embedding could draw the same
        # random weights itself; but where load_model needs none (device "meta"), torch would import
        # its compiler for that, which takes two seconds.
        self.class_emb = nn.Embedding.from_pretrained(
            torch.randn(num_classes + 1, time_emb_dim), freeze=False) if num_classes else None
        if num_classes:
            self.class_emb.weight.is_table = True               # which muon.py leaves to Adam

    def embed(self, t, y):
        """What every block is told: t [B], y [B] or None -> [B, time_emb_dim].
        ValueError for a class that there is not (on a CPU; a GPU would have to be waited for, and a
        compiled network cut in two)."""
        if self.class_emb is None:
            return self.time_mlp(t)
        y = torch.full_like(t, -1) if y is None else y
        looks = y.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not (-1 <= int(y.min()) and int(y.max()) < self.num_classes):
            raise ValueError(f"y must lie in -1..{self.num_classes - 1}, got {y.min()}..{y.max()}")
        return self.time_mlp(t) + self.class_emb(y + 1)

    def check(self, x_t):
        """Raise ValueError for images that the network cannot take."""
        channels, height, width = x_t.shape[1:]
        if channels != self.image_channels:
            raise ValueError(f"the model takes {self.image_channels} channels, "
                             f"the images have {channels}")
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"height and width must be multiples of {self.multiple}, "
                             f"got {height}x{width}")

    def output(self, x_t, h):
        """The prediction. For eps, h is a correction that is added to x_t, because at high t x_t
        already is nearly the noise; copied through the convolutions and norms it came out 2 % wrong
        after 5 epochs of MNIST, and predict_x0 multiplies that by up to 157. For x0 and v nothing
        is added: at high t x_t is what has to vanish."""
        return x_t + h if self.add_input else h

    def run(self, block, *inputs):
        """block(*inputs); grad_checkpoint forgets what happens inside until the backward pass."""
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class SimpleUNet(UNet):
    """Predicts a tensor like x_t from (x_t, t, y); trained by DiffusionProcess.training_loss.

    image_channels:  1 for grey, 3 for colour.
    base_channels:   b, a multiple of 8.
    time_emb_dim:    length of the time embedding, even.
    num_classes:     None, or the number of classes that y may name; without it y is ignored.
    add_input:       the network gives a correction to x_t, which is added: for the eps objective.
    grad_checkpoint: recompute the blocks in the backward pass: less memory, about a third slower.
    Height and width must be multiples of 4 (they are halved twice).
    Raises ValueError for a bad number.
    """

    def __init__(self, image_channels=1, base_channels=64, time_emb_dim=256, num_classes=None,
                 add_input=True, grad_checkpoint=False):
        super().__init__(image_channels, 4, time_emb_dim, time_emb_dim, num_classes, add_input,
                         grad_checkpoint)
        if not 8 <= base_channels <= 4096 or base_channels % 8:
            raise ValueError("base_channels must be a multiple of 8 (GroupNorm) up to 4096, "
                             f"got {base_channels}")
        b = base_channels
        # The blocks work with 8 groups of channels, and an image has 1 or 3: convolve first.
        self.conv_in = nn.Conv2d(image_channels, b, 3, padding=1)
        self.down1 = DownBlock(b, b, time_emb_dim)
        self.down2 = DownBlock(b, 2 * b, time_emb_dim)
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = DownBlock(2 * b, 2 * b, time_emb_dim)
        # Kernel 4, stride 2: output pixels are covered equally often, which avoids checkerboards.
        self.upsample1 = nn.ConvTranspose2d(2 * b, 2 * b, 4, stride=2, padding=1)
        self.up1 = UpBlock(4 * b, 2 * b, time_emb_dim)
        self.upsample2 = nn.ConvTranspose2d(2 * b, 2 * b, 4, stride=2, padding=1)
        self.up2 = UpBlock(3 * b, b, time_emb_dim)
        self.conv_out = nn.Conv2d(b, image_channels, 1)

    def forward(self, x_t, t, y=None):
        self.check(x_t)
        t_emb = self.embed(t, y)                                       # [B] -> [B, time_emb_dim]
        skip1 = self.run(self.down1, self.conv_in(x_t), t_emb)         # [B, b, 28, 28]
        skip2 = self.run(self.down2, self.pool(skip1), t_emb)          # [B, 2b, 14, 14]
        h = self.run(self.bottleneck, self.pool(skip2), t_emb)         # [B, 2b, 7, 7]
        h = self.run(self.up1, self.upsample1(h), skip2, t_emb)        # [B, 2b, 14, 14]
        h = self.run(self.up2, self.upsample2(h), skip1, t_emb)        # [B, b, 28, 28]
        return self.output(x_t, self.conv_out(h))
