#!/usr/bin/env python3
"""Loading images: masque beside Pillow + torchvision, on the same files, each on one core.

Both sides start from JPEG files in memory and end with normalised f32 images in a batch. They take turns, masque, torchvision, masque, torchvision,
once a round, so that a busy machine troubles both alike; a row shows the medians over the rounds, their ratio (above 1 masque is faster) and the
range of the ratio over the rounds.

    bench_loading.py                          64 photograph-like images of 500 x 375 pixels, 4:2:0, about 80 KB each
    bench_loading.py --subsampling 444        the same without subsampling of colour
    bench_loading.py --folder DIR             the .jpg files of a folder
    bench_loading.py --min-ratio 1.5          exit 1 when the row `pretrain` is below

`pretrain` is decode, RandomResizedCrop (bicubic), flip, to tensor, normalise; `evaluate` is decode, short side to 256, centre crop, to tensor,
normalise; `finetune` adds RandAugment and erasing, whose torchvision versions are not quite timm's: read it as a rough comparison.
`tensors` is `pretrain` with torchvision's own decoder and its second set of transforms on uint8 tensors, beside masque's `pretrain`.

The program is $MASQUE, else target/release/masque of this repository. Needs torch, torchvision, Pillow, numpy and taskset.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


def fail(sentence):
    print(f"bench_loading: {sentence}", file=sys.stderr)
    sys.exit(2)


def make(folder, count, subsampling):
    """Noise at all scales, the coarse stronger as in photographs."""
    import numpy as np
    from PIL import Image

    # Both give about 80 KB.
    strength, growth, sampling = (10, 0.3, 2) if subsampling == "420" else (5.5, 0.4, 0)
    for number in range(count):
        draws = np.random.default_rng(number)
        levels = np.full((375, 500, 3), 128.0)
        for octave in range(8):
            cell = 1 << octave
            grid = draws.standard_normal((375 // cell + 2, 500 // cell + 2, 3))
            y, x = np.arange(375), np.arange(500)
            fy, fx = (y % cell / cell)[:, None, None], (x % cell / cell)[None, :, None]
            y, x = y[:, None] // cell, x[None, :] // cell
            rows = [grid[y + dy, x] * (1 - fx) + grid[y + dy, x + 1] * fx for dy in (0, 1)]
            levels += strength * cell**growth * (rows[0] * (1 - fy) + rows[1] * fy)
        picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:03}.jpg", quality=88, subsampling=sampling)


def theirs(files):
    """Steps by name, each a function that passes over all files once."""
    import torch
    from PIL import Image
    from torchvision import io as tv_io
    from torchvision import transforms as t
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    cubic = t.InterpolationMode.BICUBIC
    end = [t.ToTensor(), t.Normalize(MEAN, STD)]
    crop = [t.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=cubic), t.RandomHorizontalFlip()]
    wide = [t.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=cubic), t.RandomHorizontalFlip()]
    augmented = [t.RandAugment(2, 9, interpolation=cubic), *end, t.RandomErasing(0.25, value="random")]

    def opened(file):
        return Image.open(io.BytesIO(file)).convert("RGB")

    def passes(transform, decode=opened):
        def run():
            for first in range(0, len(files), BATCH):
                torch.stack([transform(decode(file)) for file in files[first : first + BATCH]])

        return run

    def decode_only():
        for file in files:
            opened(file)

    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    on_tensors = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=cubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def second_set():
        for first in range(0, len(files), BATCH):
            torch.stack([on_tensors(tv_io.decode_jpeg(file, mode=tv_io.ImageReadMode.RGB)) for file in tensors[first : first + BATCH]])

    return {
        "decode": decode_only,
        "pretrain": passes(t.Compose(crop + end)),
        "evaluate": passes(t.Compose([t.Resize(256, interpolation=cubic), t.CenterCrop(224), *end])),
        "finetune": passes(t.Compose(wide + augmented)),
        "tensors": second_set,
    }


def ours(program, folder, core, passes):
    command = ["taskset", "-c", str(core), program, "measure", "loading", "--json", "--workers", "0", "--rounds", str(passes), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        fail(f"{' '.join(command)} failed: {done.stderr.strip()}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["step"]: row["images_per_s"] for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--subsampling", choices=["420", "444"], default="420")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=3, help="passes over the files a round")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--min-ratio", type=float)
    args = parser.parse_args()
    program = os.environ.get("MASQUE") or str(Path(__file__).resolve().parents[2] / "target/release/masque")
    if not os.access(program, os.X_OK):
        fail(f"{program} is no program; build it with cargo build --release, or set MASQUE")
    try:
        import PIL
        import torch
        import torchvision
    except ImportError as error:
        fail(f"{error}; pip install torch==2.11.0 torchvision numpy pillow==11.3.0")
    os.sched_setaffinity(0, {args.core})
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder
        if folder is None:
            folder = Path(made)
            make(folder, args.images, args.subsampling)
        files = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
        if not files:
            fail(f"{folder} holds no .jpg files")
        size = statistics.mean(len(file) for file in files) / 1000
        print(f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}; {len(files)} files of {size:.0f} KB on average")
        steps = theirs(files)
        mine, other = {name: [] for name in steps}, {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(args.rounds):
            measured = ours(program, folder, args.core, args.passes)
            for name, step in steps.items():
                mine[name].append(measured["pretrain" if name == "tensors" else name])
                times = []
                for _ in range(args.passes):
                    start = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - start)
                other[name].append(len(files) / statistics.median(times))
    print(f"{'step':<10} {'masque':>10} {'torchvision':>12} {'ratio':>7}   range      (images/s on one core, medians of {args.rounds} rounds)")
    ratios = {}
    for name in steps:
        pairs = [a / b for a, b in zip(mine[name], other[name])]
        ratios[name] = statistics.median(mine[name]) / statistics.median(other[name])
        print(
            f"{name:<10} {statistics.median(mine[name]):>10.0f} {statistics.median(other[name]):>12.0f} {ratios[name]:>7.2f}   {min(pairs):.2f}-{max(pairs):.2f}"
        )
    if args.min_ratio is not None and ratios["pretrain"] < args.min_ratio:
        print(f"pretrain: {ratios['pretrain']:.2f} is below {args.min_ratio}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
