"""SimpleUNet: the shapes, the parameters and what each input is for."""

import math

import pytest
import torch

from conftest import awake
from models import MODELS, create_model
from models.unet import DownBlock, SimpleUNet, TimeEmbedding, UpBlock
from utils import count_parameters


def test_the_default_network_has_the_documented_parameters():
    """By hand they are added up in test_summary.py."""
    assert count_parameters(create_model()) == 1_971_137


def test_blocks_keep_the_resolution_and_change_the_channels():
    t_emb = torch.randn(2, 32)
    assert DownBlock(8, 16, 32)(torch.randn(2, 8, 14, 14), t_emb).shape == (2, 16, 14, 14)
    up = UpBlock(24, 8, 32)
    assert up(torch.randn(2, 16, 14, 14), torch.randn(2, 8, 14, 14), t_emb).shape == (2, 8, 14, 14)


def test_the_up_block_lays_x_before_the_skip():
    """Without the weights of the first 16 channels x plays no part, and the skip does."""
    up, t_emb = UpBlock(24, 8, 32), torch.randn(2, 32)
    up.conv1.weight.data[:, :16] = 0
    x, skip = torch.randn(2, 16, 6, 6), torch.randn(2, 8, 6, 6)
    whole = up(x, skip, t_emb)
    torch.testing.assert_close(up(0 * x, skip, t_emb), whole)
    assert (up(x, 0 * skip, t_emb) - whole).abs().max() > 0.01


def test_the_network_goes_28_14_7_14_28():
    model, sizes = SimpleUNet(base_channels=8), {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda m, inputs, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
    model(torch.randn(2, 1, 28, 28), torch.tensor([0, 999]))
    assert sizes["down1"] == (8, 28, 28) and sizes["down2"] == (16, 14, 14)
    assert sizes["bottleneck"] == (16, 7, 7)
    assert sizes["upsample1"] == (16, 14, 14) and sizes["up1"] == (16, 14, 14)
    assert sizes["upsample2"] == (16, 28, 28) and sizes["up2"] == (8, 28, 28)


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (1, 4), (3, 64)])
def test_the_output_is_shaped_like_the_input(channels, size):
    x = torch.randn(2, channels, size, size)
    model = create_model(image_channels=channels, base_channels=8)
    assert model(x, torch.tensor([3, 700])).shape == x.shape


def test_time_embedding_equals_a_loop_over_its_formula():
    t = torch.tensor([0, 1, 17, 500, 999])
    got = TimeEmbedding(16)(t)
    for i, value in enumerate(t.tolist()):
        for k in range(8):
            angle = value * 10_000 ** (-k / 8)
            assert float(got[i, k]) == pytest.approx(math.sin(angle), abs=1e-4)
            assert float(got[i, 8 + k]) == pytest.approx(math.cos(angle), abs=1e-4)


def test_every_timestep_has_its_own_embedding():
    emb = TimeEmbedding(256)(torch.arange(2000))
    nearest = torch.cdist(emb, emb).fill_diagonal_(9).min()
    assert nearest > 0.5


@pytest.mark.parametrize("num_classes", [None, 10])
def test_every_parameter_gets_a_gradient(num_classes):
    torch.manual_seed(0)
    model = SimpleUNet(base_channels=8, num_classes=num_classes)
    y = torch.tensor([-1, 0, 9]) if num_classes else None
    model(torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999]), y).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_output_depends_on_the_time(tiny_model):
    x = torch.randn(1, 1, 16, 16)
    outputs = [tiny_model(x, torch.tensor([t])) for t in (0, 1, 500, 999)]
    for i, a in enumerate(outputs):
        for b in outputs[i + 1:]:
            assert (a - b).abs().max() > 1e-4


def test_the_output_depends_on_the_class_and_no_class_is_minus_one():
    torch.manual_seed(0)
    model = SimpleUNet(base_channels=8, num_classes=3)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    outputs = [model(x, t, torch.tensor([y])) for y in (-1, 0, 1, 2)]
    for i, a in enumerate(outputs):
        for b in outputs[i + 1:]:
            assert (a - b).abs().max() > 1e-3
    assert torch.equal(model(x, t), outputs[0])
    with pytest.raises(ValueError, match="y must lie in -1..2, got 3"):
        model(x, t, torch.tensor([3]))


