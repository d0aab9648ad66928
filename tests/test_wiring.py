"""Does what is asked for reach the place where it counts? A run against a plain loop of torch."""

import itertools
import math

import numpy as np
import pytest
import torch

import data
import session
from checkpoint import State, load_checkpoint, save_checkpoint
from conftest import sheets
from data import Batches, get_dataset, split_held_out
from diffusion import DiffusionProcess
from images import save_images
from load import load_model
from loop import held_out_loss, train_epoch
from models import create_model
from reference import fit_of, load_reference, positions_of
from running import LATEST, Signals
from session import Keeper, sample_images
from train import train
from utils import EMA, get_timesteps, seed_step


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_SIZE", 64)
    return get_dataset("synthetic_digits", image_size=8)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_run_is_the_plain_loop_of_its_settings(optimizer, digits, tmp_path):
    """Everything is on that a plain loop can do as well: held-out images, mirroring, classes
    withheld, weights by SNR, low levels more often, clipping, warm-up, decay, a fast average."""
    images, labels = digits
    decay = 0.1 if optimizer == "adamw" else 0.0
    model, average, losses = train(
        "synthetic_digits", image_size=8, steps=5, batch_size=12, seed=3, learning_rate=4e-3,
        flip=True, val_fraction=0.25, label_drop=0.5, min_snr=2.0, density="quadratic",
        optimizer=optimizer, beta2=0.7, weight_decay=decay, grad_clip=0.3, warmup=2,
        lr_schedule="cosine", ema_decay=0.15, base_channels=16, time_emb_dim=16, num_samples=4,
        device="cpu", precision="float32", output_dir=tmp_path)

    torch.manual_seed(3)
    plain = create_model(base_channels=16, time_emb_dim=16, num_classes=10)
    start = [p.detach().clone() for p in plain.parameters()]
    smooth = [p.detach().clone() for p in plain.parameters()]
    kept, held = split_held_out(64, 0.25, 3)
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
    steps = kind(plain.parameters(), betas=(0.9, 0.7), weight_decay=decay)
    ab = DiffusionProcess().alpha_bar.float().view(-1, 1, 1, 1)
    for step, (epoch, place) in enumerate(itertools.islice(
            itertools.product(range(2), range(4)), 5)):
        random = np.random.default_rng([3, epoch])
        order, flipped = random.permutation(48), random.random(48) < 0.5
        here = slice(12 * place, 12 * place + 12)
        x_0 = images[kept[order[here]]].float() / 127.5 - 1
        x_0 = torch.stack([x.flip(-1) if flip else x for x, flip in zip(x_0, flipped[here])])
        y = labels[kept[order[here]]].clone()
        seed_step(3, step)
        t = get_timesteps(12, 1000, "cpu", "quadratic")
        noise = torch.randn_like(x_0)
        y[torch.rand(12) < 0.5] = -1
        answer = plain(ab[t].sqrt() * x_0 + (1 - ab[t]).sqrt() * noise, t, y)
        snr = ab[t] / (1 - ab[t])
        loss = (snr.clamp(max=2) / snr * (answer - noise) ** 2).mean()
        plain.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters()))
        for p in plain.parameters():
            p.grad *= min(1.0, 0.3 / norm)
        rise = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))
        steps.param_groups[0]["lr"] = 4e-3 * rise
        steps.step()
        keep = min(0.15, (1 + step) / (10 + step))
        smooth = [keep * a + (1 - keep) * p.detach() for a, p in zip(smooth, plain.parameters())]
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4)
    for found, wanted, first in zip(model.parameters(), plain.parameters(), start):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert (found - first).abs().max() > 1e-3
    for found, wanted in zip(average.parameters(), smooth):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)

    # What the run tells and shows is that of the averaged weights.
    held_out = Batches(images, labels, 64, indices=held)
    told = load_checkpoint(tmp_path / "model_final.pt")["held_out_losses"]
    of_average, of_raw = (held_out_loss(network, held_out, DiffusionProcess(), "cpu", min_snr=2.0)
                          for network in (average, model))
    assert told.tolist() == [[5, pytest.approx(of_average, rel=1e-5)]]
    assert of_raw != pytest.approx(of_average)
    shown = (tmp_path / "samples" / "step_0000005.png").read_bytes()
    for network, equal in ((average, True), (model, False)):
        save_images(sample_images(network, DiffusionProcess(), "cpu", 4, 8), tmp_path / "x.png")
        assert ((tmp_path / "x.png").read_bytes() == shown) == equal


