"""AttentionUNet: the published sizes, attention against its formula, and what each input is for."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import awake, kept_bytes
from models.attention_unet import AttentionUNet, ResBlock, SelfAttention
from utils import count_parameters

SMALL = dict(base_channels=8, multipliers=(1, 2), num_blocks=1, attention_levels=(1,), heads=2,
             groups=4, time_emb_dim=16)


def conv(kernel, i, o):
    return kernel * kernel * i * o + o


def block(i, o):
    """Two norms, two 3x3 convolutions, the time's linear layer, a 1x1 one if the width changes."""
    return (2 * i + conv(3, i, o) + 257 * o + 2 * o + conv(3, o, o)
            + (conv(1, i, o) if i != o else 0))


def attention(c):
    return 2 * c + conv(1, c, 3 * c) + conv(1, c, c)


def test_the_ct_shape_has_the_listed_layers_and_12356161_parameters():
    """64-128-256 channels, two blocks a level, attention at levels 1 and 2, time 256-1024-256."""
    by_hand = (
        257 * 1024 + 1025 * 256 + conv(3, 1, 64)
        + 2 * block(64, 64) + conv(3, 64, 64)
        + block(64, 128) + block(128, 128) + attention(128) + conv(3, 128, 128)
        + block(128, 256) + block(256, 256) + attention(256)
        + block(256, 256) + attention(256) + block(256, 256)
        + block(512, 256) + block(256, 256) + attention(256) + conv(3, 256, 256)
        + block(384, 128) + block(128, 128) + attention(128) + conv(3, 128, 128)
        + block(192, 64) + block(64, 64)
        + 2 * 64 + conv(3, 64, 1))
    with torch.device("meta"):
        model = AttentionUNet()
    assert by_hand == 12_356_161 and count_parameters(model) == by_hand
    shrinking = [m for m in model.modules()
                 if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    assert len(shrinking) == 2
    assert all(m.num_groups == 32 for m in model.modules() if isinstance(m, torch.nn.GroupNorm))


def test_the_fabrics_shape_has_34_million_parameters():
    with torch.device("meta"):
        model = AttentionUNet(3, multipliers=(1, 2, 4, 8), num_blocks=1, attention_levels=(2, 3))
    assert count_parameters(model) == 34_146_243


def test_patches_are_channels_of_a_smaller_image():
    """The same weights see 8x8 grey pixels as 4x4 places of 4 channels: rows first, as in text."""
    torch.manual_seed(0)
    patched = awake(AttentionUNet(1, patch_size=2, **SMALL)).eval()
    plain = AttentionUNet(4, **SMALL).eval()
    plain.load_state_dict(patched.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    by_hand = torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)],
                          dim=1)                                            # [2, 4, 4, 4]
    out = plain(by_hand, t)
    for k, (i, j) in enumerate((i, j) for i in (0, 1) for j in (0, 1)):
        torch.testing.assert_close(patched(x, t)[:, 0, i::2, j::2], out[:, k])
    with pytest.raises(ValueError, match="multiples of 4"):
        patched(torch.randn(1, 1, 6, 6), t[:1])


def test_the_fused_attention_is_used():
    """It wants the last dimension side by side in memory, and otherwise silently makes way."""
    layer = SelfAttention(8, heads=2, groups=4).eval()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        layer(torch.randn(2, 8, 4, 4))


def test_attention_equals_softmax_written_as_a_loop():
    torch.manual_seed(0)
    layer, x = awake(SelfAttention(8, heads=2, groups=4)), torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).split(8, dim=1)          # each [B, C, 15]
    mixed = torch.empty_like(v)
    for b in range(2):
        for head in range(2):
            rows = slice(4 * head, 4 * head + 4)
            for i in range(15):
                scores = torch.stack([q[b, rows, i] @ k[b, rows, j] / 4 ** 0.5 for j in range(15)])
                mixed[b, rows, i] = v[b, rows] @ (scores.exp() / scores.exp().sum())
    want = x + layer.out(mixed.reshape(2, 8, 3, 5))
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)  # written out, as a CPU trains
    assert layer.weights is None
    torch.testing.assert_close(layer.eval()(x), want, atol=1e-5, rtol=1e-5)  # fused
    layer.record = True
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    assert layer.weights.shape == (2, 2, 15, 15)
    torch.testing.assert_close(layer.weights.sum(-1), torch.ones(2, 2, 15))


def test_blocks_and_attention_begin_as_copies_and_the_network_with_nothing_to_say():
    torch.manual_seed(0)
    x, t_emb = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    assert torch.equal(ResBlock(8, 8, 16, groups=4)(x, t_emb), x)
    assert torch.equal(SelfAttention(8, heads=2, groups=4)(x), x)
    assert not AttentionUNet(**SMALL, add_input=False)(x[:, :1, :4, :4], torch.tensor([3, 5])).any()
    added = awake(ResBlock(8, 8, 16, groups=4))
    assert not torch.allclose(added(x, t_emb), x)


