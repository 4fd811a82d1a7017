"""The small images of tests/fixtures/images and what Pillow 11.3 reads from them.

    python tests/reference/make_images.py          needs pillow==11.3.0 and numpy

Prints three pixels of each image as `convert("RGB")` gives them: the numbers in tests/data_folder.rs.
"""

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent.parent / "fixtures" / "images"
H, W = 20, 36


def field(seed, channels):
    """A smooth picture with no symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:H, 0:W] / H
    planes = []
    for _ in range(channels):
        a, b, c, d = rng.uniform(0.5, 3.0, 4)
        planes.append(127.5 + 120 * np.sin(a * x + b * y + c) * np.cos(d * y - a * x))
    return np.clip(np.stack(planes, -1), 0, 255)


def png(name, depth, kind, rows, chunks=()):
    """A PNG written by hand, for what Pillow does not write."""
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    height = len(rows)
    width = len(rows[0]) * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind])
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body += b"".join(chunk(tag, data) for tag, data in chunks)
    body += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9)) + chunk(b"IEND", b"")
    (HERE / name).write_bytes(body)


def main():
    HERE.mkdir(parents=True, exist_ok=True)
    rgb = Image.fromarray(field(1, 3).astype(np.uint8))
    grey = Image.fromarray(field(2, 1)[..., 0].astype(np.uint8))
    cmyk = Image.merge("CMYK", [Image.fromarray(plane.astype(np.uint8)) for plane in np.moveaxis(field(3, 4) * 0.7, -1, 0)])

    rgb.save(HERE / "full.jpg", quality=95, subsampling=0)
    rgb.save(HERE / "half.jpg", quality=90, subsampling=2)
    rgb.save(HERE / "progressive.jpg", quality=90, subsampling=2, progressive=True)
    rgb.save(HERE / "restart.jpg", quality=90, subsampling=1, restart_marker_blocks=1)
    rgb.save(HERE / "rgb.jpg", quality=95, keep_rgb=True)
    grey.save(HERE / "grey.jpg", quality=95)
    cmyk.save(HERE / "cmyk.jpg", quality=95)
    # The same four planes, read as Adobe's transformed ones.
    data = bytearray((HERE / "cmyk.jpg").read_bytes())
    data[data.index(b"Adobe") + 11] = 2
    (HERE / "ycck.jpg").write_bytes(data)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(HERE / "rotated.jpg", quality=95, subsampling=0, exif=exif)

    rgb.save(HERE / "plain.png")
    Image.fromarray((field(2, 1)[..., 0] * 257).astype(np.uint16)).save(HERE / "grey16.png")
    wide = (field(1, 3) * 256).astype(">u2")
    png("rgb16.png", 16, 2, [row.tobytes() for row in wide])
    alpha = np.dstack([np.asarray(rgb), field(4, 1).astype(np.uint8)])
    alpha[2:6, 3:9, 3] = 0
    Image.fromarray(alpha).save(HERE / "alpha.png")
    Image.fromarray(np.dstack([np.asarray(grey), alpha[..., 3]])).save(HERE / "grey_alpha.png")
    palette = rgb.quantize(16)
    palette.save(HERE / "palette.png", transparency=3)
    bits = (field(2, 1)[..., 0] > 127).astype(np.uint8)
    Image.fromarray(bits * 255).convert("1").save(HERE / "bits.png")
    png("grey2.png", 2, 0, [np.packbits(((row.astype(int)[:, None] >> [7, 6]) & 1).ravel()).tobytes() for row in field(2, 1)[..., 0]])
    Image.new("RGB", (1, 1), (9, 200, 77)).save(HERE / "one.png")

    rgb.save(HERE / "exact.webp", lossless=True)
    rgb.save(HERE / "lossy.webp", quality=80)
    rgb.save(HERE / "plain.bmp")
    palette.save(HERE / "palette.bmp")

    for path in sorted(HERE.iterdir()):
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        w, h = image.size
        pixels = [image.getpixel(at) for at in ((0, 0), (w // 3, h // 2), (w - 1, h - 1))]
        print(f'    ("{path.name}", [{h}, {w}], {[list(pixel) for pixel in pixels]}),')


if __name__ == "__main__":
    main()
