"""Gaussian kernel regression (Nadaraya 1964, Watson 1964) as exact attention, on measured depth.

From n samples (x_j, y_j), the regression and the kernel density at a query x are

    y(x) = sum_j K(x - x_j) y_j / sum_j K(x - x_j),   f(x) = sum_j K(x - x_j) / (n (2 pi)^(d/2) h^d),

with K(u) = exp(-|u|²/2h²). Expanding |x - x_j|² makes y attention, and its lse the logarithm of the kernel sum:

    q = x,   k = x_j,   v = y_j,   scale = 1/h²,   bias_j = -|x_j|²/2h²,
    log sum_j K(x - x_j) = lse - |x|²/2h².

The data are disparities (the inverse of depth) of a motorcycle, measured by structured light (Scharstein et al. 2014),
which ship with scikit-image. They are known at scattered pixels only; the regression fills the picture.

    python examples/02_kernel_regression.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import skimage
from rich.console import Console
from rich.progress import track

import cuflash

BANDWIDTHS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)  # of standardised positions; 0.01 is about 2 pixels
TRAIN, TEST = 6000, 2000
STRIDE = 3  # of the pixels in the filled picture


def main() -> None:
    parser = argparse.ArgumentParser(description="Gaussian kernel regression as exact attention.")
    parser.add_argument("--output", default="regression.png", help="picture to write")
    args = parser.parse_args()

    photo, _, disparity = skimage.data.stereo_motorcycle()
    known = np.argwhere(np.isfinite(disparity))  # (measurements, 2), as row and column
    pixels = np.random.default_rng(0).permutation(known)[: TRAIN + TEST]
    centre, spread = pixels[:TRAIN].mean(axis=0), pixels[:TRAIN].std(axis=0)
    x = (pixels - centre) / spread
    y = disparity[tuple(pixels.T)].astype(np.float64)[:, None]
    x_train, y_train, x_test, y_test = x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]

    errors = {h: leave_one_out_error(x_train, y_train, h) for h in with_bar(BANDWIDTHS, "choosing the bandwidth")}
    h = min(errors, key=errors.__getitem__)
    for candidate, error in errors.items():
        print(f"h = {candidate:4.2f}   leave-one-out RMSE {error:6.3f}{'   <- chosen' if candidate == h else ''}")

    predicted, log_sum = kernel_regression(x_test, x_train, y_train, h)
    direct, direct_log_sum = direct_regression(x_test, x_train, y_train, h)
    print(f"largest difference from the direct sums, regression  {np.abs(predicted - direct).max():.1e}")
    print(f"largest difference from the direct sums, log density {np.abs(log_sum - direct_log_sum).max():.1e}")
    print(f"RMSE on {TEST} held-out measurements {rmse(predicted, y_test):6.3f}")
    print(f"RMSE of the training mean            {rmse(y_train.mean(), y_test):6.3f}")
    print(f"R²                                   {1 - (rmse(predicted, y_test) / y_test.std()) ** 2:6.3f}")

    grid = np.stack(np.mgrid[: photo.shape[0] : STRIDE, : photo.shape[1] : STRIDE], axis=-1)  # (rows, columns, 2)
    start = time.perf_counter()
    parts = np.array_split(((grid - centre) / spread).reshape(-1, 2), 16)
    results = [kernel_regression(part, x_train, y_train, h) for part in with_bar(parts, "filling the picture")]
    filled, log_sum = (np.concatenate(each).reshape(grid.shape[:2]) for each in zip(*results, strict=True))
    log_density = log_sum - np.log(TRAIN * 2 * np.pi * h**2)
    print(f"{log_sum.size:,} pixels from {TRAIN:,} measurements in {time.perf_counter() - start:.1f} s")
    write_picture(args.output, photo, pixels[:TRAIN], y_train, filled, log_density)
    print(f"wrote {args.output}")


def kernel_regression(x: np.ndarray, samples: np.ndarray, y: np.ndarray, h: float) -> tuple[np.ndarray, np.ndarray]:
    """Regression, (queries, targets), and log sum_j K(x - x_j), (queries,).

    x is (queries, d), samples (n, d) and y (n, targets).
    """
    bias = -np.square(samples).sum(axis=1) / (2 * h**2)
    out, lse = cuflash.attention(x, samples, y, scale=1 / h**2, bias=bias, return_lse=True)
    return out, lse - np.square(x).sum(axis=1) / (2 * h**2)


def leave_one_out_error(x: np.ndarray, y: np.ndarray, h: float) -> float:
    """RMSE of predicting each sample from all the others, from one regression on all of them.

    A sample's weight in its own prediction is w = K(0) / sum_j K(x - x_j), and leaving it out divides the residual by
    1 - w. A sample that no other reaches, w = 1, is predicted by the mean.
    """
    out, log_sum = kernel_regression(x, x, y, h)
    others = -np.expm1(-log_sum)[:, None]
    residual = np.where(others > 1e-9, (y - out) / np.maximum(others, 1e-9), y - y.mean())
    return float(np.sqrt(np.mean(residual**2)))


def direct_regression(x: np.ndarray, samples: np.ndarray, y: np.ndarray, h: float) -> tuple[np.ndarray, np.ndarray]:
    """The same as kernel_regression through the full matrix of kernel values, (queries, n), as the sums are written."""
    exponent = -np.square(x[:, None] - samples).sum(axis=2) / (2 * h**2)
    largest = exponent.max(axis=1, keepdims=True)
    kernel = np.exp(exponent - largest)
    total = kernel.sum(axis=1, keepdims=True)
    return kernel @ y / total, (largest + np.log(total))[:, 0]


def with_bar(items: Iterable, description: str) -> Iterable:
    return track(items, description, transient=True, console=Console(stderr=True))


def rmse(predicted: np.ndarray | float, measured: np.ndarray) -> float:
    return float(np.sqrt(np.mean((predicted - measured) ** 2)))


def write_picture(
    path: str, photo: np.ndarray, pixels: np.ndarray, y: np.ndarray, filled: np.ndarray, log_density: np.ndarray
) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    extent = (0, photo.shape[1], photo.shape[0], 0)
    scale = {"vmin": y.min(), "vmax": y.max(), "cmap": "viridis"}
    axes[0].imshow(photo, extent=extent)
    axes[0].scatter(pixels[:, 1], pixels[:, 0], c=y[:, 0], s=0.8, **scale)
    axes[0].set_title(f"{len(pixels):,} measured disparities")
    surface = axes[1].imshow(filled, extent=extent, **scale)
    axes[1].set_title("kernel regression: the attention output")
    figure.colorbar(surface, ax=axes[:2], label="disparity (pixels)", shrink=0.9)
    density = axes[2].imshow(log_density, extent=extent, cmap="magma", vmin=-6)
    axes[2].set_title("log density of measurements: the lse")
    figure.colorbar(density, ax=axes[2], shrink=0.9)
    for panel in axes:
        panel.axis("off")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
