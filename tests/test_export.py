"""Small files to share: what is in them, and what export.py refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import drawing
import export
import sample
from checkpoint import load_checkpoint, save_checkpoint
from conftest import TINY, fails
from drawing import card_recipe
from images import read_note
from load import load_model
from presets import DRAW_WITH
from train import train


@pytest.fixture
def evaluation(two_shades, tmp_path):
    """What evaluate.py writes, as far as a card takes it."""
    found = {"digest": load_model(two_shades)[2]["digest"], "num_images": 100,
             "held_out": "test images", "sampler": "ddim", "steps": None, "guidance": 1.0,
             "label": "by chance", "seed": 0, "copies": {"copied": 0.0},
             "samples": {"fd": 2.0, "fd_error": 0.1, "agreement": 0.9}, "floor": {"fd": 1.0}}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(found))
    return path


def test_a_card_is_printed_for_eyes():
    """Four digits, nothing of what it does not have, and other numbers as they are."""
    card = {"fd": 0.0507845089, "agreement": None, "num_images": 12345, "settings": {"lr": 0.002}}
    assert json.loads(export.for_eyes(card)) == {"fd": 0.05078, "num_images": 12345,
                                          "settings": {"lr": 0.002}}


def test_an_exported_model_answers_like_the_averaged_one(two_shades, evaluation, tmp_path, capsys):
    small = tmp_path / "small.pt"
    export.main(["--checkpoint", str(two_shades), "--evaluation", str(evaluation),
                 "--output", str(small)])
    assert small.stat().st_size < two_shades.stat().st_size / 4
    x_t, t = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
              torch.tensor([3, 30]))
    full, half = (load_model(path)[0](x_t, t, torch.tensor([0, 1])) for path in (two_shades, small))
    assert torch.allclose(full, half, atol=0.02)                        # float16
    card = load_checkpoint(small)["card"]
    assert card["training_steps"] == load_checkpoint(two_shades)["step"] and card["fd"] == 2.0
    capsys.readouterr()
    export.main(["--card", str(small)])
    assert json.loads(capsys.readouterr().out)["fd_floor"] == 1.0


def test_a_small_file_gets_a_newer_card_and_keeps_its_weights(two_shades, evaluation, tmp_path):
    small, newer = tmp_path / "small.pt", tmp_path / "newer.pt"
    export.export(two_shades, small, evaluation, training="a minute")
    found = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps({
        **found, "digest": load_model(small)[2]["digest"], "guidance": 1.5}))
    export.export(small, newer, evaluation)
    before, after = load_checkpoint(small), load_checkpoint(newer)
    assert {**before["card"], "guidance": 1.5} == after["card"]
    assert load_model(small)[2]["digest"] == load_model(newer)[2]["digest"]    # the same pictures
    assert all(torch.equal(before["ema"][name], after["ema"][name]) for name in before["ema"])
    with pytest.raises(ValueError, match="another checkpoint"):         # that of the large file
        evaluation.write_text(json.dumps(found))
        export.export(small, newer, evaluation)


def test_what_cannot_be_exported_is_one_line_and_changes_nothing(two_shades, evaluation, tmp_path,
                                                                 capsys):
    def refused(*argv):
        return fails(capsys, export.main, *argv)

    before = two_shades.read_bytes()
    assert "written over" in refused("--checkpoint", two_shades, "--output", two_shades)
    assert "written over" in refused("--checkpoint", two_shades, "--evaluation", evaluation,
                                     "--output", evaluation)
    shutil.copy(two_shades, tmp_path / "run.pt")
    assert "of a training" in refused("--checkpoint", two_shades, "--output", tmp_path / "run.pt")
    assert (tmp_path / "run.pt").read_bytes() == two_shades.read_bytes()
    assert two_shades.read_bytes() == before
    small = tmp_path / "small.pt"
    export.main(["--checkpoint", str(two_shades), "--output", str(small)])
    assert "no card" in refused("--card", two_shades)
    entries = load_checkpoint(two_shades)
    entries["ema"] = {name: value * 1e9 for name, value in entries["ema"].items()}
    save_checkpoint(tmp_path / "huge.pt", entries)
    assert "half precision" in refused("--checkpoint", tmp_path / "huge.pt",
                                       "--output", tmp_path / "x.pt")
    entries = load_checkpoint(two_shades)
    entries["model_config"] = {**entries["model_config"], "base_channels": 64}
    save_checkpoint(tmp_path / "other.pt", entries)
    assert "do not fit" in refused("--checkpoint", tmp_path / "other.pt",
                                   "--output", tmp_path / "x.pt")
    found = json.loads(evaluation.read_text())
    for text, words in ((json.dumps({**found, "digest": "0"}), "another checkpoint"),
                        ("[]", "no evaluation.json"), ("[" * 100_000, "no evaluation.json"),
                        (json.dumps({"digest": found["digest"]}), "no evaluation")):
        evaluation.write_text(text)
        assert words in refused("--checkpoint", two_shades, "--evaluation", evaluation,
                                "--output", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("named, flags, taken", [
    (("ipndm", 7), [], ("ipndm", 7)), (("ipndm", None), [], ("ipndm", 10)),
    (("ipndm", 7), ["--steps", "3"], ("ipndm", 3)),
    (("ipndm", 7), ["--sampler", "ddpm"], ("ddpm", 50)), (("ipndm", 10**9), [], ("ipndm", 10)),
    (("no such rule", 7), [], ("ddim", 50)), (([], "x"), [], ("ddim", 50))])
def test_sampling_takes_the_sampler_of_the_card(named, flags, taken, two_shades, evaluation,
                                                tmp_path):
    """A model is drawn from as it was measured; a flag goes before, and ddim is for all others."""
    small = tmp_path / "small.pt"
    export.export(two_shades, small, evaluation)
    entries = load_checkpoint(small)
    entries["card"]["sampler"], entries["card"]["sampler_steps"] = named
    save_checkpoint(small, entries)
    sample.main(["--checkpoint", str(small), "--num_images", "2", "--output_dir", str(tmp_path),
                 "--device", "cpu", *flags])
    note = read_note(tmp_path / "generated_samples.png")
    assert (note["sampler"], note["steps"]) == taken


def test_a_model_is_drawn_with_the_eta_it_was_measured_with(two_shades, evaluation, tmp_path):
    evaluation.write_text(json.dumps({**json.loads(evaluation.read_text()), "eta": 0.5}))
    export.export(two_shades, tmp_path / "small.pt", evaluation)
    for flags, eta in (((), 0.5), (("--eta", "0.25"), 0.25),
                       (("--sampler", "ddpm", "--steps", "9"), 1.0)):
        sample.main(["--checkpoint", str(tmp_path / "small.pt"), "--num_images", "2",
                     "--output_dir", str(tmp_path), "--device", "cpu", *flags])
        assert read_note(tmp_path / "generated_samples.png")["eta"] == eta


def test_sampling_takes_the_weak_model_of_the_card(two_shades, evaluation, tmp_path, capsys):
    """Measured away from a weak model, drawn away from it: where it lies beside the small file, and
    unless the command line asks for the model alone. The picture tells which, and is made again."""
    evaluation.write_text(json.dumps({
        **json.loads(evaluation.read_text()), "guidance": 3.0, "weak": "0123",
        "weak_file": "early.pt", "guidance_interval": [0, 10]}))
    small, sheet = tmp_path / "small.pt", tmp_path / "generated_samples.png"
    export.main(["--checkpoint", str(two_shades), "--evaluation", str(evaluation),
                 "--output", str(small)])
    assert "put early.pt" in capsys.readouterr().out

    def drawn(*flags):
        sample.main(["--checkpoint", str(small), "--num_images", "2", "--label", "none",
                     "--device", "cpu", "--output_dir", str(tmp_path), *flags])
        note = read_note(sheet)
        return note["guidance"], note.get("guidance_interval"), "weak" in note

    assert (drawn() == (1, None, False)
            and "no such file beside it" in capsys.readouterr().out)
    shutil.copy(two_shades, tmp_path / "early.pt")
    assert (drawn() == (3, "0,10", True)
            and f"away from {tmp_path / 'early.pt'}" in capsys.readouterr().out)
    sample.main(["--recreate", str(sheet), "--checkpoint", str(small),
                 "--output_dir", str(tmp_path)])
    assert "byte for byte" in capsys.readouterr().out
    assert (drawn("--guidance", "2") == (2, "0,10", True)
            and drawn("--guidance", "1") == (1, None, False))
    # Where there is a class to follow, a guidance that is typed follows that.
    assert drawn("--label", "bright") == (3, "0,10", True)
    sample.main(["--recreate", str(sheet), "--checkpoint", str(small),
                 "--output_dir", str(tmp_path)])
    assert "byte for byte" in capsys.readouterr().out
    assert drawn("--label", "bright", "--guidance", "2") == (2, None, False)
    assert drawn("--weak", str(two_shades)) == (drawing.WEAK_GUIDANCE, "15,49", True)
    assert drawn("--weak", str(two_shades), "--guidance", "5") == (5, "15,49", True)
    # 0 asks for the model without a class; only where the weak model was named, for that one alone
    assert drawn("--guidance", "0") == (0, None, False)
    capsys.readouterr()
    assert drawn("--guidance", "0", "--weak", str(two_shades)) == (0, None, True)
    assert f"drawn by {two_shades} alone" in capsys.readouterr().out


def test_an_evaluation_that_does_not_name_its_weak_model_makes_no_card(two_shades, evaluation,
                                                                       tmp_path, capsys):
    evaluation.write_text(json.dumps({**json.loads(evaluation.read_text()), "weak": "0123"}))
    assert "--weak" in fails(capsys, export.main, "--checkpoint", two_shades,
                             "--evaluation", evaluation, "--output", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_sampling_takes_the_spacing_of_the_card_with_its_sampler_only(two_shades, evaluation,
                                                                      tmp_path):
    evaluation.write_text(json.dumps({
        **json.loads(evaluation.read_text()), "steps": 4, "spacing": "tapered"}))
    small = tmp_path / "small.pt"
    export.export(two_shades, small, evaluation)

    def drawn(*flags):
        sample.main(["--checkpoint", str(small), "--num_images", "2", "--device", "cpu",
                     "--output_dir", str(tmp_path), *flags])
        note = read_note(tmp_path / "generated_samples.png")
        return note["steps"], note["spacing"]

    assert drawn() == (4, "tapered") and drawn("--steps", "3") == (3, "tapered")
    assert drawn("--spacing", "karras") == (4, "karras")
    assert drawn("--sampler", "dpmpp_2m", "--steps", "3") == (3, "uniform")
    for damaged in ("none such", ["tapered"], 7):
        assert card_recipe({"spacing": damaged}, 1000)["spacing"] is None


def test_what_a_preset_is_best_drawn_by_goes_with_its_checkpoints(few_digits, tmp_path):
    """Through a resumed run and a small file into the picture, and a typed flag wins."""
    run = dict(few_digits, **TINY, output_dir=tmp_path)
    draw_with = dict(sampler="dpmpp_2m_sde", sampler_steps=4, spacing="tapered", eta=1.3,
                     guidance=1.5)
    train(**run, steps=1, draw_with=draw_with)
    train(**run, steps=2, resume="latest")
    export.export(tmp_path / "model_final.pt", tmp_path / "small.pt")
    for name, flags, expected in (
            ("model_final.pt", [], ("dpmpp_2m_sde", 4, "tapered", 1.3, 1.5)),
            ("small.pt", [], ("dpmpp_2m_sde", 4, "tapered", 1.3, 1.5)),
            # so much noise in a step is for many steps
            ("model_final.pt", ["--steps", "3"], ("dpmpp_2m_sde", 3, "tapered", 1, 1.5)),
            ("model_final.pt", ["--sampler", "ddim"], ("ddim", 3, "uniform", 0, 1.5))):
        sample.main(["--checkpoint", str(tmp_path / name), "--num_images", "1", "--device", "cpu",
                     "--output_dir", str(tmp_path / "out"), *flags])
        note = read_note(tmp_path / "out" / "generated_samples.png")
        assert tuple(note[key] for key in ("sampler", "steps", "spacing", "eta",
                                           "guidance")) == expected


@pytest.mark.parametrize("wrong", [
    {"sampler": "nope"}, {"eta": math.nan}, {"guidance": torch.ones(2)}, {"steps": 5}, ["ddim"],
    {"sampler": {}}, {"guidance": 1e9}, "ddim", {"weak": "a.pt"}])
def test_what_cannot_be_drawn_by_is_refused_before_a_training(wrong, few_digits, tmp_path):
    with pytest.raises(ValueError, match="draw_with"):
        train(**few_digits, **TINY, steps=1, draw_with=wrong, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["draw_with", "card"])
@pytest.mark.parametrize("told", [torch.ones(3), [1], "ddim", {"sampler": torch.ones(2)},
                                  {"weak": "../../x.pt"}])
def test_what_a_strange_file_tells_of_drawing_is_passed_over(name, told, few_digits, tmp_path):
    train(**few_digits, **TINY, steps=1, output_dir=tmp_path)
    path = tmp_path / "model_final.pt"
    save_checkpoint(path, {**load_checkpoint(path), name: told})
    data = load_model(path)[2]
    assert (data["sampler"], data["weak"], data["guidance"]) == ("ddim", None, 1.0)
    if name == "draw_with":
        card = export.export(path, tmp_path / "small.pt")
        assert card.get("weak") is None and card.get("sampler", "ddim") == "ddim"


def test_what_presets_are_drawn_by_can_be_drawn_by():
    for row in DRAW_WITH.values():
        taken = card_recipe(row, 1000)
        assert {**row, "steps": row.get("sampler_steps")}.items() <= {
            **taken, "sampler_steps": taken["steps"]}.items()


@pytest.mark.parametrize("name", ["../early.pt", "/early.pt", "", ["early.pt"], 7])
def test_a_card_names_no_weak_model_elsewhere(name):
    assert card_recipe({"weak": name}, 1000)["weak"] is None


@pytest.mark.parametrize("named, flags, taken", [
    (1.5, [], 1.5), (2, [], 2), (1.5, ["--guidance", "3"], 3), (1.5, ["--label", "none"], 1),
    ("a lot", [], 1), (1e9, [], 1)])
def test_sampling_takes_the_guidance_of_the_card(named, flags, taken, two_shades, evaluation,
                                                 tmp_path):
    """As the model was measured, unless a flag says otherwise or no class is asked for."""
    small = tmp_path / "small.pt"
    export.export(two_shades, small, evaluation)
    entries = load_checkpoint(small)
    entries["card"]["guidance"] = named
    save_checkpoint(small, entries)
    sample.main(["--checkpoint", str(small), "--num_images", "2", "--output_dir", str(tmp_path),
                 "--device", "cpu", *flags])
    assert read_note(tmp_path / "generated_samples.png")["guidance"] == taken


def test_guidance_of_the_card_that_meets_no_level_is_left_out(two_shades, evaluation, tmp_path,
                                                              capsys):
    """It was told as though it acted, with pictures that were those without."""
    small = tmp_path / "small.pt"
    export.export(two_shades, small, evaluation)
    entries = load_checkpoint(small)
    entries["card"].update(guidance=1.5, guidance_interval=[1, 5])
    save_checkpoint(small, entries)
    sample.main(["--checkpoint", str(small), "--num_images", "2", "--output_dir", str(tmp_path),
                 "--steps", "2", "--sampler", "ddim", "--device", "cpu"])
    said, note = capsys.readouterr().out, read_note(tmp_path / "generated_samples.png")
    assert ("guidance is left out" in said
            and (note["guidance"], note.get("guidance_interval")) == (1, None))


@pytest.mark.parametrize("named, flags, taken", [
    ([10, 30], [], (1.5, "10,30")), ([10, 30], ["--guidance", "1.5"], (1.5, None)),
    (None, [], (1.5, None)), ([10, 30], ["--guidance_interval", "5,20"], (1.5, "5,20")),
    ([10, 30], ["--label", "none"], (1, None)),
    ([10, 30], ["--guidance", "3", "--guidance_interval", "5,20"], (3, "5,20")),
    ("10,30", [], (1.5, None)), ([10, "x"], [], (1.5, None)), ([10], [], (1.5, None))])
def test_sampling_takes_the_interval_of_the_card(named, flags, taken, two_shades, evaluation,
                                                 tmp_path):
    """It belongs to the card's guidance. --recreate makes a picture drawn so again, and tells it
    from one that is drawn otherwise."""
    small = tmp_path / "small.pt"
    export.export(two_shades, small, evaluation)
    entries = load_checkpoint(small)
    entries["card"].update(guidance=1.5, guidance_interval=named)
    save_checkpoint(small, entries)
    common = ["--checkpoint", str(small), "--num_images", "2", "--output_dir", str(tmp_path),
              "--device", "cpu"]
    sample.main([*common, *flags])
    note = read_note(tmp_path / "generated_samples.png")
    assert (note["guidance"], note.get("guidance_interval")) == taken
    sample.main([*common, "--recreate", str(tmp_path / "generated_samples.png")])
    assert ((tmp_path / "recreated.png").read_bytes()
            == (tmp_path / "generated_samples.png").read_bytes())


def test_the_interval_reaches_the_card_and_changes_the_pictures(two_shades, evaluation, tmp_path,
                                                                capsys):
    found = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps({**found, "guidance": 3.0, "guidance_interval": [0, 10]}))
    export.export(two_shades, tmp_path / "small.pt", evaluation)
    assert load_checkpoint(tmp_path / "small.pt")["card"]["guidance_interval"] == [0, 10]
    pixels = []
    for flags in ([], ["--guidance", "3"], ["--guidance", "3", "--guidance_interval", "0,49"]):
        sample.main(["--checkpoint", str(tmp_path / "small.pt"), "--num_images", "2",
                     "--output_dir", str(tmp_path), "--device", "cpu", *flags])
        pixels.append(np.array(Image.open(tmp_path / "generated_samples.png")))
    assert (pixels[0] != pixels[1]).any() and (pixels[1] == pixels[2]).all()
    capsys.readouterr()
    for flags, words in ((["--guidance", "1", "--guidance_interval", "1,2"], "where guidance acts"),
                         (["--guidance_interval", "9,2"], "interval"),
                         (["--guidance_interval", "-1,2"], "interval")):
        assert words in fails(capsys, sample.main, "--checkpoint", two_shades,
                              "--output_dir", tmp_path, *flags)
