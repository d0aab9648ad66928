"""The second network: residual blocks and self-attention, for 32x32 and 64x64 pictures in colour.

The plan is SimpleUNet's: down, bottleneck, up, a skip at each level. What is new lets it grow deep:

    residual blocks       learn a correction to their input, so that many of them can stand in a row
    self-attention        each position looks at every other: cloth repeats itself across a picture
    strided convolutions  learn to halve the resolution; up again by copying pixels and convolving

One class, grown by numbers. `multipliers` gives each level's channels in units of base_channels.

    AttentionUNet()                                     # 12,356,161 parameters, 64x64 grey
    AttentionUNet(3, multipliers=(1, 2, 4, 8), num_blocks=1,
                  attention_levels=(2, 3))              # 34 M, colour
    AttentionUNet(3, 32, (1, 3, 6), 1, heads=2, groups=8,
                  time_emb_dim=128, patch_size=2)       # 4.8 M, for a laptop
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.unet import UNet

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


def zeroed(layer):
    """Set a layer's weights and bias to zero, and return it. A residual block or attention that
    ends in it adds nothing at first: the network begins shallow, and the error passes the shortcuts
    unchanged (as in the code of Ho et al. 2020)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice, told the time in between, added to x (He et al. 2016).

    x: [B, in_channels, H, W], t_emb: [B, time_emb_dim] -> [B, out_channels, H, W]
    scale_shift: the time (and class) also says how loud each channel is, after the second norm: at
    0.9 T other features count than at 0.1 T (Dhariwal & Nichol 2021, section 3.1, AdaGN).
    Else it is only added.
    """

    def __init__(self, in_channels, out_channels, time_emb_dim, dropout=0.0, groups=32,
                 activation="silu", scale_shift=False):
        super().__init__()
        act = ACTIVATIONS[activation]
        self.conv1 = nn.Sequential(nn.GroupNorm(groups, in_channels), act(),
                                   nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.scale_shift = scale_shift
        self.time = nn.Sequential(act(),
                                  zeroed(nn.Linear(time_emb_dim, 2 * out_channels)) if scale_shift
                                  else nn.Linear(time_emb_dim, out_channels))
        self.conv2 = nn.Sequential(nn.GroupNorm(groups, out_channels), act(), nn.Dropout(dropout),
                                   zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.shortcut = (nn.Identity() if in_channels == out_channels
                         else nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x, t_emb):
        told = self.time(t_emb)[:, :, None, None]
        if not self.scale_shift:
            return self.shortcut(x) + self.conv2(self.conv1(x) + told)
        scale, shift = told.chunk(2, dim=1)
        norm, act, drop, conv = self.conv2
        return self.shortcut(x) + conv(drop(act(norm(self.conv1(x)) * (1 + scale) + shift)))


class SelfAttention(nn.Module):
    """Every position asks all others for what it needs (Vaswani et al. 2017, eq. 1), added to x.

    x: [B, C, H, W] -> [B, C, H, W].  heads must divide C.
    Set `record = True` to keep the weights of the last call in `weights`, [B, heads, H*W, H*W]:
    row i says where position i looked. Slower; for figures only.
    """

    def __init__(self, channels, heads=4, groups=32):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))
        self.record, self.weights = False, None

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        # Side by side in memory, or torch would quietly leave its fused attention for the slow one.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)      # each [B, heads, H*W, C/heads]
        # On a CPU the backward pass of torch's fused attention takes two to six times as long as
        # the formula where the maps are small, up to 16x16; elsewhere it saves memory and time.
        written_out = x.device.type == "cpu" and self.training and H * W <= 256
        if self.record or written_out:
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
            self.weights = weights if self.record else None
            h = weights @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(-1, -2).reshape(B, C, H, W))


class Level(nn.Module):
    """Residual blocks at one resolution, and attention after them where the level has it."""

    def __init__(self, channels_in, channels_out, num_blocks, attention, heads, **block):
        super().__init__()
        sizes = [channels_in] + [channels_out] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(i, o, **block) for i, o in zip(sizes, sizes[1:]))
        self.attention = (SelfAttention(channels_out, heads, block["groups"]) if attention
                          else nn.Identity())

    def forward(self, x, t_emb):
        for block in self.blocks:
            x = block(x, t_emb)
        return self.attention(x)


class AttentionUNet(UNet):
    """Predicts a tensor like x_t from (x_t, t, y), like SimpleUNet, and grows by numbers.

    image_channels:    1 for grey, 3 for colour.
    base_channels, multipliers: level k works with base_channels * multipliers[k] channels, at
                       1 / 2^k of the resolution; height and width must be multiples of
                       patch_size * 2^(levels - 1).
    patch_size:        treat so many by so many pixels as the channels of one: at 2 all of it works
                       at half the resolution and costs a quarter.
    num_blocks:        residual blocks at each level.
    attention_levels:  which levels attend (0 = top); below the last, in the middle of the network,
                       there is attention in any case.
    heads, groups:     of the attention and of the norms; both must divide the channels.
    time_emb_dim:      length of the time embedding; its network has 4 times as many hidden units.
    dropout:           share of values dropped in each block while training.
    activation:        a key of ACTIVATIONS.
    scale_shift:       how the blocks are told the time, see ResBlock.
    num_classes:       None, or the number of classes that y may name; without it y is ignored.
    add_input:         the network gives a correction to x_t, which is added: for the eps objective.
    grad_checkpoint:   recompute each level in the backward pass: less memory, about a third slower.
    Raises ValueError for numbers that do not fit together.
    """

    def __init__(self, image_channels=1, base_channels=64, multipliers=(1, 2, 4), num_blocks=2,
                 attention_levels=(1, 2), heads=4, groups=32, time_emb_dim=256, dropout=0.0,
                 activation="silu", patch_size=1, scale_shift=False, num_classes=None,
                 add_input=True, grad_checkpoint=False):
        channels = [base_channels * m for m in multipliers]
        if not 1 <= len(channels) <= 10 or not 1 <= num_blocks <= 100 or min(groups, heads) < 1:
            raise ValueError(f"impossible shape: {len(channels)} levels, {num_blocks} blocks, "
                             f"{groups} groups, {heads} heads")
        if any(not 1 <= c <= 2**16 or c % groups or c % heads for c in [base_channels, *channels]):
            raise ValueError(f"base_channels={base_channels} and the channels {channels} of the "
                             f"levels must be multiples of groups={groups} and heads={heads}")
        if not set(attention_levels) <= set(range(len(channels))):
            raise ValueError(f"attention_levels {attention_levels} must lie in "
                             f"0..{len(channels) - 1}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; "
                             f"choose from {sorted(ACTIVATIONS)}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must lie in 0..1, got {dropout}")
        if not 1 <= patch_size <= 64:
            raise ValueError(f"patch_size must lie in 1..64, got {patch_size}")
        super().__init__(image_channels, patch_size * 2 ** (len(channels) - 1), time_emb_dim,
                         4 * time_emb_dim, num_classes, add_input, grad_checkpoint)
        block = dict(time_emb_dim=time_emb_dim, dropout=dropout, groups=groups,
                     activation=activation, scale_shift=scale_shift)
        attends = [level in attention_levels for level in range(len(channels))]
        inputs = [base_channels, *channels[:-1]]
        self.patch_size, pixels = patch_size, image_channels * patch_size**2
        self.conv_in = nn.Conv2d(pixels, base_channels, 3, padding=1)
        self.down = nn.ModuleList(Level(i, o, num_blocks, attend, heads, **block)
                                  for i, o, attend in zip(inputs, channels, attends))
        self.shrink = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.bottleneck1 = Level(channels[-1], channels[-1], 1, True, heads, **block)
        self.bottleneck2 = Level(channels[-1], channels[-1], 1, False, heads, **block)
        # From the bottom up: the level below and the skip lie side by side.
        below = [*channels[1:], channels[-1]]
        self.up = nn.ModuleList(Level(b + c, c, num_blocks, attend, heads, **block)
                                for b, c, attend in reversed(list(zip(below, channels, attends))))
        self.grow = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in reversed(channels[1:]))
        self.conv_out = nn.Sequential(
            nn.GroupNorm(groups, channels[0]), ACTIVATIONS[activation](),
            zeroed(nn.Conv2d(channels[0], pixels, 3, padding=1)))

    def forward(self, x_t, t, y=None):
        self.check(x_t)
        t_emb = self.embed(t, y)                                       # [B] -> [B, time_emb_dim]
        # [B, C, H, W] -> [B, C * patch_size^2, H / patch_size, W / patch_size]
        h, skips = self.conv_in(F.pixel_unshuffle(x_t, self.patch_size)), []
        for k, level in enumerate(self.down):
            h = self.run(level, h if k == 0 else self.shrink[k - 1](h), t_emb)
            skips.append(h)
        h = self.run(self.bottleneck1, h, t_emb)
        h = self.run(self.bottleneck2, h, t_emb)
        for k, level in enumerate(self.up):
            if k > 0:
                h = self.grow[k - 1](F.interpolate(h, scale_factor=2, mode="nearest"))
            h = self.run(level, torch.cat([h, skips.pop()], dim=1), t_emb)
        assert not skips
        return self.output(x_t, F.pixel_shuffle(self.conv_out(h), self.patch_size))
