"""Other libraries' checkpoints, written by those libraries: our DDIM gives their DDIM's images."""

import sys

import pytest
import torch

import sample
from diffusion import seeded_noise
from sample import load_model

SIZE, STEPS = 16, 5


# ---- denoising-diffusion-pytorch

def trainer_checkpoint(path, objective="pred_v", T=100, dim_mults=(1, 2), channels=1, **settings):
    """What its Trainer writes (without the optimizer), and its diffusion with the averaged weights."""
    library = pytest.importorskip("denoising_diffusion_pytorch", reason="pip install denoising_diffusion_pytorch")
    ema_pytorch = pytest.importorskip("ema_pytorch")
    torch.manual_seed(0)
    network = library.Unet(dim=8, dim_mults=dim_mults, channels=channels)
    theirs = library.GaussianDiffusion(network, image_size=SIZE, timesteps=T, sampling_timesteps=STEPS,
                                       objective=objective, **settings)
    ema = ema_pytorch.EMA(theirs, beta=0.995, update_every=10)
    with torch.no_grad():       # so that averaged and plain weights differ
        for p in theirs.parameters():
            p.add_(1.0)
    torch.save({"step": 1, "model": theirs.state_dict(), "opt": {"state": {}}, "ema": ema.state_dict(),
                "scaler": None, "version": "2.0"}, path)
    return ema.ema_model.eval()


@pytest.mark.parametrize("objective, ours", [("pred_v", "v"), ("pred_noise", "eps"), ("pred_x0", "x0")])
@pytest.mark.parametrize("clipped", [False, True])
def test_our_ddim_draws_the_images_of_denoising_diffusion_pytorch(tmp_path, monkeypatch, objective, ours, clipped):
    path = tmp_path / "model-1.pt"
    theirs = trainer_checkpoint(path, objective, min_snr_loss_weight=clipped)
    model, diffusion, data = load_model(path, image_size=SIZE)
    assert diffusion.objective == ours and data["image_size"] == SIZE
    x_T = seeded_noise(0, range(3), 0, (1, SIZE, SIZE))
    monkeypatch.setattr(torch, "randn", lambda *args, **settings: x_T.clone())
    expected = theirs.ddim_sample((3, 1, SIZE, SIZE)) * 2 - 1
    monkeypatch.undo()
    # The same levels: theirs are cut to integers, ours rounded, and here both come out whole.
    assert diffusion.timesteps(STEPS) == [99, 79, 59, 39, 19, -1]
    found = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=STEPS)
    assert (found - expected).abs().max() < 1e-4


def test_three_levels_in_colour_and_a_thousand_timesteps_are_found_from_the_weights(tmp_path):
    path = tmp_path / "model-1.pt"
    theirs = trainer_checkpoint(path, T=1000, dim_mults=(1, 2, 4), channels=3)
    model, diffusion, _ = load_model(path, image_size=SIZE)
    assert diffusion.num_timesteps == 1000 and model.image_channels == 3 and model.multiple == 4
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 999])
    assert torch.equal(model(x, t), theirs.model(x, t))


def test_a_self_conditioned_unet_is_refused(tmp_path):
    library = pytest.importorskip("denoising_diffusion_pytorch", reason="pip install denoising_diffusion_pytorch")
    network = library.Unet(dim=8, dim_mults=(1, 2), channels=1, self_condition=True)
    theirs = library.GaussianDiffusion(network, image_size=SIZE, timesteps=10)
    torch.save({"ema": {"ema_model." + key: value for key, value in theirs.state_dict().items()}}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="self-conditioned"):
        load_model(tmp_path / "m.pt")


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    torch.save({"ema": {"ema_model.model.init_conv.weight": torch.zeros(8, 1, 7, 7)}}, tmp_path / "m.pt")
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    with pytest.raises(ValueError, match="pip install denoising_diffusion_pytorch"):
        load_model(tmp_path / "m.pt")


def test_damaged_trainer_checkpoints_are_one_clear_line(tmp_path):
    pytest.importorskip("denoising_diffusion_pytorch", reason="pip install denoising_diffusion_pytorch")
    for k, ema in enumerate([{"ema_model.x": torch.zeros(1)}, {"ema_model.x": 3},
                             {"ema_model.model.init_conv.weight": torch.zeros(0, 1, 7, 7),
                              "ema_model.model.final_conv.weight": torch.zeros(1, 0, 1, 1)}]):
        torch.save({"ema": ema}, tmp_path / f"{k}.pt")
        with pytest.raises(ValueError, match="not a default Unet"):
            load_model(tmp_path / f"{k}.pt")
    torch.save({"ema": {"ema_model.x": torch.zeros(1).expand(10**9)}}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="larger than the file"):
        load_model(tmp_path / "bomb.pt")


# ---- diffusers

def pipeline_folder(folder, scheduler="DDIMScheduler", **settings):
    """A pipeline with random weights, saved by diffusers; returns it."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(sample_size=SIZE, in_channels=3, out_channels=3, block_out_channels=(8, 16),
                                    layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
                                    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                    up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    pipeline = diffusers.DDIMPipeline(network, getattr(diffusers, scheduler)(**settings))
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("curve", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_our_ddim_draws_the_images_of_diffusers(tmp_path, prediction, curve):
    pipeline = pipeline_folder(tmp_path, prediction_type=prediction, beta_schedule=curve, timestep_spacing="trailing",
                               clip_sample=False)
    model, diffusion, data = load_model(tmp_path)
    assert data["image_size"] == SIZE and model.image_channels == 3
    x = x_T = seeded_noise(0, range(2), 0, (3, SIZE, SIZE))
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    found = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=STEPS, spacing="trailing", clip=False)
    assert (found - x).abs().max() < 1e-4 * max(1, float(x.abs().max()))     # float32: untrained, it may grow large


def test_a_pipeline_with_classes_or_two_outputs_is_refused(tmp_path):
    import json
    pipeline_folder(tmp_path)
    config = tmp_path / "unet" / "config.json"
    plain = json.loads(config.read_text())
    for change in ({"out_channels": 6}, {"num_class_embeds": 10}, {"_class_name": "UNet2DConditionModel"}):
        config.write_text(json.dumps({**plain, **change}))
        with pytest.raises(ValueError, match="only unconditional"):
            load_model(tmp_path)


def test_a_damaged_folder_is_one_clear_line(tmp_path):
    pipeline_folder(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="missing"):
        load_model(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path)


def test_the_command_draws_from_a_foreign_checkpoint(tmp_path, capsys):
    trainer_checkpoint(tmp_path / "model-1.pt")
    flags = ["--num_images", "4", "--steps", "2", "--output_dir", str(tmp_path), "--device", "cpu"]
    sample.main(["--checkpoint", str(tmp_path / "model-1.pt"), "--image_size", str(SIZE), *flags])
    assert (tmp_path / "generated_samples.png").is_file()
    with pytest.raises(SystemExit) as stop:
        sample.main(["--checkpoint", str(tmp_path / "model-1.pt"), "--image_size", "17", *flags])
    assert stop.value.code == 2 and "multiple of 2" in capsys.readouterr().err


def test_an_image_size_for_our_own_checkpoint_is_refused(two_shades):
    with pytest.raises(ValueError, match="tells its own"):
        load_model(two_shades, image_size=16)
