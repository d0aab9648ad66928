"""Figures of the diffusion process.

    python visualize_diffusion.py                         # noise destroys eight digits
    python visualize_diffusion.py --dataset fashion_mnist --schedule cosine

Writes outputs/forward_diffusion.png.
"""

import torch

from data import DATASET_HELP, get_dataset, get_default_dataset
from diffusion import SCHEDULES, DiffusionProcess
from utils import Parser, command, make_output_dir, positive_int, save_strip, seed_number, to_signed

FORWARD_TIMESTEPS = (0, 50, 100, 200, 400, 600, 800, 999)


def forward_figure(images, diffusion, path, timesteps=FORWARD_TIMESTEPS, seed=0, title=None):
    """One row per image, one column per timestep: the image sinks into noise.

    images: uint8 [N, C, H, W]. A row keeps one noise throughout, so that only its share grows.
    """
    x_0 = to_signed(images)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    columns = [diffusion.forward_diffusion(x_0, torch.full((len(x_0),), t), noise)[0] for t in timesteps]
    shares = [float(diffusion.alpha_bar[t]) for t in timesteps]
    labels = [f"t = {t}\n" + r"$\bar\alpha$ " + (f"{share:.4f}" if share > 1e-3 else f"{share:.0e}")
              for t, share in zip(timesteps, shares)]
    save_strip(torch.stack(columns, dim=1), labels, path, title=title)


@command
def main(argv=None):
    parser = Parser(description="Show how noise destroys images.")
    add = parser.add
    add("--dataset", DATASET_HELP, metavar="NAME")
    add("--data_dir", "where the data sets of torchvision lie, or go", "data")
    add("--image_size", "resize to this many pixels", type=positive_int)
    add("--schedule", "how alpha_bar falls", "linear", choices=sorted(SCHEDULES))
    add("--seed", "picks the images and the noise", 0, type=seed_number)
    add("--output_dir", "where the figure goes", "outputs")
    args = parser.parse_args(argv)

    output_dir = make_output_dir(args.output_dir)
    if args.dataset is None:
        name, images, _ = get_default_dataset(args.data_dir, image_size=args.image_size)
    else:
        name, (images, _) = args.dataset, get_dataset(args.dataset, args.data_dir, image_size=args.image_size)
    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[:8]
    path = output_dir / "forward_diffusion.png"
    forward_figure(images[pick], DiffusionProcess(schedule=args.schedule), path, seed=args.seed,
                   title=f"{name}: the forward process, {args.schedule} schedule")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
