"""What is right in execute.py, modify.py and create.py, and the mistakes that most people make.

A check takes an answer, or a function, and returns nothing if it is right, else a line that says
what is wrong. The right values are computed here from the papers' formulas, by plain loops, and
not with the project's own functions.
"""

import math
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # for the project's own files, wherever this is run from

TO_DO = "to do"
LEARN_STEPS = 150


def grade(name, answers):
    """Check an exercise's answers, print a line for each, and exit: 0 if all are right, else 1, or
    2 if it was given flags."""
    flags = sys.argv[1:] if Path(sys.argv[0]).stem == name else []      # not those of pytest
    if flags:
        print(f"error: {name}.py takes no flags, got {' '.join(flags)}: write your answers into it "
              "and run it", file=sys.stderr)
        sys.exit(2)
    checks, right = EXERCISES[name], 0
    for number, (task, check) in enumerate(checks.items(), start=1):
        try:
            wrong = check(answers[task])
        except KeyboardInterrupt:
            print(f"{number}. {task}: stopped")
            sys.exit(130)
        except (Exception, SystemExit) as error:
            # Whatever goes wrong in the student's code is told, not raised.
            wrong = told(error)
            own = [line for line in traceback.extract_tb(error.__traceback__)
                   if Path(line.filename).stem == name]
            wrong += f" (line {own[-1].lineno})" if own else ""
        right += wrong is None
        print(f"{number}. {task}: {'right' if wrong is None else wrong}", flush=True)
    print(f"{right} of {len(checks)} are right" + "; well done" * (right == len(checks)))
    if name == "create" and right == len(checks):
        try:
            draw_digits(answers["draw"])
        except Exception as error:
            print(f"but no 64 digits can be drawn by it: {told(error)}")
    sys.exit(0 if right == len(checks) else 1)


def told(error):
    """An error in one line, whatever it is."""
    try:
        words = " ".join(str(error).split())[:200]
    except Exception:                           # a student's own kind of error
        words = ""
    return f"{type(error).__name__}: {words or 'no message'}"


def compare(found, right, mistakes=()):
    """What is wrong with a tensor. mistakes: pairs (the result of a usual mistake, what to say)."""
    if found is None or found is ...:
        return TO_DO + " (it returns None)"
    if not torch.is_tensor(found):
        return f"a tensor is wanted, not {type(found).__name__}"
    if found.shape != right.shape:
        return f"its shape is {tuple(found.shape)}, not {tuple(right.shape)}"
    if found.is_complex():
        return "its numbers are complex"
    found = found.detach().double()
    if torch.allclose(found, right.double(), rtol=1e-4, atol=1e-5):
        return None
    for wrong, hint in mistakes:
        if torch.allclose(found, wrong.double(), rtol=1e-4, atol=1e-5):
            return hint
    return f"wrong: up to {float((found - right.double()).abs().max()):.3g} away"


