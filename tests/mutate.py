"""Does a test fail when the code is wrong? Makes one small wrong edit at a time and runs the tests.

    python tests/mutate.py               # all of them: an hour or two
    python tests/mutate.py --only ema    # those whose name contains "ema"

Each edit is made in a copy of the project; an edit that no test notices makes the exit code 1.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


class Edit(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    tests: str  # the test files that ought to notice


EDITS = [
    Edit("root of alpha_bar missing", "diffusion.py",
         "self._signal = self.alpha_bar.sqrt().float()", "self._signal = self.alpha_bar.float()",
         "diffusion"),
    Edit("root of 1 - alpha_bar missing", "diffusion.py",
         "(1 - self.alpha_bar).sqrt().float()", "(1 - self.alpha_bar).float()", "diffusion"),
    Edit("t off by one in the step", "diffusion.py",
         "ab_t, ab_prev = self._level(t), self._level(t_prev)\n        if",
         "ab_t, ab_prev = self._level(max(t - 1, 0)), self._level(t_prev)\n        if", "diffusion"),
    Edit("t off by one in the schedule", "schedules.py",
         "torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps\n    return",
         "torch.arange(1, num_timesteps + 2, dtype=torch.float64) / (num_timesteps + 1)\n    return",
         "diffusion"),
    Edit("beta_t for the posterior variance", "diffusion.py",
         'sigma = math.sqrt(posterior) if variance == "posterior"',
         'sigma = eta * math.sqrt(beta) if variance == "posterior"', "diffusion"),
    Edit("the other variance changes the mean", "diffusion.py",
         "math.sqrt(1 - ab_prev - posterior) * self",
         'math.sqrt(max(0, 1 - ab_prev - (beta if variance == "beta" else posterior))) * self', "diffusion"),
    Edit("noise added in the last step", "diffusion.py",
         "if sigma > 0 and t_prev >= 0:", "if sigma > 0:", "diffusion"),
    Edit("clamp removed", "diffusion.py", "x_0.clamp(-1, 1) if clip else x_0", "x_0", "diffusion"),
    Edit("float32 schedule, linear", "schedules.py",
         "num_timesteps, dtype=torch.float64).flip(0)", "num_timesteps).flip(0)", "diffusion"),
    Edit("float32 schedule, cosine", "schedules.py",
         "torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps\n    return",
         "torch.arange(num_timesteps + 1) / num_timesteps\n    return", "diffusion"),
    Edit("betas not scaled by 1000 / T", "schedules.py",
         "scale = 1000 / num_timesteps", "scale = 1.0", "diffusion"),
    Edit("betas not capped", "schedules.py", "MAX_BETA = 0.999", "MAX_BETA = 2.0", "diffusion"),
    Edit("eta ignored", "diffusion.py", "min(eta**2 * beta", "min(1.0 * beta", "diffusion"),
    Edit("more noise than the level has", "diffusion.py", "min(eta**2 * beta / (1 - ab_t), 1.0)", "eta**2 * beta / (1 - ab_t)",
         "diffusion"),
    Edit("sign of v turned", "diffusion.py",
         "target = signal_weight * noise - noise_weight * x_0",
         "target = noise_weight * x_0 - signal_weight * noise", "diffusion"),
    Edit("guidance scale off by one", "diffusion.py",
         "x_0 + guidance * (seen_by(model, y) - x_0)", "x_0 + (1 + guidance) * (seen_by(model, y) - x_0)",
         "diffusion"),
    Edit("seed ignored", "diffusion.py", "[seed, i, step]", "[0, i, step]", "diffusion"),
    Edit("the same noise for every image", "diffusion.py", "[seed, i, step]", "[seed, 0, step]", "diffusion"),
    Edit("the same noise in every step", "diffusion.py", "[seed, i, step]", "[seed, i, 0]", "diffusion"),
    Edit("one model call too many", "schedules.py",
         "np.linspace(-1, len(alpha_bar) - 1, steps + 1)", "np.linspace(-1, len(alpha_bar) - 1, steps + 2)",
         "diffusion"),
    Edit("skip zeroed", "models/unet.py",
         "torch.cat([x, skip], dim=1)", "torch.cat([x, torch.zeros_like(skip)], dim=1)", "unet"),
    Edit("time ignored", "models/unet.py",
         "+ self.time(t_emb)[", "+ 0 * self.time(t_emb)[", "unet"),
    Edit("time embedding halved", "models/unet.py",
         "torch.cat([angles.sin(), angles.cos()], dim=1)", "torch.cat([angles.sin(), angles.sin()], dim=1)",
         "unet"),
    Edit("class -1 is not no class", "models/unet.py",
         "self.class_emb(y + 1)", "self.class_emb(y.clamp(min=0))", "unet"),
    Edit("EMA never updated", "loop.py", "    ema.update(model)\n                losses.append",
         "    pass\n                losses.append", "training"),
    Edit("EMA without a warm-up", "utils.py",
         "decay = min(self.decay, (1 + self.updates) / (10 + self.updates))", "decay = self.decay",
         "training"),
    Edit("EMA weights swapped", "utils.py",
         "average.lerp_(value, 1 - decay)", "average.lerp_(value, decay)", "training"),
    Edit("samples from the last weights", "load.py",
         'entries["ema" if ema else "model"]', 'entries["model"]', "training"),
    Edit("labels shifted", "data.py", "self.labels[index]", "self.labels[index.roll(1)]", "training"),
    Edit("images in [0, 1]", "images.py", "images.float() / 127.5 - 1", "images.float() / 255", "training"),
    Edit("the same order in every epoch", "data.py",
         "default_rng([self.seed, epoch])", "default_rng([self.seed, 0])", "training"),
    Edit("training pictures move the generator", "diffusion.py",
         "rows.append(torch.randn(shape, generator=torch.Generator().manual_seed(int(entropy))))",
         "rows.append(torch.manual_seed(int(entropy)) and torch.randn(shape))", "diffusion training"),
    Edit("gradient clipping forgotten", "loop.py", "    if grad_clip:\n", "    if False:\n", "training"),
    Edit("resumed without Adam's moments", "checkpoint.py",
         'self.optimizer.load_state_dict(saved["optimizer"])', 'saved["optimizer"]', "resume"),
    Edit("resumed with a fresh average", "checkpoint.py", 'saved["ema_updates"], saved', "0, saved", "resume"),
    Edit("a resumed epoch starts anew", "data.py",
         "self.from_step(epoch, first)", "self.from_step(epoch, 0)", "resume scale"),
    Edit("a step that is no number is taken", "loop.py", "elif not sound:", "elif False:", "resume"),
    Edit("a GPU takes steps after a bad one", "loop.py",
         'getattr(optimizer, "found_inf", bad)', "bad", "resume"),
    Edit("other images go unnoticed", "data.py", "for part in picks.split(4096):",
         "for part in ():", "resume"),
    Edit("half-written files stay", "running.py", "half.unlink(missing_ok=True)", "pass", "resume"),
    Edit("weights of another model", "checkpoint.py", "saved.get(name) != own.get(name)]", "False]", "resume"),
    Edit("starting from the last weights, not the averaged", "checkpoint.py",
         'whole_precision(entries["ema"])', 'whole_precision(entries["model"])', "resume"),
    Edit("starting from a network of other heads", "checkpoint.py",
         'free = ("dropout",', 'free = ("heads", "dropout",', "resume"),
    Edit("signals take effect within a step", "running.py", "if not self.holding:", "if True:", "resume"),
    Edit("the folder's name is not flushed", "files.py", "os.fsync(folder)", "pass", "resume"),
    Edit("changed settings go unnoticed", "checkpoint.py",
         "not _equal(saved.get(name), now.get(name))]", "False]",
         "resume"),
    Edit("the step's seed ignores the step", "utils.py", "spawn_key=(step,)", "spawn_key=(0,)", "training"),
    Edit("digest not checked", "checkpoint.py",
         "if digest_of(path, entries) != digest:", "if digest_of(path, entries) is None:", "commands"),
    Edit("checkpoints may run code", "checkpoint.py",
         "weights_only=True)\n    except", "weights_only=False)\n    except", "commands"),
    Edit("written over the old file", "files.py",
         'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")', "temporary = path", "training"),
    Edit("frames labelled one step late", "sample.py",
         "frames.append((t, x_t, x_0))", "frames.append((t_next, x_t, x_0))", "commands"),
    Edit("colour order turned", "folders.py",
         "pixels.transpose(2, 0, 1)", "pixels.transpose(2, 0, 1)[::-1]", "folders"),
    Edit("every part of a batch counts fully", "loop.py",
         "share = share * (len(part) / len(x_0))", "share = share * 1.0", "scale"),
    Edit("processes share nothing", "loop.py", "mine = part[rank::world]", "mine = part", "scale"),
    Edit("processes never exchange gradients", "loop.py",
         "contextlib.nullcontext() if last or world == 1", "contextlib.nullcontext() if world == 1", "scale"),
    Edit("the rate stays where it was", "loop.py",
         'group["lr"] = rate(step)', 'group["lr"] = rate(first_step)', "scale"),
    Edit("flips never happen", "data.py", "x_0.flip(-1), x_0)", "x_0, x_0)", "scale"),
    Edit("held-out images are trained on", "data.py",
         "return order[count:].sort()", "return order.sort()", "scale"),
    Edit("the worst weights are kept", "session.py",
         "== min(state.held_out_losses.values())", "== max(state.held_out_losses.values())", "scale"),
    Edit("duplicates overlooked", "folders.py", "first.setdefault(d, k) != k", "first.setdefault(d, k) > k",
         "folders"),
    Edit("two folders share a cache", "folders.py", "DECODER, str(folder.resolve()), state", "DECODER, state", "hostile"),
    Edit("classes taken over by their places", "checkpoint.py", "known.index(name) + 1", "k + 1", "hostile"),
    Edit("an answer of any shape", "diffusion.py", "if out.shape != x_t.shape:", "if False:", "hostile"),
    Edit("a changed folder keeps its old cache", "folders.py",
         "str(folder.resolve()), state, image_size,", "str(folder.resolve()), image_size,", "folders"),
    Edit("sigmoid schedule turned round", "schedules.py",
         "torch.sigmoid(-(start + level * (end - start)))", "torch.sigmoid(start - level * (end - start) / 2)",
         "diffusion"),
    Edit("2M looks back instead of ahead", "diffusion.py",
         "return x_0 + (then - now)", "return x_0 - (then - now)", "samplers"),
    Edit("the oldest estimate weighs most", "diffusion.py", "reversed(past))", "past)", "samplers"),
    Edit("the last step extrapolates, too", "diffusion.py", "len(past) == 1 or t_prev < 0", "len(past) == 1",
         "samplers diffusion"),
    Edit("no class is ever withheld", "loop.py", "< label_drop, -1)", "< 0, -1)", "classes"),
    Edit("recreated with any checkpoint", "sample.py", 'again["weights"] != data["digest"]', "False", "classes"),
    Edit("labels of the first batch for all", "sample.py", "y[first - first_index:]", "y[0:]", "classes"),
    Edit("an explained step with the wrong coefficient", "visualize_diffusion.py",
         "to_x_t = math.sqrt(ab / ab_prev) * (1 - ab_prev) / (1 - ab)",
         "to_x_t = math.sqrt(ab / ab_prev) * (1 - ab) / (1 - ab)", "figures"),
    Edit("a strip that ends before its picture", "visualize_diffusion.py",
         "nearest_levels(visited, timesteps)), frames[-1]]", "nearest_levels(visited, timesteps)), frames[-2]]", "figures"),
    Edit("the exact denoiser without its spread", "convergence.py",
         "math.log(weight / std_t) - away**2 / 2", "math.log(weight) - away**2 / 2", "figures"),
    Edit("samples in the order of their classes", "evaluate.py", "y[shuffled(len(y))]", "y", "evaluate"),
    Edit("an error of KID that forgets how many parts there are", "measures.py",
         "((parts - 1) / parts * (left_out", "(1 / parts**2 * (left_out", "evaluate"),
    Edit("995 after 1000", "running.py", "key=lambda path: int(path.stem.split(\"_\")[-1])", "key=str", "resume"),
    Edit("the folder that was held out is forgotten", "reference.py", "if there and", "if False and",
         "hostile"),
    Edit("a number of numpy's in a checkpoint", "checkpoint.py", "value = value.item()", "pass", "resume"),
    Edit("the noise that a model sees, off by the image", "diffusion.py",
         "(x_t - signal_weight * x_0) / noise_weight", "(x_t - x_0) / noise_weight", "figures"),
    Edit("Frechet: the cross term once", "measures.py", "- 2 * cross)", "- cross)", "evaluate"),
    Edit("Frechet: no means", "measures.py", "(mean_a - mean_b).square().sum() + cov_a", "cov_a", "evaluate"),
    Edit("KID counts pairs with themselves", "measures.py",
         "- kernel.diagonal()[k].sum()) /", ") /", "evaluate"),
    Edit("copies moved by a pixel are missed", "measures.py",
         "reach = range(-pixels, pixels + 1)", "reach = range(1)", "evaluate"),
    Edit("min-SNR forgets the objective", "diffusion.py",
         '"v": snr + 1}[self.objective]', '"v": snr}[self.objective]', "diffusion"),
    Edit("timesteps bunch together", "utils.py",
         "comb = (torch.arange(batch_size, device=device) + torch.rand((), device=device)) / batch_size",
         "comb = torch.rand(batch_size, device=device)", "training"),
    Edit("Muon's step too long", "muon.py", "0.2 * max(matrix.shape) ** 0.5", "max(matrix.shape) ** 0.5", "muon"),
    Edit("known pixels only nearly kept", "edit.py",
         "x_0 - operator.back(operator.measure(x_0)) + operator.back(given)",
         "x_0 - 0.99 * operator.back(operator.measure(x_0) - given)", "edit"),
    Edit("the linear filter without its noise", "diagnose.py",
         "(power * noise**2 / (signal**2 * power + noise**2))", "(power * noise**2 / (signal**2 * power + 1))", "diagnose"),
    Edit("an answer of v read as eps", "diagnose.py",
         "x_0 = (a * x_t - b * out) / (a**2 + b**2)", "x_0 = (x_t - b * out) / a", "diagnose"),
    Edit("every assumption fits", "diagnose.py", "typical(own) < 1.3 * typical(best)", "typical(own) < 99 * typical(best)",
         "diagnose"),
    Edit("a wrong class is the right one", "diagnose.py", "shift = 1 + torch.arange", "shift = 0 * torch.arange", "diagnose"),
    Edit("attention of the wrong row", "models/attention_unet.py",
         "k.transpose(-1, -2)).softmax(-1)", "k.transpose(-1, -2)).softmax(-2)", "visualize_model"),
    Edit("no level more often than another", "utils.py", 'if density == "logit_normal":', "if False:", "training"),
    Edit("low levels no more often", "utils.py", "comb = comb ** 2", "comb = comb", "training"),
    Edit("the last steps and one more", "diffusion.py", "levels[-1 - last_steps:]", "levels[-2 - last_steps:]", "evaluate"),
    Edit("all detail is fine", "measures.py", "cycles[1]) > 0.25", "cycles[1]) > 0", "evaluate"),
    Edit("an error forgiven that clipping does not mend", "diffusion.py", "(x_0.abs() >= 1) & (over * x_0 > 0)",
         "over * x_0 > 0", "diffusion"),
    Edit("guidance pushes on what lies beyond black", "diffusion.py",
         "return x_0.clamp(-1, 1) if clip and self.clip_loss else x_0", "return x_0", "diffusion"),
    Edit("guidance of every model cut before the push", "diffusion.py", "if clip and self.clip_loss", "if clip", "diffusion"),
    Edit("an inversion that reads what was never asked for", "diffusion.py",
         "t, y, clip=self.clip_loss)", "t, y, clip=False)", "diffusion"),
    Edit("a way back that is cut where the way there was not", "interpolate.py",
         "clip = diffusion.clip_loss if args.images else True", "clip = True", "interpolate"),
    Edit("a diagnosis that reads what was never asked for", "diagnose.py", "if reading.clip else x_0", "if False else x_0",
         "diagnose"),
    Edit("classes in exact shares", "reference.py", "labels[torch.randint(len(labels), (count,), generator=",
         "labels.sort().values[torch.linspace(0, len(labels) - 1, count).long()][torch.randperm(count, generator=", "evaluate"),
    Edit("a floor of the test set's first images", "utils.py",
         "return torch.randperm(count, generator=torch.Generator().manual_seed(seed))", "return torch.arange(count)",
         "evaluate"),
    Edit("a folder's floor of its first images", "reference.py", "aside = aside[shuffled(len(aside))]", "pass",
         "hostile"),
    Edit("precision beside the first kind of image", "measures.py", "reference[order[:len(features)]]",
         "reference[:len(features)]", "evaluate"),
    Edit("the limit for a copy is not the one told", "measures.py", "kthvalue(copy_limit(len(held_out)))",
         "kthvalue(copy_limit(len(held_out)) + 1)", "evaluate"),
    Edit("a grandparent forgotten", "checkpoint.py", 'if before and before.get("images") != images:', "if False:",
         "resume"),
    Edit("a run replaces what it learns from", "data.py", "if name is None or name in DATASETS:", "if True:", "hostile"),
    Edit("a renamed class is the same run", "session.py", "if classes[0] != classes[1]:", "if False:", "hostile"),
    Edit("a stranger's optimizer settings", "checkpoint.py", "group.get(name) != value for", "False for", "hostile"),
    Edit("a rank beyond the world", "distributed.py", "int(rank) < int(world)", "True", "hostile"),
    Edit("an error told by nobody", "command_line.py", 'or "TORCHELASTIC_RUN_ID" not in os.environ', "", "hostile"),
    Edit("numbers before names of classes", "sample.py", "not any(name.isdecimal() for name in classes)",
         "True", "hostile"),
    Edit("weights of other images than are shown", "load.py", 'images=getattr(args, "dataset", None)', "images=None",
         "hostile"),
    Edit("half of a large set is not looked at", "data.py", "self.indices[::max(1, math.ceil(size / FINGERPRINTED))]",
         "self.indices[::2]", "hostile"),
    Edit("a mask squeezed to the square", "edit.py", "size, channels=1)           # cut",
         'size, fit="stretch", channels=1)           # cut', "hostile"),
    Edit("a walk that passes by its keys", "interpolate.py", "= float(key)", "+= 0", "interpolate"),
    Edit("the other processes end in a traceback", "running.py", "if self.ignore and self.came and isinstance",
         "if False and isinstance", "hostile"),
    Edit("a signal breaks the last save", "session.py", "with self.signals.held():", "if True:", "resume"),
    Edit("fewer of the last label", "sample.py", "y[torch.arange(count) * len(y) // count]", "y[:count]", "classes"),
    Edit("as many fives as ones", "evaluate.py", "if args.label is None and known:", "if False:", "evaluate"),
    Edit("a residual block that begins with noise", "models/attention_unet.py",
         "zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))",
         "nn.Conv2d(out_channels, out_channels, 3, padding=1)", "attention_unet"),
    Edit("the time does not scale", "models/attention_unet.py", "* (1 + scale) + shift", "+ shift", "attention_unet"),
    Edit("settings of another kind", "load.py", "        if not fits:", "        if False:", "hostile"),
    Edit("levels upside down in a card", "load.py", "and 0 <= levels[0] <= levels[1] <= T", "", "hostile"),
    Edit("a run older than a setting is refused", "session.py",
         'saved["model_config"] = {**model_defaults(facts["model_name"]), **saved["model_config"]}', "pass", "resume"),
    Edit("flags cut short", "command_line.py", "allow_abbrev=False, ", "", "hostile"),
    Edit("a per cent sign in a help", "command_line.py", 'help.replace("%", "%%")', "help", "hostile"),
    Edit("guidance at all levels", "diffusion.py", "interval[0] <= t <= interval[1]", "True", "diffusion"),
    Edit("a card's interval forgotten", "load.py",
         "args.guidance_interval or levels", "args.guidance_interval", "export"),
    Edit("a card's spacing forgotten", "load.py", 'args.spacing = args.spacing or data["spacing"]', "pass", "export"),
    Edit("a last step as long as the others", "schedules.py", " + np.log(t + 1)", "", "samplers"),
    Edit("a card's guidance forgotten", "load.py",
         'guidance, levels = data["guidance"], data', 'guidance, levels = 1.0, data', "export"),
    Edit("a card without the weak model's name", "export.py",
         'if found.get("weak") and not', "if False and not", "export"),
    Edit("a card's weak model forgotten", "load.py", "args.weak = str(beside)", "pass", "export"),
    Edit("a card that names a path", "load.py", "and weak == Path(weak).name", "", "export"),
    Edit("an even grey is a copy", "measures.py",
         "distances[0] < distances[1] / 3", "distances[0] < 0.02", "evaluate"),
    Edit("the second nearest is the nearest, moved", "measures.py",
         "distances.masked_fill(indices == index, math.inf).min(0)",
         "distances.topk(2, 0, largest=False)[0][1], pick", "evaluate"),
    Edit("a step of Muon with the wrong square", "muon.py", "gram = factor @ gram @ factor", "gram = factor @ gram", "muon"),
    Edit("a table that counts shared parameters twice", "inside.py",
         "if id(p) not in seen]\n        seen.update", "]\n        seen.update", "visualize_model"),
    Edit("components not centred", "inside.py",
         "features.double() - features.double().mean(dim=0)", "features.double()", "visualize_model"),
    Edit("Muon orthogonalises nothing", "muon.py", "for _ in range(steps):", "for _ in range(0):", "muon"),
    Edit("a run deletes before it has begun", "train.py",
         "origin, same_run = find_checkpoint(output_dir, resume, overwrite)",
         "origin, same_run = None, [path.unlink() for path in run_files(output_dir)] and False", "hostile"),
    Edit("a sheet remembers the number drawn", "sample.py",
         "    count = args.num_images if y", "    count = args.num_images = args.num_images if y", "hostile"),
    Edit("classes compared by their number", "reference.py",
         'data["classes"] == class_names(name or data["name"], True)', 'bool(data["classes"])', "hostile"),
    Edit("held out whatever has become of the folder", "reference.py",
         "if share and held_out == Batches(images, y, indices=aside).fingerprint()", "if share", "hostile"),
    Edit("empty is taken for not given", "command_line.py", 'if value == "" or', 'if value == "-" or', "hostile"),
    Edit("nohup is not heeded", "running.py", "is not signal.SIG_IGN", "is not None", "hostile"),
    Edit("one picture stops a folder", "folders.py",
         "    except Exception as error:                # a damaged file", "    except OSError as error:  #", "hostile"),
    Edit("a card decides what drew a picture", "checkpoint.py", 'kept = ("ema",', 'kept = ("card", "ema",', "export"),
    Edit("sixty steps are enough", "diagnose.py", "FEW_STEPS = 300", "FEW_STEPS = 3", "diagnose"),
    Edit("Data.pkl is not looked into", "checkpoint.py", "if len(pickles) != 1 or not", "if False and not", "commands"),
    Edit("others' pictures are deleted", "running.py", "NUMBERED.fullmatch(path.name)", "True", "resume"),
    Edit("the lock empties a file", "running.py", 'open(path, "a") as lock', 'open(path, "w") as lock', "resume"),
    Edit("every pass is the first", "data.py", "self.epoch += 1", "self.epoch = 1", "training"),
    Edit("garments mended by the digits' weights", "load.py", "name if name in datasets else", "", "hostile"),
    Edit("one digit four times", "visualize_diffusion.py", "order[turns.argsort(stable=True)]", "order", "commands"),
    Edit("a half-done step is saved", "session.py", 'not getattr(stop, "half_done", False)', "True", "resume"),
    Edit("flags of other figures", "command_line.py", "self.typed if name not in used", "self.typed if False", "hostile"),
    Edit("a flag typed with its default", "command_line.py",
         "if value is not ...", "if value is not ... and value != self.get_default(name)", "hostile"),
    Edit("a cache for a named set", "train.py", '{"cache_dir", "fit"}', "set()", "hostile"),
    Edit("an average that never begins", "plan.py", "if ema_every > total", "if False", "hostile"),
]


def caught_by(edit, folder):
    """Apply the edit in a fresh copy of the project; the name of the first test to fail, or None."""
    copy = folder / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "outputs", "data"))
    path = copy / edit.file
    source = path.read_text()
    if source.count(edit.right) != 1:
        raise SystemExit(f"{edit.name}: its line stands {source.count(edit.right)} times in {edit.file}, "
                         "not once; bring tests/mutate.py up to date")
    path.write_text(source.replace(edit.right, edit.wrong))
    files = [f"tests/test_{name}.py" for name in edit.tests.split()]
    own = "tests/test_commands.py::test_every_wrong_edit_finds_its_line_once"       # which the edit alone makes fail
    run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--deselect", own, *files],
                         cwd=copy, capture_output=True, text=True)
    shutil.rmtree(copy)
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", run.stdout, re.M)
    if run.returncode not in (0, 1):
        raise SystemExit(f"{edit.name}: pytest could not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return failed[1] if failed else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the edits whose name contains this")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for edit in tqdm([edit for edit in EDITS if args.only.lower() in edit.name.lower()], unit="edit"):
            rows.append((edit, caught_by(edit, Path(folder))))
            tqdm.write(f"{edit.name:40} {edit.file:15} {rows[-1][1] or '*** NOT CAUGHT ***'}")
    missed = sum(test is None for _, test in rows)
    print(f"{len(rows) - missed} of {len(rows)} wrong edits caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
