#!/usr/bin/env python3
"""Records what Pillow 11.3 makes of small images: the fixtures of tests/augment.rs.

    pip install pillow==11.3.0 numpy safetensors
    python tests/reference/generate_augment.py tests/fixtures/augment

Each file holds images `IMAGE/in` and results `IMAGE/OP/ARGUMENT/...`, u8 [H, W, 3]; arguments are written so that they read back exactly.
"""

import sys
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from safetensors.numpy import save_file

assert PIL.__version__ == "11.3.0", PIL.__version__

FILL = (124, 116, 104)


def images():
    rng = np.random.default_rng(4)
    y, x = np.mgrid[0:29, 0:37]
    waves = np.stack([128 + 100 * np.sin(0.3 * x + 0.1 * y), 128 + 110 * np.cos(0.25 * y - 0.15 * x), 6.5 * x + 0.4 * y], -1)
    photo = np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255)
    dim = 60 + 0.35 * np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255)[:13, :11]
    return {
        "photo": photo.astype(np.uint8),
        "dim": dim.astype(np.uint8),
        "noise": rng.integers(0, 256, (16, 9, 3)).astype(np.uint8),
        "flat": np.full((8, 8, 3), (10, 200, 60), np.uint8),
        "pixel": np.array([[[3, 250, 77]]], np.uint8),
        "strip": rng.integers(0, 256, (2, 5, 3)).astype(np.uint8),
    }


def point(image, level):
    return image.point([level(v) for v in range(256)] * 3)


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def rotate(image, degrees):
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)


def solarise_add(image, add):
    return point(image, lambda v: min(255, v + add) if v < 128 else v)


def posterise(image, bits):
    return image if bits >= 8 else ImageOps.posterize(image, bits)


COLOUR = {
    "autocontrast": (ImageOps.autocontrast, [None]),
    "equalise": (ImageOps.equalize, [None]),
    "invert": (ImageOps.invert, [None]),
    "grey": (lambda image: Image.merge("RGB", [image.convert("L")] * 3), [None]),
    "posterise": (posterise, [0, 1, 2, 4, 7, 8]),
    "solarise": (ImageOps.solarize, [0, 26, 128, 256]),
    "solarise_add": (solarise_add, [0, 33, 99, 110]),
    "saturation": (lambda image, f: ImageEnhance.Color(image).enhance(f), [0.0, 0.19, 0.7, 1.0, 1.3, 1.81, 5.5]),
    "contrast": (lambda image, f: ImageEnhance.Contrast(image).enhance(f), [0.0, 0.19, 0.7, 1.0, 1.3, 1.81, 5.5]),
    "brightness": (lambda image, f: ImageEnhance.Brightness(image).enhance(f), [0.0, 0.19, 0.7, 1.0, 1.3, 1.81, 5.5]),
    "sharpness": (lambda image, f: ImageEnhance.Sharpness(image).enhance(f), [0.0, 0.19, 0.7, 1.0, 1.3, 1.81, 5.5]),
    "blur": (lambda image, s: image.filter(ImageFilter.GaussianBlur(s)), [0.0, 0.1, 0.4, 0.77, 1.0, 1.35, 1.9, 2.0, 3.3, 9.5]),
}

AFFINE = {
    "rotate": (rotate, [0.0, 13.7, -27.0, 30.0, 45.0, 90.0, 180.0, -90.0, 270.0, 360.0, 400.0, -0.001]),
    "shear_x": (lambda image, f: affine(image, (1, f, 0, 0, 1, 0)), [0.0, 0.27, -0.3, 0.05, 1.7]),
    "shear_y": (lambda image, f: affine(image, (1, 0, 0, f, 1, 0)), [0.0, 0.27, -0.3, 0.05, 1.7]),
    "translate_x": (lambda image, p: affine(image, (1, 0, p * image.size[0], 0, 1, 0)), [0.0, 0.405, -0.45, 0.013, 1.0, -1.0]),
    "translate_y": (lambda image, p: affine(image, (1, 0, 0, 0, 1, p * image.size[1])), [0.0, 0.405, -0.45, 0.013, 1.0, -1.0]),
}