def test_the_output_is_a_correction_to_the_input(tiny_model):
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    for p in tiny_model.conv_out.parameters():
        torch.nn.init.zeros_(p)
    assert torch.equal(tiny_model(x, t), x)
    tiny_model.add_input = False
    assert not tiny_model(x, t).any()


def test_the_time_shifts_channels_ahead_of_the_activation():
    """With a shift far below zero, SiLU closes every channel of the first half of the block."""
    block = DownBlock(8, 8, 4)
    torch.nn.init.constant_(block.time.bias, -100.0)
    torch.nn.init.zeros_(block.time.weight)
    x = torch.randn(3, 8, 6, 6)
    same = block(x, torch.randn(3, 4))
    torch.testing.assert_close(same, block(torch.zeros_like(x), torch.zeros(3, 4)))


def test_a_block_is_its_formula():
    """silu(norm(conv(silu(norm(conv(x)) + time)))), norms in 8 groups of channels; norm and SiLU by
    definition."""
    torch.manual_seed(0)
    block = awake(DownBlock(8, 16, 5)).double()
    x, t_emb = torch.randn(2, 8, 6, 6).double(), torch.randn(2, 5).double()

    def norm(h, layer):
        torch.nn.init.normal_(layer.weight)
        groups = h.reshape(2, 8, -1)
        h = ((groups - groups.mean(-1, keepdim=True))
             / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt())
        return h.reshape(2, 16, 6, 6) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(h):
        return h / (1 + torch.exp(-h))

    time = t_emb @ block.time.weight.T + block.time.bias
    h = silu(norm(block.conv1(x), block.norm1) + time[:, :, None, None])
    want = silu(norm(block.conv2(h), block.norm2))
    torch.testing.assert_close(block(x, t_emb), want)


@pytest.mark.parametrize("block", ["up1", "up2"])
def test_cutting_a_skip_changes_the_output(tiny_model, block):
    x, t = torch.randn(1, 1, 16, 16), torch.tensor([50])
    whole = tiny_model(x, t)
    hook = getattr(tiny_model, block).register_forward_pre_hook(
        lambda m, inputs: (inputs[0], torch.zeros_like(inputs[1]), inputs[2]))
    cut = tiny_model(x, t)
    hook.remove()
    assert (whole - cut).abs().mean() > 0.01 * whole.abs().mean()


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = SimpleUNet(base_channels=8, grad_checkpoint=flag)
        x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
        model(x, torch.tensor([3, 9])).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", [
    dict(base_channels=12), dict(base_channels=0), dict(time_emb_dim=7), dict(colour=True),
    dict(name="transformer")])
def test_impossible_networks_are_refused(config):
    with pytest.raises(ValueError):
        create_model(**config)


@pytest.mark.parametrize("shape", [(1, 1, 30, 28), (1, 1, 28, 30), (1, 3, 28, 28)])
def test_images_that_do_not_fit_are_named(tiny_model, shape):
    with pytest.raises(ValueError, match="multiples of 4|channels"):
        tiny_model(torch.zeros(shape), torch.tensor([0]))


def test_every_model_keeps_the_contract():
    for name in MODELS:
        model = create_model(name)
        x, t = torch.randn(1, 1, 28, 28), torch.tensor([10])
        assert model(x, t).shape == x.shape
        assert model(x, t, torch.tensor([-1])).shape == x.shape


def test_the_classes_begin_as_embedding_would_draw_them():
    torch.manual_seed(0)
    model = create_model(base_channels=8, time_emb_dim=16, num_classes=3)
    torch.manual_seed(0)
    plain = create_model(base_channels=8, time_emb_dim=16)      # the same draws, up to the classes
    drawn = model.class_emb.weight
    torch.manual_seed(0)
    torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    assert torch.equal(drawn, torch.nn.Embedding(4, 16).weight) and drawn.requires_grad
    assert torch.equal(model.time_mlp[1].weight, plain.time_mlp[1].weight)
