"""The figures of the network: what they count and show equals hand arithmetic and plain loops."""

import math

import numpy as np
import pytest
import torch

import inside
import network_figures
import visualize_model
from checkpoint import save_checkpoint
from conftest import awake, fails, kept_bytes, write_model
from diffusion import DiffusionProcess, seeded_noise
from models import create_model
from models.attention_unet import SelfAttention


@pytest.fixture
def attentive():
    torch.manual_seed(0)
    return awake(create_model("attention", base_channels=8, multipliers=(1, 2), num_blocks=1,
                              attention_levels=(1,), heads=2, groups=4, time_emb_dim=16)).eval()


def test_the_plain_table_is_what_one_counts_by_hand():
    """[64, 128, 256] at 3x64x64: parameters and activations of each convolution, written out."""
    levels, peak = inside.model_table(inside.PlainUNet([64, 128, 256]), 64)
    by_name = {level.name: level for level in levels}
    conv = lambda i, o, k=3: i * o * k * k + o                                          # noqa: E731
    expected = {  # name: parameters, (channels, side)
        "encoder.0": (conv(3, 64), (64, 64)), "encoder.1": (conv(64, 128), (128, 32)),
        "encoder.2": (conv(128, 256), (256, 16)), "bottleneck": (conv(256, 256), (256, 8)),
        "upsample.0": (conv(256, 256, 4), (256, 16)), "decoder.0": (conv(512, 256), (256, 16)),
        "upsample.1": (conv(256, 128, 4), (128, 32)), "decoder.1": (conv(256, 128), (128, 32)),
        "upsample.2": (conv(128, 64, 4), (64, 64)), "decoder.2": (conv(128, 64), (64, 64))}
    assert list(by_name) == list(expected)
    for name, (parameters, (channels, side)) in expected.items():
        level = by_name[name]
        assert level.parameters == parameters, name
        assert (level.shape == (channels, side, side)
                and level.activation == 4 * channels * side**2), name
    # At the top, on the way up: what was upsampled, and at full size the skip, the upsampled and
    # both together are alive at once.
    assert peak == 4 * (128 * 32**2 + (64 + 64 + 128) * 64**2)


def test_the_table_has_all_parameters_of_any_model(attentive):
    for model, size in ((create_model(base_channels=16), 28), (attentive, 16)):
        levels, _ = inside.model_table(model, size)
        assert (sum(level.parameters for level in levels)
                == sum(p.numel() for p in model.parameters()))


def test_any_name_of_a_file_is_a_title(tmp_path):
    """A formula that is none was an error of matplotlib's, after the whole table."""
    model = write_model(tmp_path / "a$\\frac$_b.pt")
    visualize_model.main(["--figure", "table", "--checkpoint", str(model),
                          "--output_dir", str(tmp_path)])
    assert (tmp_path / "model_table.png").is_file()


def test_a_part_that_is_called_twice_is_counted_once():
    class Twice(torch.nn.Module):
        image_channels = 1

        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Conv2d(1, 1, 1)

        def forward(self, x, t=None, y=None):
            return self.last(self.first(self.first(x)))

    levels, _ = inside.model_table(Twice(), 8)
    assert [(level.name, level.parameters) for level in levels] == [
        ("first", 10), ("first", 0), ("last", 2)]


def test_what_training_keeps_is_near_what_torch_saves():
    """Independently: the bytes autograd's hook sees saved, each storage once, parameters aside."""
    model = create_model(base_channels=16, add_input=False).train()
    saved = kept_bytes(model, torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long))
    kept = sum(level.kept for level in inside.model_table(model, 28)[0])
    assert kept == pytest.approx(saved, rel=0.05)