def rand_augment(op, level, sign, increasing):
    """The operation with the argument that its level and sign mean."""
    s = level / 10
    enhance = 1.0 + sign * (s * 0.9) if increasing else s * 1.8 + 0.1
    bits = 4 - int(s * 4) if increasing else int(s * 4)
    threshold = 256 - int(s * 256) if increasing else int(s * 256)
    return {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Rotate": lambda image: rotate(image, sign * (s * 30)),
        "Posterize": lambda image: posterise(image, bits),
        "Solarize": lambda image: ImageOps.solarize(image, threshold),
        "SolarizeAdd": lambda image: solarise_add(image, int(s * 110)),
        "Color": lambda image: ImageEnhance.Color(image).enhance(enhance),
        "Contrast": lambda image: ImageEnhance.Contrast(image).enhance(enhance),
        "Brightness": lambda image: ImageEnhance.Brightness(image).enhance(enhance),
        "Sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(enhance),
        "ShearX": lambda image: affine(image, (1, sign * (s * 0.3), 0, 0, 1, 0)),
        "ShearY": lambda image: affine(image, (1, 0, 0, sign * (s * 0.3), 1, 0)),
        "TranslateXRel": lambda image: affine(image, (1, 0, sign * (s * 0.45) * image.size[0], 0, 1, 0)),
        "TranslateYRel": lambda image: affine(image, (1, 0, 0, 0, 1, sign * (s * 0.45) * image.size[1])),
    }[op]


OPS = (
    "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness Sharpness ShearX ShearY TranslateXRel "
    "TranslateYRel"
).split()


def record_crops(pictures, record):
    image = Image.fromarray(pictures["photo"])  # 29 rows, 37 columns
    for top, left, height, width, side, flip in [(0, 0, 29, 37, 16, 0), (3, 5, 17, 20, 24, 1), (11, 30, 9, 7, 15, 0), (28, 36, 1, 1, 4, 1), (2, 1, 16, 16, 16, 1)]:
        cut = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        cut = ImageOps.mirror(cut) if flip else cut
        record[f"photo/resized/{top},{left},{height},{width},{side},{flip}"] = np.asarray(cut)
    modes = {"zero": dict(mode="constant"), "reflect": dict(mode="reflect"), "replicate": dict(mode="edge")}
    for border, options in modes.items():
        for padding, top, left, side in [(4, -4, -4, 29), (4, 4, 12, 29), (4, -1, 3, 16), (0, 5, 6, 20), (7, -7, 15, 29)]:
            padded = np.pad(pictures["photo"], ((padding, padding), (padding, padding), (0, 0)), **options)
            window = padded[top + padding : top + padding + side, left + padding : left + padding + side]
            record[f"photo/{border}/{top},{left},{side}"] = np.ascontiguousarray(window)


def main(folder):
    pictures = images()
    files = {name: {f"{image}/in": pixels for image, pixels in pictures.items()} for name in ["colour", "affine", "rand_augment", "crop"]}
    for name, table in [("colour", COLOUR), ("affine", AFFINE)]:
        for image, pixels in pictures.items():
            for op, (call, arguments) in table.items():
                for argument in arguments:
                    given = [] if argument is None else [argument]
                    out = call(Image.fromarray(pixels), *given)
                    files[name][f"{image}/{op}/{argument}"] = np.asarray(out)
    for op in OPS:
        for level in [0.0, 3.71, 9.0, 10.0]:
            for sign in [1, -1]:
                for increasing in [1, 0]:
                    out = rand_augment(op, level, sign, increasing)(Image.fromarray(pictures["noise"]))
                    files["rand_augment"][f"noise/{op}/{level},{sign},{increasing}"] = np.asarray(out)
    record_crops(pictures, files["crop"])
    for name, tensors in files.items():
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
