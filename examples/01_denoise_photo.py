"""Denoise a photograph with non-local means, computed as exact attention.

Every pixel is replaced by an average over the whole picture, weighted by how much the patches around two pixels look
alike (Buades, Coll and Morel 2005): the patch at i becomes sum_j w_ij patch_j, w_ij ~ exp(-|p_i - p_j|²/h²).
Since |p_i - p_j|² = |p_i|² - 2 p_i·p_j + |p_j|² and the softmax over j drops |p_i|², that is attention with

    q = k = p,   v = patches,   scale = 2/h²,   bias_j = -|p_j|²/h².

All pairs of pixels take part: 135,300² of them for the default picture, none of which is ever stored.

    python examples/01_denoise_photo.py                      # the whole picture on a GPU, its centre on a CPU
    python examples/01_denoise_photo.py --image my.jpg --crop 256 --sigma 40
"""

from __future__ import annotations

import argparse
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import skimage
from rich.console import Console
from rich.progress import track
from skimage.restoration import denoise_nl_means

import cuflash

FEATURES = 10  # patches are compared by their leading principal components, which carry less noise (Tasdizen 2009)
BANDWIDTH = 8.0  # h² in units of sigma²
CPU_CROP = 192  # side of the square that a CPU denoises by default
SHIPPED = ("astronaut", "chelsea", "coffee")  # photographs inside scikit-image's wheel
CHUNK = {"cpu": 4096, "cuda": 32768}  # queries per call: one step of the progress bar


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    clean = load_picture(args.image, args.crop if args.crop is not None else CPU_CROP if device == "cpu" else 0)
    sigma = args.sigma / 255
    noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape, dtype=np.float32)

    start = time.perf_counter()
    denoised = non_local_means(noisy, sigma, args.patch, device)
    seconds = time.perf_counter() - start

    height, width, _ = clean.shape
    print(f"{args.image}, {width} x {height} pixels, noise sigma {args.sigma:g}/255, on {device}")
    print(f"every patch attended to all {height * width:,} patches in {seconds:.1f} s")
    windowed = denoise_nl_means(
        noisy, patch_size=args.patch, patch_distance=11, h=0.6 * sigma, sigma=sigma, fast_mode=True, channel_axis=-1
    )
    print(f"PSNR noisy                                  {psnr(clean, noisy):6.2f} dB")
    print(f"PSNR scikit-image, within 11 pixels         {psnr(clean, windowed):6.2f} dB")
    print(f"PSNR denoised by attention to all patches   {psnr(clean, denoised):6.2f} dB")
    write_picture(args.output, clean, noisy, denoised)
    print(f"wrote {args.output}")


def non_local_means(noisy: np.ndarray, sigma: float, patch: int, device: str) -> np.ndarray:
    """Denoise `noisy` (height, width, channels); sigma is the noise's standard deviation, in units of the picture."""
    patches = patches_of(noisy, patch)  # (pixels, channels * patch²)
    mean = patches.mean(axis=0)
    patches -= mean
    _, axes = np.linalg.eigh(patches.T @ patches)
    features = patches @ axes[:, -FEATURES:]  # (pixels, FEATURES)

    dtype = np.float32 if device == "cpu" else np.float16
    features, values = features.astype(dtype), patches.astype(dtype)
    h2 = BANDWIDTH * sigma**2
    norms = np.square(features, dtype=np.float32).sum(axis=1) / np.float32(h2)  # |p|²/h², of the features as rounded
    out, lse = attend_to_all(features, values, scale=2 / h2, bias=-norms, device=device)

    # A patch resembles itself more than it should: it shares its own noise, which even a perfect twin does not. The
    # expected distance to a twin, 2 sigma² per feature, sets the weight that it deserves. Its score with itself is
    # 2|p|²/h² - |p|²/h² = |p|²/h², so its weight in `out` is exp(|p|²/h² - lse).
    own = np.exp(norms - lse)
    twin = np.exp(-2 * features.shape[1] / BANDWIDTH)
    excess = (own * (1 - twin))[:, None]
    out = (out - excess * patches) / (1 - excess)
    return picture_of(out + mean, noisy.shape, patch).clip(0, 1)