def test_attention_weights_are_the_softmax_of_a_plain_loop(attentive):
    layer = next(m for m in attentive.modules() if isinstance(m, SelfAttention))
    channels = layer.norm.num_channels
    x = torch.randn(1, channels, 3, 3, generator=torch.Generator().manual_seed(0))
    with inside.recording(layer):
        layer(x)
        weights = layer.weights[0]
    qkv = layer.qkv(layer.norm(x))[0].reshape(3, layer.heads, channels // layer.heads, 9)
    for head in range(layer.heads):
        q, k = qkv[0, head], qkv[1, head]
        for i in range(9):
            scores = torch.stack([(q[:, i] * k[:, j]).sum() / math.sqrt(channels // layer.heads)
                                  for j in range(9)])
            assert torch.allclose(weights[head, i], scores.exp() / scores.exp().sum(), atol=1e-6)
    assert layer.weights is None and not layer.record


def test_watching_attention_does_not_change_the_picture(attentive):
    diffusion = DiffusionProcess(20)
    name, layer, side = inside.choose_layer(attentive, None, 16)
    moments, picture = inside.attention_maps(attentive, diffusion, layer, [19, 10], 16, seed=3,
                                             steps=5)
    plain = diffusion.sample(attentive, x_T=seeded_noise(3, [0], 0, (1, 16, 16)), sampler="ddim",
                             steps=5, seed=3)
    assert torch.allclose(picture, plain[0], atol=1e-5) and side == 8
    assert [t for t, *_ in moments] == [19, 11]             # the nearest of 19 15 11 7 3
    assert all(torch.allclose(weights.sum(-1), torch.ones(2, 64), atol=1e-5)
               for *_, weights in moments)


def test_the_attention_figure_shows_the_row_of_the_cell_that_asks(monkeypatch, tmp_path):
    """4x4 cells, as multiples of the even share of 1/16, for each of two heads; x_t and the guess
    of x_0 before them."""
    seen = []
    monkeypatch.setattr(network_figures, "save_figure", lambda figure, path: seen.append(figure))
    weights = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    network_figures.attention_figure(
        [(9, torch.zeros(1, 8, 8), torch.ones(1, 8, 8), weights)], (1, 2), tmp_path / "x.png")
    shown = [axes.images[0].get_array() for axes in seen[0].axes[:4]]
    assert (shown[0] == 128).all() and (shown[1] == 255).all()
    for head, cells in zip(weights, shown[2:]):
        np.testing.assert_allclose(cells, 16 * head[4 * 1 + 2].view(4, 4), rtol=1e-5)


def test_attention_is_asked_by_the_cell_of_a_pixel(attentive, tmp_path, monkeypatch, capsys):
    config = dict(base_channels=8, multipliers=(1, 2), num_blocks=1, attention_levels=(1,), heads=2,
                  groups=4, time_emb_dim=16)
    save_checkpoint(tmp_path / "m.pt", {
        "model_name": "attention", "model_config": config, "ema": attentive.state_dict(),
        "diffusion_config": DiffusionProcess(20).config,
        "data": {"name": "mnist", "image_size": 16, "channels": 1, "classes": None}})
    flags = ["--figure", "attention", "--checkpoint", str(tmp_path / "m.pt"), "--steps", "2",
             "--query", "14", "10", "--device", "cpu", "--output_dir", str(tmp_path)]
    visualize_model.main(flags)
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    assert "rows 14 to 15 and columns 10 to 11" in capsys.readouterr().out
    seen = []
    monkeypatch.setattr(visualize_model, "attention_figure", lambda *args: seen.extend(args))
    visualize_model.main(flags)
    moments, query = seen[:2]
    assert query == (7, 5) and [t for t, *_ in moments] == [19, 9]
    assert moments[0][-1].shape == (2, 64, 64)


def test_reach_of_even_and_of_own_attention():
    side = 3
    alone, even = torch.eye(9)[None], torch.full((1, 9, 9), 1 / 9)
    by_loop = sum(math.dist(divmod(i, side), divmod(j, side))
                  for i in range(9) for j in range(9)) / 81
    assert inside.reach(alone, side).item() == 0
    assert inside.reach(even, side).item() == pytest.approx(by_loop, rel=1e-6)


def test_activations_are_the_outputs_of_the_parts(tiny_model):
    x_t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = dict(inside.activations(tiny_model, x_t, 7))
    t_emb = tiny_model.time_mlp(torch.tensor([7]))
    down1 = tiny_model.down1(tiny_model.conv_in(x_t), t_emb)
    assert torch.equal(seen["down1"], down1) and torch.equal(seen["time_mlp"], t_emb)


def test_principal_components_equal_those_of_the_covariance():
    features = (torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
                * torch.tensor([5.0, 3, 1, 1, 1]))
    points, shares = inside.pca(features)
    values, vectors = np.linalg.eigh(np.cov(features.double().numpy().T))
    assert shares == pytest.approx((values[::-1][:2] / values.sum()).tolist(), rel=1e-6)
    centred = (features - features.mean(0)).double().numpy()
    for k in range(2):
        along = centred @ vectors[:, -1 - k]
        assert abs(np.corrcoef(along, points[:, k])[0, 1]) == pytest.approx(1, abs=1e-6)


def test_classes_that_stand_apart_are_told_by_their_centres():
    labels = torch.arange(40) % 2
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 10 * labels[:, None]
    assert inside.centre_accuracy(features, labels) == 1
    assert inside.centre_accuracy(features, torch.arange(40) // 4 % 2) < 0.7


def test_bottleneck_features_are_its_mean_over_the_picture(tiny_model):
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    diffusion = DiffusionProcess(50)
    found = inside.bottleneck_features(tiny_model, diffusion, images, 20, seed=4)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    x_t, _ = diffusion.forward_diffusion(images.float() / 127.5 - 1, torch.full((3,), 20), noise)
    deep = dict(inside.activations(tiny_model, x_t, 20))["bottleneck"]
    assert torch.allclose(found, deep.mean((2, 3)), atol=1e-6) and found.shape == (3, deep.shape[1])


def own_model(argv, folder):
    return [] if {"--channels", "--model"} & {*argv} else ["--checkpoint", str(folder / "model.pt")]


@pytest.mark.parametrize("argv, file", [
    ([], "activations.png"), (["--figure", "time"], "time_embedding.png"),
    (["--figure", "table"], "model_table.png"),
    (["--figure", "table", "--channels", "8", "16", "--image_size", "16"], "model_table.png"),
    (["--figure", "table", "--model", "simple"], "model_table.png"),
    (["--figure", "features", "--dataset", "synthetic_digits", "--num_images", "60"],
     "features.png")])
def test_each_figure_is_written(argv, file, tmp_path, capsys):
    write_model(tmp_path / "model.pt")
    visualize_model.main([*argv, *own_model(argv, tmp_path), "--output_dir", str(tmp_path)])
    assert ((tmp_path / file).stat().st_size > 10_000
            and f"wrote {tmp_path / file}" in capsys.readouterr().out)


@pytest.mark.parametrize("argv, words", [
    (["--figure", "attention"], "no attention"), (["--timesteps", "40"], "0 to 39"),
    (["--label", "z"], "unknown class"),
    (["--figure", "table", "--channels", "8", "--model", "simple"], "give one of them"),
    (["--figure", "table", "--channels", "8", "8", "--image_size", "6"], "multiples of 4"),
    (["--figure", "features", "--num_images", "2", "--dataset", "synthetic_digits"], "4 or more")])
def test_bad_requests_are_one_line(argv, words, tmp_path, capsys):
    write_model(tmp_path / "model.pt")
    assert words in fails(capsys, visualize_model.main, *own_model(argv, tmp_path),
                          "--output_dir", tmp_path, *argv)
