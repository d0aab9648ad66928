"""Other libraries' checkpoints, written by those libraries: our DDIM gives their DDIM's images."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import interop
import sample
from checkpoint import save_checkpoint
from classifier import Classifier
from conftest import fails
from diffusion import DiffusionProcess, seeded_noise
from load import load_model
from models import create_model

SIZE, STEPS = 16, 5


def draws_theirs(monkeypatch, x_T, draw):
    """What `draw` gives if the noise it starts from is x_T."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *args, **settings: x_T.clone())
        return draw()


# ---- denoising-diffusion-pytorch

def library():
    name = "denoising_diffusion_pytorch"
    return pytest.importorskip(name, reason=f"pip install {name}")


def trainer_checkpoint(path, objective="pred_v", T=100, dim_mults=(1, 2), channels=1, unet={},
                       **settings):
    """Write what matters of a Trainer's checkpoint. Returns its diffusion, the weights averaged."""
    torch.manual_seed(0)
    network = library().Unet(dim=8, dim_mults=dim_mults, channels=channels, **unet)
    theirs = library().GaussianDiffusion(network, image_size=SIZE, timesteps=T,
                                         sampling_timesteps=STEPS, objective=objective, **settings)
    averaged = {f"ema_model.{key}": value for key, value in theirs.state_dict().items()}
    plain = {key: value + 1 for key, value in theirs.state_dict().items()}
    torch.save({"model": plain, "ema": averaged}, path)
    return theirs.eval()


@pytest.mark.parametrize("objective, ours", [
    ("pred_v", "v"), ("pred_noise", "eps"), ("pred_x0", "x0")])
@pytest.mark.parametrize("limited", [False, True])
def test_our_ddim_draws_the_images_of_a_trainer(tmp_path, monkeypatch, objective, ours, limited):
    theirs = trainer_checkpoint(tmp_path / "m.pt", objective, min_snr_loss_weight=limited)
    model, diffusion, data = load_model(tmp_path / "m.pt", image_size=SIZE)
    assert diffusion.objective == ours and data["image_size"] == SIZE
    # The same levels: theirs are cut to integers, ours rounded, and here both come out whole.
    assert diffusion.timesteps(STEPS) == [99, 79, 59, 39, 19, -1]
    x_T = seeded_noise(0, range(3), 0, (1, SIZE, SIZE))
    expected = draws_theirs(monkeypatch, x_T, lambda: theirs.ddim_sample(x_T.shape)) * 2 - 1
    found = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=STEPS)
    assert (found - expected).abs().max() < 1e-4            # float32


def test_the_average_of_a_trainer_alone_draws_the_same(tmp_path):
    """torch.save(trainer.ema.state_dict(), ...) has the same keys, on their own."""
    trainer_checkpoint(tmp_path / "m.pt")
    torch.save({"step": torch.zeros(1), **torch.load(tmp_path / "m.pt")["ema"]},
               tmp_path / "ema.pt")
    drawn = [diffusion.sample(model, SIZE, 2, seed=0, sampler="ddim", steps=3)
             for model, diffusion, _ in (load_model(tmp_path / name, image_size=SIZE)
                                         for name in ("m.pt", "ema.pt"))]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_three_levels_in_colour_and_a_thousand_timesteps_are_found_from_the_weights(tmp_path,
                                                                                    schedule):
    settings = dict(T=1000, dim_mults=(1, 2, 4), channels=3, beta_schedule=schedule)
    theirs = trainer_checkpoint(tmp_path / "m.pt", **settings)
    model, diffusion, data = load_model(tmp_path / "m.pt", image_size=SIZE)
    assert diffusion.num_timesteps == 1000 and model.image_channels == data["channels"] == 3
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 999])
    assert torch.equal(model(x, t), theirs.model(x, t))


