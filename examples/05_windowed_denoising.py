"""Denoise a photograph with non-local means within a neighbourhood, as attention under a two-dimensional mask.

Every pixel is replaced by an average over the pixels at most `radius` rows and columns away, weighted by how much the
patches around two pixels look alike (Buades, Coll and Morel 2005). As in 01_denoise_photo.py that is attention with
q = k = p, v = patches, scale = 2/h² and bias_j = -|p_j|²/h²; the neighbourhood is a mask, a function of two indices:

    masks.where(lambda batch, head, q, k: (abs(y(q) - y(k)) <= radius) & (abs(x(q) - x(k)) <= radius))

Attention visits only those tiles of queries by keys in which some pair is visible, so the order of the pixels matters.
Row by row, a tile of queries is a piece of a row, whose neighbourhood is spread over many tiles of keys. In blocks of
8 x 16 pixels a tile is compact, and so is what it sees. The picture is the same, and the order of fewest tiles is used.

    python examples/05_windowed_denoising.py             # the whole picture on a GPU, its centre on a CPU
    python examples/05_windowed_denoising.py --crop 0 --radius 15
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import track

import cuflash
from cuflash import io_model, masks
from cuflash.plan.arch import arch_named
from cuflash.plan.traffic import all_query_tiles, forward_traffic

photo = importlib.import_module("01_denoise_photo")  # beside this file

PATCH = 5  # side of a patch in pixels
FEATURES = 10  # patches are compared by their leading principal components, which carry less noise (Tasdizen 2009)
BANDWIDTH = 8.0  # h² in units of sigma²
CPU_CROP = 192  # side of the square that a CPU denoises by default
PLOTTED = 64  # side of the square whose tiles are drawn


class Order(NamedTuple):
    """The pixels as tokens, and which token sees which."""

    name: str
    pixels: np.ndarray  # (tokens,) index of each token's pixel, row by row; tokens past the edge repeat it
    real: np.ndarray  # (tokens,) whether it is a pixel and not past the edge
    mask: masks.Mask | None


def order_of(height: int, width: int, radius: int, rows: int, columns: int) -> Order:
    """Pixels in blocks of rows x columns, block after block, row by row in each; hidden ones fill the last blocks."""
    across = -(-width // columns)

    def place(token: Any) -> tuple[Any, Any]:
        """The row and the column of a token: of an array of them, or of an index of a mask."""
        block, inner = token // (rows * columns), token % (rows * columns)
        return block // across * rows + inner // columns, block % across * columns + inner % columns

    def near(batch: Any, head: Any, q: Any, k: Any) -> Any:
        (q_y, q_x), (k_y, k_x) = place(q), place(k)
        return (abs(q_y - k_y) <= radius) & (abs(q_x - k_x) <= radius) & (k_y < height) & (k_x < width)

    y, x = place(np.arange(-(-height // rows) * rows * across * columns))
    pixels = np.minimum(y, height - 1) * width + np.minimum(x, width - 1)
    name = "pixels row by row" if columns == width else f"pixels in blocks of {rows} x {columns}"
    return Order(name, pixels, (y < height) & (x < width), masks.where(near))


def main() -> None:
    args = parse_arguments()
    device = photo.pick_device(args.device)
    clean = photo.load_picture(args.image, args.crop if args.crop is not None else CPU_CROP if device == "cpu" else 0)
    height, width, _ = clean.shape
    sigma = args.sigma / 255
    noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)
    dtype = np.float32 if device == "cpu" else np.float16
    features, values, mean = features_of(noisy, dtype)
    h2 = BANDWIDTH * sigma**2
    print(f"{args.image}, {width} x {height} pixels, noise sigma {args.sigma:g}/255, on {device}")
    print(f"each sees the pixels at most {args.radius} rows and columns away")

    orders = [order_of(height, width, args.radius, *block) for block in ((1, width), (8, 8), (8, 16))]
    tiles = print_tiles(orders, features, values)
    order = orders[int(np.argmin(tiles))]

    attend = on_device(features, values, h2, device)
    everything = orders[0]._replace(mask=None)
    _, dense_seconds = timed(lambda: attend(everything))
    _, first_seconds = timed(lambda: attend(order))
    (out, own), seconds = timed(lambda: attend(order))
    (direct, direct_own), direct_seconds = timed(lambda: by_shifts(features, values, clean.shape, args.radius, h2))
    print(f"\n{'seconds, attention to all pixels':44}{dense_seconds:10.3f}")
    print(f"{'seconds, attention to the neighbourhood':44}{seconds:10.3f}  ({first_seconds:.3f} the first time)")
    print(f"{'seconds, neighbour by neighbour in NumPy':44}{direct_seconds:10.3f}")

    denoised = picture_of(without_excess(out, own, values) + mean, clean.shape)
    expected = picture_of(without_excess(direct, direct_own, values) + mean, clean.shape)
    print(f"\n{'PSNR noisy':44}{photo.psnr(clean, noisy):10.3f} dB")
    print(f"{'PSNR neighbour by neighbour':44}{photo.psnr(clean, expected):10.3f} dB")
    print(f"{'PSNR attention to the neighbourhood':44}{photo.psnr(clean, denoised):10.3f} dB")
    print(f"{'largest difference of a pixel, of 255':44}{255 * np.abs(denoised - expected).max():10.1e}")
    write_picture(args.output, clean, noisy, denoised, args.radius)
    print(f"wrote {args.output}")


def features_of(noisy: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What patches are compared by, (pixels, FEATURES), the patches less their mean, and that mean."""
    border = (PATCH // 2, PATCH // 2)
    padded = np.pad(noisy, (border, border, (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (PATCH, PATCH), axis=(0, 1))
    patches = windows.reshape(noisy.shape[0] * noisy.shape[1], -1).astype(np.float32)
    mean = patches.mean(axis=0)
    patches -= mean
    _, axes = np.linalg.eigh(patches.T @ patches)
    return (patches @ axes[:, -FEATURES:]).astype(dtype), patches.astype(dtype), mean


def on_device(
    features: np.ndarray, values: np.ndarray, h2: float, device: str
) -> Callable[[Order], tuple[np.ndarray, np.ndarray]]:
    """Attention of the pixels in an order: their averages (pixels, head_dim_v) and weights of themselves (pixels,)."""
    to_device = to_host = np.asarray
    if device == "cuda":
        import cupy

        to_device, to_host = cupy.asarray, cupy.asnumpy
    norms = np.square(features, dtype=np.float32).sum(axis=1) / np.float32(h2)  # |p|²/h²

    def attend(order: Order) -> tuple[np.ndarray, np.ndarray]:
        q, v, bias = (to_device(x[order.pixels]) for x in (features, values, -norms))
        out, lse = cuflash.attention(q, q, v, mask=order.mask, scale=2 / h2, bias=bias, return_lse=True)
        averages = np.empty(values.shape, np.float32)
        own = np.empty(len(values), np.float32)
        pixels = order.pixels[order.real]
        averages[pixels] = to_host(out)[order.real]
        own[pixels] = np.exp(norms[pixels] - to_host(lse)[order.real])  # its score with itself is |p|²/h²
        return averages, own

    return attend


def by_shifts(
    features: np.ndarray, values: np.ndarray, shape: tuple[int, int, int], radius: int, h2: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same averages and weights by a loop over the neighbours: the picture against itself, shifted."""
    height, width, _ = shape
    p, v = (x.astype(np.float32).reshape(height, width, -1) for x in (features, values))
    total, mass = np.zeros_like(v), np.zeros((height, width, 1), np.float32)
    for dy in track(range(-radius, radius + 1), "shifts", transient=True, console=Console(stderr=True)):
        for dx in range(-radius, radius + 1):
            here, there = ((overlap(height, s * dy), overlap(width, s * dx)) for s in (1, -1))
            weights = np.exp(np.square(p[here] - p[there]).sum(axis=2, keepdims=True) * np.float32(-1 / h2))
            total[here] += weights * v[there]
            mass[here] += weights
    return (total / mass).reshape(values.shape), 1 / mass.reshape(-1)


def overlap(length: int, shift: int) -> slice:
    """Of 0 to length - 1 those i for which i + shift is among them, too."""
    return slice(max(0, -shift), max(0, length - max(0, shift)))


def without_excess(out: np.ndarray, own: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Averages in which a patch has the weight that its own noise deserves (01_denoise_photo.py says why)."""
    excess = (own * (1 - np.exp(-2 * FEATURES / BANDWIDTH)))[:, None]
    return (out - excess * values) / (1 - excess)


def picture_of(patches: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The picture of which `patches` are estimates: each pixel is the mean of all the patches that cover it."""
    height, width, channels = shape
    patches = patches.reshape(height, width, channels, PATCH, PATCH)
    total = np.zeros((height + PATCH - 1, width + PATCH - 1, channels))
    count = np.zeros((height + PATCH - 1, width + PATCH - 1, 1))
    for y in range(PATCH):
        for x in range(PATCH):
            total[y : y + height, x : x + width] += patches[..., y, x]
            count[y : y + height, x : x + width] += 1
    border = PATCH // 2
    return (total / count)[border : border + height, border : border + width].clip(0, 1)


def print_tiles(orders: list[Order], features: np.ndarray, values: np.ndarray) -> list[int]:
    """Tiles that the kernel visits, and bytes that it asks of memory: of dense attention, and of each order."""
    print(f"\n{'tiles of queries x keys that are visited':44}{'tiles':>10}{'share':>9}{'traffic':>14}")
    counts = []
    for order in [orders[0]._replace(name="all pixels seen", mask=None), *orders]:
        tiles, traffic = visited(order, features, values)
        counts.append(tiles)
        print(f"{'tiles, ' + order.name:44}{tiles:10}{tiles / counts[0]:9.2%}{traffic / 1e9:11.3f} GB")
    return counts[1:]


def visited(order: Order, features: np.ndarray, values: np.ndarray) -> tuple[int, int]:
    """What a kernel of sm_80 visits and, exactly, what it reads and writes."""
    tokens = len(order.pixels)
    q_shape, v_shape = ((tokens, x.shape[1]) for x in (features, values))
    bias = {"bias_shape": (tokens,), "bias_dtype": "float32"}
    dtype = features.dtype.name
    problem = io_model.problem_of_shapes(q_shape, q_shape, v_shape, dtype=dtype, mask=order.mask, **bias)
    plan = io_model.plan_contiguous(problem, arch_named("sm_80"))
    tiles = sum(tile.key_tiles for tile, _ in all_query_tiles(problem, plan.forward.config))
    launches = forward_traffic(problem, plan, return_lse=True)
    return tiles, sum(sum(launch.read.values()) + sum(launch.written.values()) for launch in launches)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def write_picture(path: str, clean: np.ndarray, noisy: np.ndarray, denoised: np.ndarray, radius: int) -> None:
    """The pictures, and which tiles the two orders visit, for a small square of pixels."""
    figure, axes = plt.subplots(1, 5, figsize=(20, 4.4), layout="constrained")
    titles = (
        f"noisy, {photo.psnr(clean, noisy):.1f} dB",
        f"denoised, {photo.psnr(clean, denoised):.1f} dB",
        "original",
    )
    for panel, picture, title in zip(axes, (noisy, denoised, clean), titles, strict=False):
        panel.imshow(picture.clip(0, 1), interpolation="nearest")
        panel.set_title(title)
        panel.axis("off")
    for panel, block in zip(axes[3:], ((1, PLOTTED), (8, 16)), strict=True):
        order = order_of(PLOTTED, PLOTTED, radius, *block)
        order.mask.plot(PLOTTED**2, ax=panel).get_legend().remove()
        panel.set_title(f"tiles of {PLOTTED} x {PLOTTED} {order.name}")
    figure.savefig(path, dpi=90)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Denoise a photograph by attention to a neighbourhood of each pixel.")
    parser.add_argument("--image", default="chelsea", help=f"{', '.join(photo.SHIPPED)} (scikit-image's) or a file")
    parser.add_argument("--crop", type=int, help=f"side of the central square, 0 for all; on a CPU {CPU_CROP}")
    parser.add_argument("--sigma", type=float, default=25.0, help="standard deviation of the noise, of 255")
    parser.add_argument("--radius", type=int, default=11, help="rows and columns that a pixel sees on each side")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", default="windowed.png", help="picture to write")
    args = parser.parse_args()
    if args.sigma <= 0:
        parser.error(f"--sigma {args.sigma}: must be > 0")
    if args.radius < 1:
        parser.error(f"--radius {args.radius}: must be at least 1")
    if args.crop is not None and args.crop != 0 and args.crop < 16:
        parser.error(f"--crop {args.crop}: must be 0 or at least 16")
    return args


if __name__ == "__main__":
    main()