def attend_to_all(
    features: np.ndarray, values: np.ndarray, scale: float, bias: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of all pixels to all pixels, (pixels, head_dim_v), and its lse, (pixels,); as float32 NumPy arrays."""
    to_device = to_host = np.asarray
    if device == "cuda":
        import cupy

        to_device, to_host = cupy.asarray, cupy.asnumpy
    q, v, bias = to_device(features), to_device(values), to_device(bias)
    out = np.empty(values.shape, np.float32)
    lse = np.empty(len(values), np.float32)
    starts = range(0, len(out), CHUNK[device])
    for i in track(starts, "attention", transient=True, console=Console(stderr=True)):
        rows = slice(i, i + CHUNK[device])
        out_rows, lse_rows = cuflash.attention(q[rows], q, v, scale=scale, bias=bias, return_lse=True)
        out[rows], lse[rows] = to_host(out_rows), to_host(lse_rows)
    return out, lse


def patches_of(picture: np.ndarray, size: int) -> np.ndarray:
    """The size x size patch around every pixel, (height * width, channels * size²)."""
    border = (size // 2, size // 2)
    padded = np.pad(picture, (border, border, (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))
    return windows.reshape(picture.shape[0] * picture.shape[1], -1).astype(np.float32)


def picture_of(patches: np.ndarray, shape: tuple[int, int, int], size: int) -> np.ndarray:
    """The picture of which `patches` are estimates: each pixel is the mean of all the patches that cover it."""
    height, width, channels = shape
    patches = patches.reshape(height, width, channels, size, size)
    total = np.zeros((height + size - 1, width + size - 1, channels))
    count = np.zeros((height + size - 1, width + size - 1, 1))
    for y in range(size):
        for x in range(size):
            total[y : y + height, x : x + width] += patches[..., y, x]
            count[y : y + height, x : x + width] += 1
    border = size // 2
    return (total / count)[border : border + height, border : border + width]


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 1."""
    return float(-10 * np.log10(np.mean((clean - other) ** 2)))


def load_picture(name: str, crop: int) -> np.ndarray:
    """A colour picture as float32 in [0, 1]; its central square of side `crop` unless that is 0."""
    picture = getattr(skimage.data, name)() if name in SHIPPED else skimage.io.imread(name)
    if picture.ndim == 2:
        picture = skimage.color.gray2rgb(picture)
    picture = skimage.util.img_as_float32(picture[..., :3])
    height, width, _ = picture.shape
    side_y, side_x = min(crop or height, height), min(crop or width, width)
    top, left = (height - side_y) // 2, (width - side_x) // 2
    return picture[top : top + side_y, left : left + side_x]


def pick_device(name: str) -> str:
    """`name`, or for "auto" whether CuPy finds a GPU that the kernels run on (compute capability 8.0 or newer)."""
    if name != "auto":
        return name
    try:
        import cupy
    except ImportError:
        return "cpu"
    return "cuda" if cupy.cuda.is_available() and int(cupy.cuda.Device().compute_capability) >= 80 else "cpu"


def write_picture(path: str, clean: np.ndarray, noisy: np.ndarray, denoised: np.ndarray) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4 * clean.shape[0] / clean.shape[1] + 0.3), layout="constrained")
    titles = (f"noisy, {psnr(clean, noisy):.1f} dB", f"denoised, {psnr(clean, denoised):.1f} dB", "original")
    for panel, picture, title in zip(axes, (noisy, denoised, clean), titles, strict=True):
        panel.imshow(picture.clip(0, 1), interpolation="nearest")
        panel.set_title(title)
        panel.axis("off")
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Denoise a photograph with non-local means as exact attention.")
    parser.add_argument("--image", default="chelsea", help=f"{', '.join(SHIPPED)} (scikit-image's) or a file")
    parser.add_argument("--crop", type=int, help=f"side of the central square, 0 for all; on a CPU {CPU_CROP}")
    parser.add_argument("--sigma", type=float, default=25.0, help="standard deviation of the noise, of 255")
    parser.add_argument("--patch", type=int, default=5, choices=(3, 5, 7, 9), help="side of a patch in pixels")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", default="denoised.png", help="side-by-side picture to write")
    args = parser.parse_args()
    if args.sigma <= 0:
        parser.error(f"--sigma {args.sigma}: must be > 0")
    if args.crop is not None and args.crop != 0 and args.crop < 16:
        parser.error(f"--crop {args.crop}: must be 0 or at least 16")
    return args


if __name__ == "__main__":
    main()