def random(*shape, seed=0):
    """The same numbers each time. What a student's function gets is a copy: it may change it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- The schedules, one step after the other

def linear_schedule(T=1000):
    left, values = 1.0, []
    for t in range(T):
        left *= 1 - (1e-4 + (0.02 - 1e-4) * t / (T - 1)) * 1000 / T
        values.append(left)
    return torch.tensor(values, dtype=torch.float64)


def cosine_curve(t, T):
    return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2


def cosine_schedule(T=1000):
    left, values = 1.0, []
    for t in range(T):
        left *= 1 - min(1 - cosine_curve(t + 1, T) / cosine_curve(t, T), 0.999)
        values.append(left)
    return torch.tensor(values, dtype=torch.float64)


# ---- Exercise 1

def number(right, hint, tolerance=0.0):
    """A check of an answer that is a number, or a pair of numbers."""
    def check(answer):
        if answer is None:
            return TO_DO
        answers, wanted = (tuple(value) if isinstance(value, (tuple, list)) else (value,)
                           for value in (answer, right))
        if len(answers) != len(wanted):
            return ("two numbers are wanted: (a, b)" if len(wanted) == 2
                    else "one number is wanted, with a decimal point")
        if any(isinstance(value, str) for value in answers):
            return "without quotation marks"
        if any(isinstance(a, bool) != isinstance(b, bool) for a, b in zip(answers, wanted)):
            return "True or False is wanted" if right is True else "numbers are wanted"
        close = all(abs(a - b) <= tolerance for a, b in zip(answers, wanted))
        return None if close else f"not {answer}: {hint}"
    return check


EXECUTE = {
    "first_t_below_0_dB_cosine": number(
        next(t for t, left in enumerate(cosine_schedule()) if left < 0.5),
        "0 dB is as much noise as image; the last line of the table names the first t below it"),
    "factor_of_the_image_at_250": number(
        float(linear_schedule()[250].sqrt()),
        "the table has alpha_bar, the share of the variance: take its root", tolerance=0.01),
    "calls_without_and_with_guidance": number(
        (10, 20),
        "ten steps; guidance asks for two answers in each, one with the class and one without"),
    "the_same_picture_whatever_the_batch": number(
        True,
        "the noise of a picture depends on the seed and its number alone, "
        "so that the two sheets are equal, pixel by pixel"),
    "memory_of_the_second_level_over_the_first": number(
        0.5, "a fourth of the places, but twice the channels in each"),
    "loss_of_zero_and_of_the_copy": number(
        (1.0, 0.0),
        "the mean square of a unit Gaussian is its variance; "
        "and in pure noise the input is the noise", tolerance=0.001),
}


# ---- Exercise 2

def check_alpha_bar(alpha_bar):
    for T in (100, 250):
        curve = torch.tensor([cosine_curve(t, T) for t in range(T + 1)], dtype=torch.float64)
        before, after = curve[:-1], curve[1:]
        found = alpha_bar(T)
        wrong = compare(found, cosine_schedule(T), [
            (linear_schedule(T), "still the linear schedule: " + TO_DO),
            (before / curve[0], "alpha_bar at index t belongs to t + 1 steps: the first is not 1"),
            (before, "alpha_bar at index t belongs to t + 1 steps; and divide by the curve at 0"),
            (after,
             "divide by the curve at 0, so that all of the image is there before the first step"),
            (torch.cat([(1 - after / before)[:-1], torch.tensor([0.999])]),
             "those are the betas: alpha_bar is the product of all 1 - beta so far")])
        if wrong:
            return wrong
        last = 1 - float(found[-1] / found[-2])             # too small a difference for compare
        if abs(last - 0.999) > 1e-6:
            return (f"the last beta is {last:.6f}: "
                    "limit the betas to 0.999, then multiply 1 - beta together")
    return None


def check_target(target):
    x_0, noise, ab = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1), 0.3
    image, other = ab ** 0.5, (1 - ab) ** 0.5
    return compare(target(x_0.clone(), noise.clone(), ab), image * noise - other * x_0, [
        (noise, "still the noise: " + TO_DO),
        (other * x_0 - image * noise, "the other way round: v is plus noise, minus image"),
        (image * x_0 + other * noise, "that is the noisy image itself"),
        (image * x_0 - other * noise,
         "the factors are exchanged: v is sqrt(ab) noise - sqrt(1 - ab) x_0"),
        (other * noise - image * x_0,
         "the factors are exchanged: v is sqrt(ab) noise - sqrt(1 - ab) x_0"),
        (ab * noise - (1 - ab) * x_0, "the factors are roots")])


def check_levels(levels):
    for T, steps in ((1000, 50), (1000, 30), (1000, 300), (1000, 7), (10, 10), (1000, 1)):
        found = levels(T, steps)
        if found is None:
            return TO_DO
        told = f"levels({T}, {steps})"
        if not isinstance(found, list) or not all(type(t) is int for t in found):
            return f"{told} is no list of integers"
        if found == list(range(T - 1, -1, -(T // steps))):
            return "still without the clean image: " + TO_DO
        if not found or found[0] != T - 1:
            return (f"{told} begins with {found[0] if found else 'nothing'} "
                    f"and not with {T - 1}, the noisiest")
        if found[-1] != -1:
            return f"{told} ends with {found[-1]} and not with -1, the clean image"
        if len(found) != steps + 1:
            return f"{told} makes {len(found) - 1} steps"
        strides = [a - b for a, b in zip(found, found[1:])]
        if min(strides) < 1:
            return f"{told} does not fall all the way"
        if max(strides) - min(strides) > 1:
            return f"{told} has strides of {min(strides)} and of {max(strides)}"
    return None


def check_step(step):
    x_t, eps, fresh = (random(2, 1, 4, 4, seed=seed) for seed in range(3))
    ab_t, ab_prev = 0.3, 0.5
    x_0 = (x_t - (1 - ab_t) ** 0.5 * eps) / ab_t ** 0.5
    variance = (1 - ab_prev) / (1 - ab_t) * (1 - ab_t / ab_prev)
    less = ab_prev ** 0.5 * x_0 + (1 - ab_prev - variance) ** 0.5 * eps
    all_of_it = ab_prev ** 0.5 * x_0 + (1 - ab_prev) ** 0.5 * eps
    return compare(step(x_t.clone(), eps.clone(), ab_t, ab_prev, fresh.clone()), all_of_it, [
        (less + variance ** 0.5 * fresh, "still DDPM: " + TO_DO),
        (less,
         "no fresh noise is added, but part of the old one is still taken away: "
         "the picture loses its noise too fast"),
        (all_of_it + variance ** 0.5 * fresh,
         "fresh noise is still added, on top of all the old one"),
        (x_0, "that is the guess of the clean image: go no further than to ab_prev"),
        (ab_prev ** 0.5 * x_0 + (1 - ab_prev) ** 0.5 * fresh,
         "the noise is all fresh: DDIM keeps eps"),
        (ab_prev * x_0 + (1 - ab_prev) * eps, "the factors are roots")])


def check_guided(guided):
    with_class, without = random(2, 1, 4, 4), random(2, 1, 4, 4, seed=1)
    return compare(
        guided(with_class.clone(), without.clone(), 3.0), without + 3 * (with_class - without), [
            (with_class, "still the plain answer: " + TO_DO),
            (with_class + 3 * (with_class - without),
             "that counts from the answer with the class: 0 would be plain, and here 1 is"),
            (with_class + 3 * (without - with_class), "it leads away from the class"),
            (3 * with_class, "it has to count from the answer without a class"),
            (without + 3 * with_class, "what is added is the difference of the two answers")])


MODIFY = {"alpha_bar": check_alpha_bar, "target": check_target, "levels": check_levels,
          "step": check_step, "guided": check_guided}


# ---- Exercise 3

def spread(values):
    """[B] as [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def noised(x_0, t, noise, ab):
    """The right answer to noisy."""
    return spread(ab[t].sqrt()) * x_0 + spread((1 - ab[t]).sqrt()) * noise


def levels_of(x, t):
    """t as a list, if a model may be told it so."""
    if not torch.is_tensor(t) or t.shape != (len(x),) or t.is_floating_point():
        given = f"{t.dtype} of shape {tuple(t.shape)}" if torch.is_tensor(t) else f"{t!r:.40}"
        raise ValueError(f"the model wants t as a tensor of {len(x)} integers, "
                         f"one for each image, not {given}")
    return t.tolist()


def check_noisy(noisy):
    ab, t = linear_schedule(), torch.tensor([0, 250, 999])
    x_0, noise = random(3, 1, 3, 3), random(3, 1, 3, 3, seed=1)
    image, other = spread(ab[t].sqrt()), spread((1 - ab[t]).sqrt())
    return compare(
        noisy(x_0.clone(), t.clone(), noise.clone(), ab.clone()), noised(x_0, t, noise, ab), [
            (spread(ab[t]) * x_0 + spread(1 - ab[t]) * noise,
             "the factors are the roots of alpha_bar and 1 - alpha_bar"),
            (ab[t].sqrt() * x_0 + (1 - ab[t]).sqrt() * noise,
             "the factors go along the columns of the pictures: "
             "give them the shape [B, 1, 1, 1], one for each image"),
            (other * x_0 + image * noise, "image and noise are exchanged"),
            (x_0 + other * noise, "the image, too, is scaled: by the root of alpha_bar"),
            (image * x_0 + noise, "the noise, too, is scaled: by the root of 1 - alpha_bar"),
            (image * x_0 + spread(1 - ab[t].sqrt()) * noise,
             "the root of (1 - alpha_bar), not 1 - root")])


def check_loss(loss):
    ab, t = linear_schedule(), torch.tensor([0, 250, 999])
    x_0, noise = random(3, 1, 3, 3), random(3, 1, 3, 3, seed=1)
    x_t = noised(x_0, t, noise, ab)
    seen, half = [], torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def model(x, times):
        times = levels_of(x, times)
        seen.append((x.detach().clone(), times))
        return half * x

    found = loss(model, x_0.clone(), t.clone(), noise.clone(), ab.clone())
    if found is None:
        return TO_DO
    if len(seen) != 1:
        return f"the model is asked {len(seen)} times, not once"
    if seen[0][1] != t.tolist():
        return f"the model is told t = {seen[0][1]}, not the {t.tolist()} of its images"
    wrong = compare(seen[0][0], x_t, [(x_0, "the model is shown the clean images"),
                                      (noise, "the model is shown noise")])
    if wrong:
        return f"what the model sees: {wrong} (first mend noisy, if that is not right yet)"
    if torch.is_tensor(found) and not found.requires_grad:
        return "no gradient leads back to the model: nothing would be learnt"
    error = 0.5 * x_t - noise
    return compare(found, error.square().mean(), [
        (error.square().sum(), "the mean, not the sum: else it depends on the size of the batch"),
        (error.abs().mean(), "the square of the error"),
        ((0.5 * x_t - x_0).square().mean(),
         "the answer is to be held against the noise, not the image"),
        ((0.5 * x_t - x_t).square().mean(),
         "the answer is to be held against the noise, not the noisy image"),
        (error.square().mean().sqrt(), "without the root")])


def check_learn(learn):
    from models import create_model
    from synthetic import digits

    pictures = torch.nn.functional.avg_pool2d(digits(256)[0].float(), 2)        # [256, 1, 14, 14]
    images = torch.nn.functional.pad(pictures, (1, 1, 1, 1)) / 127.5 - 1
    ab, t = linear_schedule().float(), torch.arange(256) * 1000 // 256
    noise = random(256, 1, 16, 16).float()
    x_t = noised(images, t, noise, ab)
    torch.manual_seed(0)
    model = create_model(base_channels=16)
    before = [p.detach().clone() for p in model.parameters()]
    seen = []

    def watch(module, args):
        seen.append((args[0].detach().clone(), torch.tensor(levels_of(*args[:2]))))

    def measured():
        with torch.no_grad():
            return float((model(x_t, t) - noise).square().mean())

    at_first = measured()
    hook = model.register_forward_pre_hook(watch)
    learn(model, images.clone(), ab.clone(), LEARN_STEPS)
    hook.remove()
    if not seen:
        return TO_DO
    if all(torch.equal(a, b) for a, b in zip(before, model.parameters())):
        return "no weight has changed: loss.backward(), then optimizer.step()"
    if len(seen) != LEARN_STEPS:
        return f"{LEARN_STEPS} steps were asked for, and the model was called {len(seen)} times"
    if {len(x) for x, _ in seen} != {32}:
        return f"32 images a step were asked for, not {sorted({len(x) for x, _ in seen})}"
    wrong = check_batches(seen, images)
    if wrong:
        return wrong
    at_last = measured()
    if not at_last < 0.15:
        return (f"the loss on {len(images)} pictures went from {at_first:.2f} to {at_last:.2f}; "
                "below 0.1 is usual: are the gradients set to zero before each step, and the noise "
                "the one that was added? (first mend loss, if that is not right yet)")
    return None


def check_batches(seen, images):
    """Was everything that is random drawn anew? seen: (x_t, t) of each step."""
    x, t = (torch.cat(parts) for parts in zip(*seen))
    if max(len(part.unique()) for _, part in seen) == 1:
        return "all images of a step have the same t: draw one for each"
    if len(t.unique()) < 500 or t.min() > 50 or t.max() < 950:
        return (f"t took {len(t.unique())} values from {int(t.min())} to {int(t.max())}: "
                "one from 0 to T - 1 for every image, anew in each step")
    noise = torch.nn.functional.normalize(x[t > 950].flatten(1))    # hardly anything else is left
    if float((noise @ noise.T).fill_diagonal_(0).max()) > 0.8:
        return "the same noise comes twice: draw it anew for every image in each step"
    clean = x[t < 30].flatten(1)
    if len(torch.cdist(clean, images.flatten(1)).argmin(1).unique()) < len(clean) / 3:
        return "the same few images come again and again: choose them at random from all"
    return None


def check_draw(draw):
    """Where the data are Gaussian, the best answer is known, and so is where DDIM goes."""
    ab, mean, variance, calls = linear_schedule(), 0.4, 0.09, []

    def model(x, t):
        calls.append(levels_of(x, t))
        left = spread(ab[t])
        return (1 - left).sqrt() * (x - left.sqrt() * mean) / (left * variance + 1 - left)

    def walk(x, levels, clean):
        for k, now in enumerate(levels):
            eps = model(x, torch.full((len(x),), now))
            x_0 = (x - (1 - ab[now]).sqrt() * eps) / ab[now].sqrt()
            left = ab[levels[k + 1]] if k + 1 < len(levels) else clean
            x = left ** 0.5 * x_0 + (1 - left) ** 0.5 * eps
        return x

    for steps in (10, 20):
        x_T, levels = random(5, 1, 3, 3), range(999, -1, -1000 // steps)
        right = walk(x_T, levels, 1.0)
        mistakes = [
            (walk(x_T, levels, ab[-1]),
             "the last step goes to alpha_bar[-1], which Python takes for the noisiest: "
             "the clean image has alpha_bar 1"),
            (walk(x_T, levels, ab[0]), "the last step ends at t = 0, where a little noise is left")]
        calls.clear()
        found = draw(model, x_T.clone(), ab.clone(), steps)
        if found is None:
            return TO_DO
        if len(calls) != steps:
            return f"{steps} steps were asked for, and the model was called {len(calls)} times"
        if calls != [[t] * 5 for t in levels]:
            return f"the levels are {[t[0] for t in calls]}, not {list(levels)}"
        wrong = compare(found, right, mistakes)
        if wrong:
            return wrong
    return None


CREATE = {"noisy": check_noisy, "loss": check_loss, "learn": check_learn, "draw": check_draw}
EXERCISES = {"execute": EXECUTE, "modify": MODIFY, "create": CREATE}


def draw_digits(draw):
    """64 digits by the student's sampler, from the weights that come with the project."""
    from images import save_images
    from load import PRETRAINED, load_model

    network, process, _ = load_model(PRETRAINED / "mnist.pt")
    y, ab = torch.arange(64) % 10, process.alpha_bar.float()

    @torch.no_grad()
    def model(x_t, t):                                      # this network answers with v
        return process.predict_noise(network, x_t, t, y)

    path = ROOT / "outputs" / "exercises" / "my_digits.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_images(draw(model, random(64, 1, 28, 28).float(), ab, 20), path)
    print(f"wrote {path.relative_to(ROOT)}: 64 digits by a sampler of yours")
