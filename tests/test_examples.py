"""The examples as a reader runs them: in a process of their own, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import matplotlib.image
import numpy as np
import pytest

import cuflash

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run_example(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def load_example(name: str) -> ModuleType:
    """The module, without running it."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]):  # examples use each other
        spec.loader.exec_module(module)
    return module


def printed(result: subprocess.CompletedProcess[str], label: str) -> float:
    """The number that follows `label` on a printed line."""
    assert result.returncode == 0, result.stderr
    match = re.search(rf"^{re.escape(label)}\s+(-?[\d.]+(?:e[-+]\d+)?)", result.stdout, re.MULTILINE)
    assert match, f"no line {label!r} in:\n{result.stdout}"
    return float(match[1])


def check_picture(path: Path, panels: int) -> None:
    """It decodes, is wide, and each panel shows something."""
    picture = matplotlib.image.imread(path)[..., :3]
    height, width, _ = picture.shape
    assert width > 1.5 * height
    for panel in np.array_split(picture, panels, axis=1):
        assert panel.std() > 0.05


@pytest.mark.parametrize(("image", "gain"), [("chelsea", 9.0), ("astronaut", 8.0), ("coffee", 9.0)])
def test_denoising_beats_windowed_non_local_means(tmp_path: Path, image: str, gain: float) -> None:
    result = run_example("01_denoise_photo.py", tmp_path, "--device", "cpu", "--crop", "64", "--image", image)
    noisy = printed(result, "PSNR noisy")
    denoised = printed(result, "PSNR denoised by attention to all patches")
    assert 20.0 < noisy < 20.4  # 20 log10(255 / 25) = 20.17
    assert denoised > noisy + gain
    assert denoised > printed(result, "PSNR scikit-image, within 11 pixels")
    check_picture(tmp_path / "denoised.png", panels=3)


def test_denoising_takes_a_file(tmp_path: Path) -> None:
    columns = np.linspace(0.2, 0.8, 48)
    matplotlib.image.imsave(tmp_path / "ramp.png", np.broadcast_to(columns, (40, 48)), cmap="gray", vmin=0, vmax=1)
    result = run_example("01_denoise_photo.py", tmp_path, "--device", "cpu", "--image", "ramp.png", "--output", "o.png")
    assert "ramp.png, 48 x 40 pixels" in result.stdout
    assert printed(result, "PSNR denoised by attention to all patches") > printed(result, "PSNR noisy") + 9
    check_picture(tmp_path / "o.png", panels=3)


