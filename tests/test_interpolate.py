"""Interpolation between noises, and DDIM backwards."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import interpolate
from checkpoint import load_checkpoint, save_checkpoint
from conftest import GaussianModel, MEAN, STD, exact_flow, fails
from diffusion import DiffusionProcess, seeded_noise
from images import to_signed
from interpolate import invert, lerp, psnr, slerp, walk
from load import load_model
from sample import generate


def noises(count):
    return seeded_noise(0, range(count), 0, (1, 8, 8))


def test_slerp_is_the_arc_in_the_plane_of_its_ends():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = share * math.pi / 2
        torch.testing.assert_close(slerp(a, b, share),
                                   2 * torch.tensor([math.cos(angle), math.sin(angle)]))
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    assert slerp(a, -a, 0.5).isfinite().all()


def test_slerp_keeps_the_length_of_noise_and_lerp_loses_three_tenths():
    a, b = seeded_noise(0, range(2), 0, (1, 64, 64))
    assert float(slerp(a, b, 0.5).std()) == pytest.approx(1, abs=0.03)
    assert float(lerp(a, b, 0.5).std()) == pytest.approx(math.sqrt(0.5), abs=0.03)


@pytest.mark.parametrize("path", [lerp, slerp])
def test_a_walk_passes_through_its_key_frames(path):
    keys = noises(3)
    way = walk(keys, 9, path)
    for k, frame in ((0, 0), (1, 4), (2, 8)):
        torch.testing.assert_close(way[frame], keys[k])
    around = walk(keys, 9, path, loop=True)
    for k, frame in ((0, 0), (1, 3), (2, 6)):
        torch.testing.assert_close(around[frame], keys[k], atol=1e-5, rtol=1e-5)
    assert len(around) == 9 and not torch.equal(around[-1], keys[0])


def test_the_noise_of_gaussian_data_is_found():
    """Its flow has a closed form, which DDIM follows better the more steps it takes."""
    diffusion = DiffusionProcess()
    x_0 = MEAN + STD * noises(4).double()
    want = exact_flow(x_0, 1.0, float(diffusion.alpha_bar[-1]))
    errors = [float((invert(diffusion, GaussianModel(diffusion), x_0, steps=n) - want).abs().mean())
              for n in (50, 200, 1000)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.03, errors


def test_there_and_back_is_told_the_class_and_leaves_dropout_off():
    """Each image lies at its class's shade; the network is in training mode."""
    diffusion, y = DiffusionProcess(), torch.tensor([0, 1])
    modes = []

    class Shades(torch.nn.Module):
        def forward(self, x_t, t, y=None):
            modes.append(self.training)
            y = torch.full((len(x_t),), -1) if y is None else y
            ab = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
            return (x_t - ab.sqrt() * (y.view(-1, 1, 1, 1) - 0.5)) / (1 - ab).sqrt()

    model, x_0 = Shades().train(), torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    x_T = invert(diffusion, model, x_0, steps=10, y=y)
    back = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=10, y=y)
    torch.testing.assert_close(back, x_0, atol=1e-3, rtol=0)
    assert float(x_T.abs().max()) < 1 and not any(modes) and model.training


def test_there_and_back_returns_the_picture_and_asking_again_returns_it_better():
    diffusion = DiffusionProcess()
    model, x_0 = GaussianModel(diffusion), MEAN + STD * noises(4).double()
    found = []
    for steps, guesses in ((10, 1), (10, 3), (100, 1), (100, 3)):
        x_T = invert(diffusion, model, x_0, steps=steps, guesses=guesses)
        found.append(psnr(diffusion.sample(
            model, x_T=x_T, sampler="ddim", steps=steps, clip=False), x_0))
    assert found[0] < found[1] and found[0] < found[2] < found[3] and found[3] > 50, found


def test_the_command_writes_its_pictures(two_shades, tmp_path, capsys):
    for k, shade in enumerate((40, 215)):
        Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / f"{k}.png")
    flags = ["--checkpoint", str(two_shades), "--output_dir", str(tmp_path), "--steps", "5",
             "--device", "cpu"]
    interpolate.main([*flags, "--frames", "6", "--fps", "5", "--size", "64", "--label", "dark"])
    with Image.open(tmp_path / "morph.gif") as gif:
        assert (gif.n_frames == 6 and gif.size == (64, 64) and gif.info["loop"] == 0
                and gif.info["duration"] == 200)
    interpolate.main([*flags, "--images", str(tmp_path / "0.png"), str(tmp_path / "1.png"),
                      "--loop"])
    assert "PSNR" in capsys.readouterr().out
    interpolate.main([*flags, "--compare"])
    assert (tmp_path / "lerp_slerp.png").stat().st_size > 1000