@pytest.mark.filterwarnings("ignore:This DataLoader")    # its number of processes; none is started
def test_the_file_of_a_real_trainer_is_read_and_its_averaged_weights_are_taken(tmp_path):
    """Written by Trainer.save after a step of its optimizer, with all that this leaves in it."""
    for k in range(100):                                    # it wants no less
        Image.fromarray(np.full((SIZE, SIZE, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    network = library().Unet(dim=8, dim_mults=(1, 2))
    trainer = library().Trainer(library().GaussianDiffusion(network, image_size=SIZE, timesteps=10),
                                tmp_path, results_folder=tmp_path, calculate_fid=False)
    trainer.model(torch.rand(2, 3, SIZE, SIZE, device=trainer.device)).backward()
    trainer.opt.step()
    trainer.save(7)
    model, _, _ = load_model(tmp_path / "model-7.pt", image_size=SIZE)
    averaged, plain = (next(part.parameters()).cpu()
                       for part in (trainer.ema.ema_model, trainer.model))
    assert torch.equal(next(model.parameters()), averaged) and not torch.equal(averaged, plain)


@pytest.mark.parametrize("unet, reason", [
    ({"self_condition": True}, "self-conditioned"), ({"init_dim": 16}, "not a default"),
    ({"attn_heads": 2}, "not a default"), ({"full_attn": True}, "not a default")])
def test_what_is_not_the_default_unet_is_refused(tmp_path, unet, reason):
    trainer_checkpoint(tmp_path / "m.pt", unet=unet)
    with pytest.raises(ValueError, match=reason):
        load_model(tmp_path / "m.pt")


def test_an_unknown_weighting_of_the_loss_is_refused():
    alpha_bar = DiffusionProcess(100).alpha_bar
    with pytest.raises(ValueError, match="unknown weighting"):
        interop.objective_of(torch.full_like(alpha_bar, 0.8), alpha_bar)


def test_damaged_trainer_checkpoints_are_one_clear_line(tmp_path):
    library()
    ends = {"ema_model.model.init_conv.weight": torch.zeros(0, 1, 7, 7),
            "ema_model.model.final_conv.weight": torch.zeros(1, 0, 1, 1)}
    for k, ema in enumerate([{"ema_model.x": torch.zeros(1)}, {"ema_model.model.x": 3}, ends,
                             {**ends, 3: 4},
                             {**ends, "ema_model.model.downs.0.3.weight": torch.zeros(8, 8)}]):
        torch.save({"ema": ema}, tmp_path / f"{k}.pt")
        with pytest.raises(ValueError, match="not a default Unet"):
            load_model(tmp_path / f"{k}.pt")
    torch.save({"ema": {"ema_model.x": torch.zeros(1).expand(10**9)}}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="larger than the file"):
        load_model(tmp_path / "bomb.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    trainer_checkpoint(tmp_path / "m.pt")
    entries = torch.load(tmp_path / "m.pt")
    entries["ema"]["ema_model.model.final_conv.bias"][0] = torch.nan
    torch.save(entries, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="finite"):
        load_model(tmp_path / "m.pt")


# ---- diffusers

def pipeline_folder(folder, pipeline="DDIMPipeline", scheduler="DDIMScheduler", size=SIZE,
                    **settings):
    """A pipeline with random weights, saved by diffusers; returns it."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    made = getattr(diffusers, pipeline)(network, getattr(diffusers, scheduler)(**settings))
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("curve", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_our_ddim_draws_the_images_of_a_pipeline_of_diffusers(tmp_path, monkeypatch, prediction,
                                                              curve):
    pipeline = pipeline_folder(tmp_path, prediction_type=prediction, beta_schedule=curve,
                               timestep_spacing="trailing")
    model, diffusion, data = load_model(tmp_path)
    assert data["image_size"] == SIZE and model.image_channels == 3
    x_T = seeded_noise(0, range(2), 0, (3, SIZE, SIZE))
    # Ours steps along the noise that the clipped x_0 explains; their pipeline does so when asked.
    expected = draws_theirs(monkeypatch, x_T, lambda: pipeline(
        batch_size=2, num_inference_steps=STEPS, use_clipped_model_output=True,
        output_type="np").images)
    found = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=STEPS)
    # float32
    assert (found - torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 + 1).abs().max() < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_our_ddim_takes_the_steps_of_diffusers_where_nothing_is_clipped(tmp_path, prediction):
    # A hundred of a thousand timesteps' betas: the untrained network's x_0 stays small.
    pipeline = pipeline_folder(tmp_path, prediction_type=prediction, num_train_timesteps=100,
                               clip_sample=False, timestep_spacing="trailing")
    model, diffusion, _ = load_model(tmp_path)
    x = x_T = seeded_noise(0, range(2), 0, (3, SIZE, SIZE))
    pipeline.scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    found = diffusion.sample(model, x_T=x_T, sampler="ddim", steps=STEPS, clip=False)
    assert (found - x).abs().max() < 1e-4                   # float32


def test_a_ddpm_pipeline_with_betas_of_its_own_and_its_files_side_by_side_is_read(tmp_path):
    """The older folders have config.json and scheduler_config.json in one place."""
    betas = torch.linspace(0.01, 0.3, 12, dtype=torch.float64)
    pipeline_folder(tmp_path / "a", "DDPMPipeline", "DDPMScheduler", trained_betas=betas.tolist(),
                    num_train_timesteps=12)
    shutil.copytree(tmp_path / "a" / "unet", tmp_path / "b")
    shutil.copy(tmp_path / "a" / "scheduler" / "scheduler_config.json", tmp_path / "b")
    for folder in ("a", "b"):
        diffusion = load_model(tmp_path / folder)[1]
        # float32
        torch.testing.assert_close(diffusion.alpha_bar, (1 - betas).cumprod(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("file, settings, reason", [
    ("unet/config.json", {"out_channels": 6}, "only unconditional"),
    ("unet/config.json", {"num_class_embeds": 10}, "only unconditional"),
    ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "only unconditional"),
    ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 2}, "do not fit"),
    ("unet/config.json", {"add_attention": False}, "do not fit"),
    ("unet/config.json", {"block_out_channels": [2**20, 2**20]}, "more than the weights hold"),
    ("unet/config.json", {"sample_size": [16, 32]}, "square"),
    ("unet/config.json", {"sample_size": 17}, "multiple of 2"),
    ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "understood are"),
    ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}, "understood are"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "timesteps"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "above 0")])
def test_a_pipeline_that_does_not_fit_is_one_clear_line(tmp_path, file, settings, reason):
    pipeline_folder(tmp_path)
    change(tmp_path / file, **settings)
    with pytest.raises(ValueError, match=reason) as stop:
        load_model(tmp_path)
    assert "\n" not in str(stop.value)


def test_a_damaged_folder_is_one_clear_line(tmp_path):
    pipeline_folder(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot use"):
        load_model(tmp_path)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="missing"):
        load_model(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            load_model(tmp_path)


def test_the_digest_tells_schedules_apart(tmp_path):
    pipeline_folder(tmp_path / "a")
    pipeline_folder(tmp_path / "b", beta_end=0.03)
    assert load_model(tmp_path / "a")[2]["digest"] != load_model(tmp_path / "b")[2]["digest"]


# ---- Both

@pytest.mark.parametrize("package", ["denoising_diffusion_pytorch", "diffusers"])
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, package):
    path = tmp_path / "m.pt"
    if package == "diffusers":
        path = tmp_path
        pipeline_folder(path)
    else:
        torch.save({"ema": {"ema_model.model.init_conv.weight": torch.zeros(8, 1, 7, 7)}}, path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_model(path)


def test_the_command_draws_from_a_foreign_checkpoint_and_again(tmp_path, capsys):
    trainer_checkpoint(tmp_path / "m.pt")
    flags = ["--checkpoint", str(tmp_path / "m.pt"), "--output_dir", str(tmp_path),
             "--device", "cpu"]
    sample.main([*flags, "--num_images", "4", "--steps", "2", "--image_size", str(SIZE)])
    # the picture tells the size
    sample.main([*flags, "--recreate", str(tmp_path / "generated_samples.png")])
    assert "byte for byte the same" in capsys.readouterr().out
    assert "multiple of 2" in fails(capsys, sample.main, *flags, "--image_size", 17)


@pytest.mark.usefixtures("few_digits")
def test_a_trainer_is_measured_at_its_own_size(tmp_path, monkeypatch, capsys):
    """It was at 64, by networks of 28; and "trained on 'unknown'" was no help."""
    trainer_checkpoint(tmp_path / "m.pt")
    sizes = []
    monkeypatch.setattr(evaluate, "get_classifier", lambda name, images, *rest: (
        sizes.append(images.shape[-1]) or Classifier(1, SIZE, 10).eval(), "no matter which"))
    evaluate.main(["--checkpoint", str(tmp_path / "m.pt"), "--dataset", "synthetic_digits",
                   "--image_size", str(SIZE), "--num_images", "100", "--steps", "2",
                   "--output_dir", str(tmp_path), "--device", "cpu"])
    assert sizes == [SIZE] and "unknown" not in capsys.readouterr().out


def test_a_size_that_is_not_told_is_said_and_one_that_is_told_cannot_be_given(tmp_path, capsys):
    trainer_checkpoint(tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt")[2]["image_size"] == interop.UNKNOWN_SIZE
    assert f"{interop.UNKNOWN_SIZE} is assumed" in capsys.readouterr().out
    pipeline_folder(tmp_path / "none", size=None)
    assert load_model(tmp_path / "none", image_size=SIZE)[2]["image_size"] == SIZE
    pipeline_folder(tmp_path / "theirs")
    own, network = tmp_path / "own.pt", create_model(base_channels=8, time_emb_dim=16)
    save_checkpoint(own, {"model": network.state_dict()})
    for path in (tmp_path / "theirs", own):
        with pytest.raises(ValueError, match="tells its own"):
            load_model(path, image_size=SIZE)