def test_scale_shift_is_the_published_formula():
    """y_s GroupNorm(h) + y_b, then the activation (Dhariwal & Nichol 2021, section 3.1), with
    1 + scale as y_s so that zeros change nothing; norm and convolutions here by definition."""
    torch.manual_seed(0)
    block = awake(ResBlock(4, 6, 5, groups=2, scale_shift=True)).double()
    x, t_emb = torch.randn(2, 4, 5, 5).double(), torch.randn(2, 5).double()

    def norm(h, layer):
        groups = h.reshape(2, 2, -1)
        h = ((groups - groups.mean(-1, keepdim=True))
             / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt())
        return h.reshape(2, -1, 5, 5) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(h):
        return h / (1 + torch.exp(-h))

    h = block.conv1[2](silu(norm(x, block.conv1[0])))
    numbers = silu(t_emb) @ block.time[1].weight.T + block.time[1].bias
    scale, shift = numbers[:, :6, None, None], numbers[:, 6:, None, None]
    want = block.shortcut(x) + block.conv2[3](silu(norm(h, block.conv2[0]) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, t_emb), want)
    assert torch.equal(
        ResBlock(8, 8, 16, groups=4, scale_shift=True)(torch.ones(1, 8, 4, 4), torch.ones(1, 16)),
        torch.ones(1, 8, 4, 4))


@pytest.mark.parametrize("channels, size, levels", [
    (1, 28, (1, 2)), (3, 32, (1, 2, 2)), (3, 8, (1, 1, 2, 2))])
def test_any_number_of_levels_and_blocks_keeps_the_shape(channels, size, levels):
    for blocks in (1, 3):
        model = AttentionUNet(channels, **{**SMALL, "multipliers": levels, "num_blocks": blocks})
        x = torch.randn(2, channels, size, size)
        assert model(x, torch.tensor([0, 999])).shape == x.shape


@pytest.mark.parametrize("activation, scale_shift", [
    ("silu", False), ("silu", True), ("gelu", False), ("relu", True)])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_every_parameter_gets_a_gradient(activation, scale_shift, num_classes):
    torch.manual_seed(0)
    model = awake(AttentionUNet(**SMALL, num_classes=num_classes, activation=activation,
                                scale_shift=scale_shift))
    y = torch.tensor([-1, 0, 1, 2]) if num_classes else None
    model(torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 500, 999]), y).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_time_class_and_each_skip_change_the_output():
    torch.manual_seed(0)
    model = awake(AttentionUNet(**SMALL, num_classes=3)).eval()
    x, t, y = torch.randn(1, 1, 8, 8), torch.tensor([50]), torch.tensor([1])
    whole = model(x, t, y)
    assert (model(x, torch.tensor([400]), y) - whole).abs().max() > 1e-3
    assert (model(x, t, torch.tensor([2])) - whole).abs().max() > 1e-3
    assert torch.equal(model(x, t), model(x, t, torch.tensor([-1])))
    for level, width in zip(model.up, (16, 8)):                 # the skip lies in the last channels
        def cut(_, inputs, width=width):
            return torch.cat([inputs[0][:, :-width], 0 * inputs[0][:, -width:]], 1), inputs[1]
        hook = level.register_forward_pre_hook(cut)
        assert (model(x, t, y) - whole).abs().max() > 1e-3
        hook.remove()


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x, t = (awake(AttentionUNet(**SMALL, dropout=0.5)), torch.randn(1, 1, 8, 8),
                   torch.tensor([5]))
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("name, function", [("silu", "SiLU"), ("gelu", "GELU"),
                                            ("relu", "ReLU")])
def test_the_nonlinearity_is_the_one_asked_for(name, function):
    model = AttentionUNet(**SMALL, activation=name)
    del model.time_mlp                                          # which is the same in all networks
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"SiLU", "GELU", "ReLU"} == {function}


def test_gradient_checkpointing_keeps_far_less():
    image, t = torch.zeros(4, 1, 32, 32), torch.tensor([3, 9, 5, 7])
    plain, frugal = (kept_bytes(AttentionUNet(**SMALL, grad_checkpoint=flag), image, t)
                     for flag in (False, True))
    assert frugal < 0.35 * plain


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = awake(AttentionUNet(**SMALL, dropout=0.3, grad_checkpoint=flag))
        model(torch.ones(2, 1, 8, 8), torch.tensor([3, 9])).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [dict(groups=5), dict(heads=3), dict(attention_levels=(2,)),
                                 dict(activation="tanh"), dict(base_channels=0)])
def test_numbers_that_do_not_fit_together_are_refused(bad):
    with pytest.raises(ValueError):
        AttentionUNet(**{**SMALL, **bad})


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (1, 3, 8, 8)])
def test_images_that_do_not_fit_are_named(shape):
    with pytest.raises(ValueError, match="multiples of 2|channels"):
        AttentionUNet(**SMALL)(torch.zeros(shape), torch.tensor([0]))