def test_the_held_out_loss_tells_the_network_the_classes(digits):
    """A network that knows an image by its class answers rightly, and only then."""
    images, labels = digits
    first = torch.stack([images[labels == k][0] for k in range(10)])
    batches, diffusion = Batches(first, torch.arange(10), batch_size=4), DiffusionProcess()

    def by_class(x_t, t, y):
        signal, noise = diffusion._weights(t)
        return (x_t - signal * (first[y].float() / 127.5 - 1)) / noise

    assert held_out_loss(by_class, batches, diffusion, "cpu") == pytest.approx(0, abs=1e-6)


def test_train_epoch_returns_the_mean_of_its_own_steps(tiny_model):
    losses = [5.0, 5.0]
    batches = Batches(torch.zeros(32, 1, 8, 8, dtype=torch.uint8), batch_size=16)
    mean = train_epoch(tiny_model, batches, torch.optim.SGD(tiny_model.parameters(), lr=0.0),
                       DiffusionProcess(), "cpu", losses=losses)
    assert mean == pytest.approx(sum(losses[2:]) / 2) and len(losses) == 4


# ---- Checkpoints

@pytest.mark.usefixtures("digits")
def test_a_long_epoch_is_saved_every_few_minutes(tmp_path, monkeypatch):
    """Here after every step, as no minutes are to pass."""
    saved, plain = [], Keeper.save

    def save(self, name):
        saved.append((name, len(self.state.losses)))
        plain(self, name)

    monkeypatch.setattr(session, "SAVE_SECONDS", 0)
    monkeypatch.setattr(Keeper, "save", save)
    train("synthetic_digits", image_size=8, num_epochs=1, batch_size=16, base_channels=8,
          num_samples=4, device="cpu", precision="float32", output_dir=tmp_path)
    assert [step for name, step in saved if name == LATEST] == [1, 2, 3, 4]


@pytest.mark.parametrize("spoil", ["weight", "loss"])
def test_a_state_that_is_no_number_replaces_no_checkpoint(spoil, tiny_model, tmp_path):
    state = State(tiny_model, EMA(tiny_model), torch.optim.Adam(tiny_model.parameters()))
    state.losses.append(float("nan") if spoil == "loss" else 0.5)
    if spoil == "weight":
        next(tiny_model.parameters()).data.view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / LATEST, {"good": 1})
    keeper = Keeper(tmp_path, state, {}, 1, Signals(), replacing=False)
    with pytest.raises(ValueError, match="left as it was"):
        keeper.save(LATEST)
    assert load_checkpoint(tmp_path / LATEST)["good"] == 1


def test_a_checkpoint_with_more_losses_than_steps_is_damaged(tiny_model):

    def new():
        return State(tiny_model, EMA(tiny_model), torch.optim.Adam(tiny_model.parameters()))

    whole = new()
    tiny_model(torch.zeros(1, 1, 8, 8), torch.tensor([5])).mean().backward()
    whole.optimizer.step()
    whole.losses.extend([0.5, 0.4])
    entries = whole.entries()
    new().restore("x.pt", entries)
    with pytest.raises(ValueError, match="x.pt"):
        new().restore("x.pt", {**entries, "step": 1})


def test_what_a_training_tells_of_its_images_reaches_the_evaluation(tmp_path):
    """From the folder to the words beside the floor, and that the weights it began with may know
    the held-out images."""
    folder = sheets(tmp_path / "in", 40)
    settings = dict(steps=1, batch_size=4, base_channels=8, num_samples=1, device="cpu",
                    precision="float32", fit="stretch")
    for name, more in (("first", {"turn": True}), ("second", {"val_fraction": 0.25, "flip": True})):
        train(str(folder), **settings, **more, output_dir=tmp_path / name)
    told = [load_model(tmp_path / name / "model_final.pt")[2] for name in ("first", "second")]
    assert [positions_of(one) for one in told] == [8, 2] and positions_of({}) == 1
    assert [fit_of(one) for one in told] == ["stretch"] * 2 and fit_of({}) == "crop"
    found = [load_reference(one, "data") for one in told]
    assert found[0].what == "images that it was trained on: nothing was held out"
    assert found[1].what == "held-out images" and len(found[1].held) == 10
    train(str(folder), **settings, val_fraction=0.25, seed=1,
          start_from=tmp_path / "second" / "model_final.pt", output_dir=tmp_path / "third")
    last = load_reference(load_model(tmp_path / "third" / "model_final.pt")[2], "data")
    assert last.what == "held-out images (the weights that it started from may know them)"