def test_a_walk_begins_and_ends_with_the_pictures_of_its_seeds(two_shades, tmp_path, monkeypatch):
    """Those that sample.py draws of this class."""
    seen = []
    monkeypatch.setattr(interpolate, "save_images", lambda images, path: seen.append(images))
    interpolate.main(["--checkpoint", str(two_shades), "--seeds", "3", "8", "--label", "bright",
                      "--frames", "3", "--steps", "5", "--size", "16", "--device", "cpu",
                      "--output_dir", str(tmp_path)])
    model, diffusion, _ = load_model(two_shades)
    for k, seed in ((0, 3), (2, 8)):
        torch.testing.assert_close(seen[0][k:k + 1], diffusion.sample(
            model, 8, 1, seed=seed, sampler="ddim", steps=5, y=1), atol=1e-5, rtol=0)


def test_noises_are_drawn_from_in_batches_as_at_once(two_shades):
    model, diffusion, _ = load_model(two_shades)
    x_T, y = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 0, 0, 1])
    drawn, _ = generate(model, diffusion, 5, 8, x_T=x_T, y=y, steps=3, batch_size=2)
    torch.testing.assert_close(
        drawn, diffusion.sample(model, x_T=x_T, y=y, sampler="ddim", steps=3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip_loss", [True, False])
def test_pictures_are_drawn_from_their_noises_by_clamped_estimates(clip_loss, two_shades, tmp_path,
                                                                   capsys):
    """As all sampling: unclamped, a cosine schedule with eps makes an error 20,000 times larger."""
    entries = load_checkpoint(two_shades)
    entries["diffusion_config"]["clip_loss"] = clip_loss
    entries["ema"]["conv_out.weight"] *= 30                # answers beyond the range
    save_checkpoint(tmp_path / "m.pt", entries)
    pictures = [np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8) for k in range(2)]
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{k}.png")
    interpolate.main(["--checkpoint", str(tmp_path / "m.pt"), "--images", str(tmp_path / "0.png"),
                      str(tmp_path / "1.png"), "--frames", "2", "--steps", "5",
                      "--output_dir", str(tmp_path), "--device", "cpu"])
    told = float(capsys.readouterr().out.split("PSNR ")[1].split()[0])
    model, diffusion, _ = load_model(tmp_path / "m.pt")
    x_0, none = to_signed(torch.from_numpy(np.stack(pictures))[:, None]), torch.tensor([-1, -1])
    x_T = invert(diffusion, model, x_0, steps=5, y=none)
    back, unclamped = (diffusion.sample(model, x_T=x_T, sampler="ddim", steps=5, y=none, clip=clip)
                       for clip in (True, False))
    assert told == pytest.approx(psnr(back, x_0), abs=0.06)
    assert abs(told - psnr(unclamped, x_0)) > 0.2


@pytest.mark.parametrize("argv, words", [
    (["--seeds", "1"], "at least two key frames"), (["--frames", "1"], "at least two"),
    (["--size", "100000"], "16 to 4096"), (["--seeds", "1", "2", "3", "--compare"], "between two"),
    (["--fps", "0.0001"], "0.1 to 50"), (["--label", "dark,bright"], "where one is drawn"),
    (["--images", "no.png", "no.png"], "no.png"),
    (["--seeds", "x", "1"], "'x' is no seed"), (["--label", "purple"], "unknown class")])
def test_what_cannot_be_walked_is_one_line(argv, words, two_shades, tmp_path, capsys):
    assert words in fails(capsys, interpolate.main, "--checkpoint", two_shades,
                          "--output_dir", tmp_path, *argv)


@pytest.mark.parametrize("loop", [False, True])
def test_every_key_is_a_frame(loop):
    """Of three keys in four frames the middle one was passed by."""
    keys = torch.randn(3, 1, 4, 4)
    frames = walk(keys, 4, loop=loop)
    assert all(any(torch.allclose(frame, key) for frame in frames) for key in keys)
    with pytest.raises(ValueError, match="as many frames"):
        walk(keys, 2)