def test_denoising_in_float16_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the example does on a GPU, on an emulated one: a host stands in for CuPy's memory."""
    example = load_example("01_denoise_photo.py")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray))
    clean = example.load_picture("chelsea", crop=24)
    noisy = clean + np.random.default_rng(0).normal(0, 0.1, clean.shape).astype(np.float32)
    in_float32 = example.non_local_means(noisy, 0.1, 5, "cpu")
    with cuflash.emulate("sm_80") as device:
        in_float16 = example.non_local_means(noisy, 0.1, 5, "cuda")
    assert device.launches
    assert np.abs(in_float16 - in_float32).max() < 2 / 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sigma", "0"), "--sigma 0.0: must be > 0"),
        (("--crop", "4"), "--crop 4: must be 0 or at least 16"),
        (("--patch", "4"), "invalid choice: 4"),
    ],
)
def test_denoising_refuses(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_example("01_denoise_photo.py", tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_kernel_regression(tmp_path: Path) -> None:
    result = run_example("02_kernel_regression.py", tmp_path)
    assert "h = 0.03" in next(line for line in result.stdout.splitlines() if "<- chosen" in line)
    assert printed(result, "largest difference from the direct sums, regression") < 1e-10  # of values to 60, float64
    assert printed(result, "largest difference from the direct sums, log density") < 1e-10
    assert printed(result, "R²") > 0.93
    assert printed(result, "RMSE on 2000 held-out measurements") < 0.3 * printed(result, "RMSE of the training mean")
    check_picture(tmp_path / "regression.png", panels=3)


def test_a_language_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tests run side by side
    result = run_example("03_train_language_model.py", tmp_path, "--device", "cpu", "--steps", "30")
    assert printed(result, "  the model") < printed(result, "  frequencies of characters") - 0.2
    assert re.search(r"\n\nThe (.|\n){400,}\n\nwrote loss.png and language_model.npz\n", result.stdout)
    with np.load(tmp_path / "language_model.npz") as weights:
        assert weights["head"].shape[1] == len(str(weights["vocabulary"]))
        assert all(np.isfinite(weights[name]).all() for name in weights if name != "vocabulary")
    picture = matplotlib.image.imread(tmp_path / "loss.png")[..., :3]
    assert picture.shape[1] > 1.5 * picture.shape[0]
    assert picture.std() > 0.05


def test_gradients_of_the_language_model() -> None:
    """Along a random direction of each parameter, against finite differences."""
    model = load_example("03_train_language_model.py")
    rng = np.random.default_rng(0)
    parameters = {n: p + 0.1 * rng.standard_normal(p.shape) for n, p in model.initial_parameters(11).items()}
    tokens, targets = rng.integers(11, size=(2, 2, 8))

    def loss(name: str, change: np.ndarray) -> float:
        logits, _ = model.gpt(parameters | {name: parameters[name] + change}, tokens)
        return model.cross_entropy(logits, targets)[0]

    logits, pullback = model.gpt(parameters, tokens)
    _, gradients = pullback(model.cross_entropy(logits, targets)[1])
    assert set(gradients) == set(parameters)
    for name, gradient in gradients.items():
        change = 1e-5 * rng.standard_normal(gradient.shape)
        difference = (loss(name, change) - loss(name, -change)) / 2
        np.testing.assert_allclose((gradient * change).sum(), difference, rtol=1e-5, atol=1e-11, err_msg=name)


def test_language_model_refuses(tmp_path: Path) -> None:
    result = run_example("03_train_language_model.py", tmp_path, "--steps", "0")
    assert result.returncode == 2
    assert "--steps 0: must be at least 1" in result.stderr
    assert not list(tmp_path.iterdir())


def differences(result: subprocess.CompletedProcess[str]) -> dict[str, list[float]]:
    """The rows of the table of the frameworks."""
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(torch|JAX|JAX, in jit) +((?:\d\S*\s*?){4})$", result.stdout, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def test_gradients_in_torch_and_jax(tmp_path: Path) -> None:
    rows = differences(run_example("04_torch_and_jax.py", tmp_path))
    assert list(rows) == ["torch", "JAX", "JAX, in jit"]
    for numbers in rows.values():
        assert len(numbers) == 4
        assert 0 < max(numbers) < 1e-5


@pytest.mark.parametrize(("absent", "left"), [("torch", ["JAX", "JAX, in jit"]), ("jax", ["torch"])])
def test_one_framework_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str, left: list[str]) -> None:
    (tmp_path / f"{absent}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_example("04_torch_and_jax.py", tmp_path)
    assert list(differences(result)) == left
    assert f"\n{'JAX' if absent == 'jax' else absent} is not installed\n" in result.stdout


def test_torch_adapter() -> None:
    import torch

    attention = load_example("04_torch_and_jax.py").torch_attention
    shapes = (2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2), (4, 1, 6)
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, causal=True, softcap=2.0), (q, k, v, bias))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, window=(2, 1)), (q, k, v))

    compiled = torch.compile(lambda q: 3 * attention(q + 1, k, v), backend="aot_eager")
    expected, *_ = torch.autograd.grad(3 * attention(q + 1, k, v).sum(), q)
    torch.testing.assert_close(torch.autograd.grad(compiled(q).sum(), q)[0], expected)

    for written in ("q", "out"):
        moved = q + 1
        out = attention(moved, k, v)
        {"q": moved, "out": out}[written].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_jax_adapter() -> None:
    import jax

    attention = load_example("04_torch_and_jax.py").jax_attention
    rng = np.random.default_rng(0)
    shapes = (2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2), (4, 1, 6)
    q, k, v, bias = (jax.numpy.asarray(rng.standard_normal(shape), "float32") for shape in shapes)

    def loss(*arrays: jax.Array) -> jax.Array:
        return (attention(*arrays, window=(2, 1), softcap=2.0) ** 2).sum()

    for arrays in ((q, k, v), (q, k, v, bias)):
        gradient = jax.grad(loss, range(len(arrays)))
        for eager, jitted in zip(gradient(*arrays), jax.jit(gradient)(*arrays), strict=True):
            np.testing.assert_array_equal(eager, jitted)
    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, 0, 0, None)))(q, k, v, bias)  # in sequences of their own
    np.testing.assert_allclose(mapped, jax.grad(loss)(q, k, v, bias), rtol=1e-6)


def test_windowed_denoising(tmp_path: Path) -> None:
    result = run_example("05_windowed_denoising.py", tmp_path, "--device", "cpu", "--crop", "64", "--radius", "6")
    noisy = printed(result, "PSNR noisy")
    attention = printed(result, "PSNR attention to the neighbourhood")
    assert 20.0 < noisy < 20.4
    assert attention > noisy + 6
    assert abs(attention - printed(result, "PSNR neighbour by neighbour")) < 2e-3
    assert printed(result, "largest difference of a pixel, of 255") < 0.05
    tiles = {name: printed(result, f"tiles, pixels {name}") for name in ("row by row", "in blocks of 8 x 16")}
    assert tiles["in blocks of 8 x 16"] < tiles["row by row"] < printed(result, "tiles, all pixels seen")
    check_picture(tmp_path / "windowed.png", panels=5)


def test_windowed_denoising_in_float16_on_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On ragged sides, so that blocks stand out past the edges; a host stands in for CuPy's memory."""
    example = load_example("05_windowed_denoising.py")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray))
    noisy = example.photo.load_picture("chelsea", crop=24)[:21, :19]
    features, values, _ = example.features_of(noisy, np.float16)
    direct, own = example.by_shifts(features, values, noisy.shape, 3, 0.05)
    attend = example.on_device(features, values, 0.05, "cuda")
    with cuflash.emulate("sm_80"):
        for block in ((1, 19), (8, 8), (8, 16)):
            out, weights = attend(example.order_of(21, 19, 3, *block))
            assert np.abs(out - direct).max() < 2 / 255
            assert np.abs(weights / own - 1).max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sigma", "-1"), "--sigma -1.0: must be > 0"),
        (("--radius", "0"), "--radius 0: must be at least 1"),
        (("--crop", "4"), "--crop 4: must be 0 or at least 16"),
    ],
)
def test_windowed_denoising_refuses(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_example("05_windowed_denoising.py", tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_long_sequences(tmp_path: Path) -> None:
    result = run_example("06_long_sequences.py", tmp_path, "--device", "cpu", "--lengths", "2048", "512", "1024")
    assert result.returncode == 0, result.stderr
    for name in ("window", "butterfly", "hash", "kept"):
        assert printed(result, f"speedup at the longest, {name}") > 0
        assert re.search(rf"^crossover, {name} +(below |above |)[\d,]+ tokens$", result.stdout, re.MULTILINE)
    rows = re.findall(r"^ +(512|1,024|2,048)((?: +\d+\.\d+){5})$", result.stdout, re.MULTILINE)
    assert [length for length, _ in rows] == 2 * ["512", "1,024", "2,048"]
    check_picture(tmp_path / "long_sequences.png", panels=2)


def test_crossover() -> None:
    crossover = load_example("06_long_sequences.py").crossover
    assert crossover([256, 512, 1024], [1.0, 4.0, 16.0], [2.0, 4.0, 8.0]).split() == ["512", "tokens"]
    assert crossover([256, 1024], [1.0, 16.0], [2.0, 8.0]).split() == ["512", "tokens"]
    assert crossover([256, 512], [1.0, 4.0], [0.5, 1.0]) == "below 256 tokens"
    assert crossover([256, 512], [1.0, 4.0], [0.5, 5.0]) == "above 512 tokens"


def test_long_sequences_refuses(tmp_path: Path) -> None:
    result = run_example("06_long_sequences.py", tmp_path, "--lengths", "0", "64")
    assert result.returncode == 2
    assert "--lengths 0: must be at least 1" in result.stderr
    assert not list(tmp_path.iterdir())


def test_generated_text(tmp_path: Path) -> None:
    """With a cache and without, the same; the example ends with an error where they differ."""
    result = run_example("07_generate_text.py", tmp_path, "--device", "cpu", "--steps", "3", "--length", "56")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the same text") == 3
    in_use = [int(n) for n in re.findall(r"at most (\d+) blocks in use", result.stdout)]
    reserved = [int(n) for n in re.findall(r"reserved for each it were (\d+)", result.stdout)]
    assert len(in_use) == len(reserved) == 3
    assert in_use[0] < reserved[0]
    assert in_use[1] < reserved[1]
    assert re.search(r", [1-9]\d* found,", result.stdout)  # prompts that begin alike
    assert (tmp_path / "blocks.png").stat().st_size > 10_000


@pytest.mark.parametrize(("option", "message"), [("--length", "must be 48 to 128"), ("--steps", "must be at least 1")])
def test_generated_text_refuses(tmp_path: Path, option: str, message: str) -> None:
    result = run_example("07_generate_text.py", tmp_path, option, "0")
    assert result.returncode == 2
    assert f"{option} 0: {message}" in result.stderr
    assert not list(tmp_path.iterdir())


def test_every_example_is_run_here() -> None:
    assert EXAMPLES == [
        "01_denoise_photo.py",
        "02_kernel_regression.py",
        "03_train_language_model.py",
        "04_torch_and_jax.py",
        "05_windowed_denoising.py",
        "06_long_sequences.py",
        "07_generate_text.py",
    ]
