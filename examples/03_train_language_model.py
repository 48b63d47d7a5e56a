"""Train a small GPT in plain NumPy or CuPy: no framework, every gradient of attention from `cuflash.vjp`.

The text is Python's own documentation, `pydoc_data.topics`, which ships with Python. The model predicts each character
from those before it (Radford et al. 2018), with rotary positions (Su et al. 2021) and AdamW (Loshchilov and Hutter
2019). The yardsticks are the losses of knowing how frequent characters are, and how frequent pairs of them are.

A layer is a function of all parameters and its input, and returns its output and a pullback; that turns the gradient of
the output into the gradients of input and parameters. This is the convention of `cuflash.vjp`, so attention is a layer
as any other. NumPy's functions work on the arrays that they are given: the same lines run on a GPU.

    python examples/03_train_language_model.py              # on a GPU if CuPy finds one
    python examples/03_train_language_model.py --steps 100

It prints a sample of what the model writes, and saves the curve of the loss and the weights. Measured on one core of an
AMD EPYC (OMP_NUM_THREADS=1), the default run trains in 106 s to 1.27 nats per character of text it has not seen, where
the frequencies of characters give 3.17 and those of pairs 2.25.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import cuflash

LAYERS, WIDTH, HEADS = 4, 128, 4
BATCH, SEQLEN = 16, 128
VALIDATION = 8 * BATCH * SEQLEN  # predicted characters of the text that is held out
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1
BETAS = (0.9, 0.98)  # of AdamW's moving means of the gradient and of its square
SAMPLE, TEMPERATURE = 500, 0.7  # characters to write, and how boldly

Array = Any  # NumPy's or CuPy's
Arrays = dict[str, Array]  # parameters by name, or their gradients
Pullback = Callable[[Array], tuple[Array, Arrays]]  # from the gradient of the output to those of input and parameters
Layer = Callable[[Arrays, Array], tuple[Array, Pullback]]


def main() -> None:
    args = parse_arguments()
    xp = array_module(args.device)
    corpus = read_corpus()
    parameters = {name: xp.asarray(array) for name, array in initial_parameters(len(corpus.vocabulary)).items()}
    size = sum(array.size for array in parameters.values())
    print(f"{size:,} parameters, {len(corpus.training):,} characters, with {xp.__name__}")

    start = time.perf_counter()
    curve = train(parameters, xp.asarray(corpus.training), xp.asarray(corpus.validation), args.steps)
    print(f"{args.steps} steps of {BATCH * SEQLEN} characters in {time.perf_counter() - start:.1f} s")

    yardsticks = {"frequencies of characters": ngram_loss(corpus, 1), "frequencies of pairs": ngram_loss(corpus, 2)}
    print("loss on held-out text, nats per character")
    for name, loss in (*yardsticks.items(), ("the model", curve.validation[-1][1])):
        print(f"  {name:26}{loss:6.3f}")
    print("\n" + write_text(parameters, corpus.vocabulary, start="\n\nThe "))

    write_picture(args.output, curve, yardsticks)
    to_host = np.asarray if xp is np else xp.asnumpy
    weights = {name: to_host(array) for name, array in parameters.items()}
    np.savez(args.weights, vocabulary=corpus.vocabulary, heads=HEADS, **weights)
    print(f"\nwrote {args.output} and {args.weights}")


# The layers. B, T, C are batch, seqlen and channels; dy is the gradient of the loss with respect to y.


def embedding(name: str, parameters: Arrays, tokens: Array) -> tuple[Array, Pullback]:
    """y (B, T, C) = rows of the table (vocabulary, C) for tokens (B, T), which have no gradient."""
    table = parameters[name]

    def pullback(dy: Array) -> tuple[Array, Arrays]:
        one_hot = tokens.reshape(-1, 1) == np.arange(len(table), like=tokens)  # (B T, vocabulary)
        return None, {name: one_hot.T.astype(dy.dtype) @ rows(dy)}

    return table[tokens], pullback


def linear(name: str, parameters: Arrays, x: Array) -> tuple[Array, Pullback]:
    """y = x W; dx = dy Wᵀ, dW = xᵀ dy."""
    weight = parameters[name]

    def pullback(dy: Array) -> tuple[Array, Arrays]:
        return (rows(dy) @ weight.T).reshape(x.shape), {name: rows(x).T @ rows(dy)}

    return (rows(x) @ weight).reshape(*x.shape[:-1], -1), pullback


def layer_norm(name: str, parameters: Arrays, x: Array) -> tuple[Array, Pullback]:
    """y = g n, n = (x - mean x) / σ; dn = g dy, dx = (dn - mean dn - n mean(n dn)) / σ."""
    gain = parameters[name]
    centred = x - x.mean(axis=-1, keepdims=True)
    sigma = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    normal = centred / sigma

    def pullback(dy: Array) -> tuple[Array, Arrays]:
        dn = dy * gain
        dx = dn - dn.mean(axis=-1, keepdims=True) - normal * (normal * dn).mean(axis=-1, keepdims=True)
        return dx / sigma, {name: rows(normal * dy).sum(axis=0)}

    return normal * gain, pullback


def gelu(parameters: Arrays, x: Array) -> tuple[Array, Pullback]:
    """y = x s, s = sigmoid(1.702 x) (Hendrycks and Gimpel 2016); dx = dy (s + 1.702 x s (1 - s))."""
    s = 0.5 + 0.5 * np.tanh(0.851 * x)  # the sigmoid, without its overflow
    y = x * s

    def pullback(dy: Array) -> tuple[Array, Arrays]:
        return dy * (s + 1.702 * y * (1 - s)), {}

    return y, pullback


def attention(parameters: Arrays, qkv: Array) -> tuple[Array, Pullback]:
    """Causal attention of HEADS heads, of queries, keys and values side by side in qkv (B, T, 3 C); y is (B, T, C)."""
    batch, seqlen, _ = qkv.shape
    q, k, v = np.moveaxis(qkv.reshape(batch, seqlen, 3, HEADS, -1), 2, 0)  # views, (B, T, HEADS, head_dim)
    out, attention_pullback = cuflash.vjp(cuflash.attention, rotate(q, 1), rotate(k, 1), v, causal=True)

    def pullback(dy: Array) -> tuple[Array, Arrays]:
        dq, dk, dv = attention_pullback(dy.reshape(out.shape))
        return np.stack([rotate(dq, -1), rotate(dk, -1), dv], axis=2).reshape(qkv.shape), {}

    return out.reshape(batch, seqlen, -1), pullback


def rotate(x: Array, sign: int) -> Array:
    """Turn pairs of channels of x (B, T, heads, head_dim) by angles proportional to their position.

    Scores q·k of turned queries and keys depend on the distance of their positions. A rotation's gradient is turned by
    the opposite angle, sign = -1.
    """
    half = x.shape[-1] // 2
    angle = sign * np.arange(x.shape[1])[:, None, None] * 1e-4 ** (np.arange(half) / half)  # (T, 1, half)
    cos, sin = (np.asarray(f.astype(x.dtype), like=x) for f in (np.cos(angle), np.sin(angle)))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def chain(*layers: Layer) -> Layer:
    """One layer after the other."""

    def layer(parameters: Arrays, x: Array) -> tuple[Array, Pullback]:
        pullbacks = []
        for each in layers:
            x, each_pullback = each(parameters, x)
            pullbacks.append(each_pullback)

        def pullback(dx: Array) -> tuple[Array, Arrays]:
            gradients: Arrays = {}
            for each_pullback in reversed(pullbacks):
                dx, of_parameters = each_pullback(dx)
                gradients |= of_parameters
            return dx, gradients

        return x, pullback

    return layer


def residual(*layers: Layer) -> Layer:
    """y = x + f(x), f one layer after the other; dx = dy + f's dx."""
    f = chain(*layers)

    def layer(parameters: Arrays, x: Array) -> tuple[Array, Pullback]:
        y, f_pullback = f(parameters, x)

        def pullback(dy: Array) -> tuple[Array, Arrays]:
            dx, gradients = f_pullback(dy)
            return dy + dx, gradients

        return x + y, pullback

    return layer


def block(i: int) -> Layer:
    """Attention mixes positions, then a perceptron mixes channels (pre-norm: Xiong et al. 2020)."""
    norm1, qkv, out = partial(layer_norm, f"{i}.norm1"), partial(linear, f"{i}.qkv"), partial(linear, f"{i}.out")
    norm2, up, down = partial(layer_norm, f"{i}.norm2"), partial(linear, f"{i}.up"), partial(linear, f"{i}.down")
    return chain(residual(norm1, qkv, attention, out), residual(norm2, up, gelu, down))


# From tokens (B, T) to the logits of each next one, (B, T, vocabulary).
gpt = chain(
    partial(embedding, "embedding"), *map(block, range(LAYERS)), partial(layer_norm, "norm"), partial(linear, "head")
)


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The mean of -log softmax(logits)[target] and its gradient with respect to the logits."""
    log_p = logits - logits.max(axis=-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    loss = -np.take_along_axis(log_p, targets[..., None], axis=-1).mean()
    one_hot = targets[..., None] == np.arange(logits.shape[-1], like=targets)
    return loss, (np.exp(log_p) - one_hot) / targets.size


def rows(x: Array) -> Array:
    """All positions of x (B, T, C) as one matrix (B T, C)."""
    return x.reshape(-1, x.shape[-1])


def initial_parameters(vocabulary: int) -> dict[str, np.ndarray]:
    """Layers start at unit scale, residual branches smaller, the head at zero: all characters are equally likely."""
    rng = np.random.default_rng(0)

    def normal(inputs: int, outputs: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal((inputs, outputs)) * scale * inputs**-0.5

    c, branch = WIDTH, (2 * LAYERS) ** -0.5
    parameters = {"embedding": normal(vocabulary, c, vocabulary**0.5), "norm": np.ones(c)}
    for i in range(LAYERS):
        parameters |= {f"{i}.norm1": np.ones(c), f"{i}.qkv": normal(c, 3 * c), f"{i}.out": normal(c, c, branch)}
        parameters |= {f"{i}.norm2": np.ones(c), f"{i}.up": normal(c, 4 * c), f"{i}.down": normal(4 * c, c, branch)}
    parameters["head"] = np.zeros((c, vocabulary))
    return {name: array.astype(np.float32) for name, array in parameters.items()}


class AdamW:
    """Steps against the mean gradient in units of its root mean square, and shrinks matrices."""

    def __init__(self, parameters: Arrays) -> None:
        self.parameters, self.steps = parameters, 0
        self.mean = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.square = {name: np.zeros_like(array) for name, array in parameters.items()}

    def step(self, gradients: Arrays, learning_rate: float) -> None:
        self.steps += 1
        unbias_mean, unbias_square = (1 / (1 - beta**self.steps) for beta in BETAS)
        for name, gradient in gradients.items():
            parameter, mean, square = self.parameters[name], self.mean[name], self.square[name]
            mean += (1 - BETAS[0]) * (gradient - mean)
            square += (1 - BETAS[1]) * (gradient * gradient - square)
            if parameter.ndim == 2:
                parameter *= 1 - learning_rate * WEIGHT_DECAY
            parameter -= learning_rate * unbias_mean * mean / (np.sqrt(unbias_square * square) + 1e-8)


class Curve(NamedTuple):
    training: list[float]  # loss of each step's batch
    validation: list[tuple[int, float]]  # steps done, loss on the held-out text


def train(parameters: Arrays, training: Array, validation: Array, steps: int) -> Curve:
    """Change the parameters in place; training and validation are tokens, (characters,)."""
    rng = np.random.default_rng(1)
    optimizer, curve = AdamW(parameters), Curve([], [])
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn()
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=steps, loss="")
        for step in range(1, steps + 1):
            starts = rng.integers(len(training) - SEQLEN, size=(BATCH, 1))
            window = training[np.asarray(starts + np.arange(SEQLEN + 1), like=training)]  # (B, T + 1)
            logits, pullback = gpt(parameters, window[:, :-1])
            loss, dlogits = cross_entropy(logits, window[:, 1:])
            _, gradients = pullback(dlogits)
            warmup, decay = min(1.0, 10 * step / steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.step(gradients, LEARNING_RATE * warmup * decay)

            curve.training.append(float(loss))
            if step % max(1, steps // 5) == 0 or step == steps:
                curve.validation.append((step, held_out_loss(parameters, validation)))
            progress.update(bar, advance=1, loss=f"loss {curve.training[-1]:.3f}")
    return curve


def held_out_loss(parameters: Arrays, text: Array) -> float:
    """Mean loss of predicting text[1:], in windows of SEQLEN."""
    tokens, targets = text[:-1].reshape(-1, BATCH, SEQLEN), text[1:].reshape(-1, BATCH, SEQLEN)
    losses = [cross_entropy(gpt(parameters, x)[0], y)[0] for x, y in zip(tokens, targets, strict=True)]
    return float(sum(losses) / len(losses))


def write_text(parameters: Arrays, vocabulary: str, start: str) -> str:
    """Draw SAMPLE characters after `start`, each from the model's probabilities to the power 1 / TEMPERATURE."""
    rng = np.random.default_rng(2)
    tokens = [vocabulary.index(character) for character in start]
    for _ in range(SAMPLE):
        context = np.asarray([tokens[-SEQLEN:]], like=parameters["embedding"])
        logits, _ = gpt(parameters, context)
        p = np.exp(np.array(logits[0, -1].tolist()) / TEMPERATURE)
        tokens.append(int(rng.choice(len(vocabulary), p=p / p.sum())))
    return "".join(vocabulary[token] for token in tokens).strip()


class Corpus(NamedTuple):
    vocabulary: str  # a token is a place in it
    training: np.ndarray
    validation: np.ndarray


def read_corpus() -> Corpus:
    """Topics share paragraphs: each is kept once, so that none is both trained on and held out."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))
    vocabulary = "".join(sorted(set(text)))
    tokens = np.searchsorted(list(vocabulary), list(text))
    return Corpus(vocabulary, tokens[: -VALIDATION - 1], tokens[-VALIDATION - 1 :])


def ngram_loss(corpus: Corpus, n: int) -> float:
    """Loss on the held-out text of predicting by how often n characters follow each other in the training text."""

    def ngrams(text: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.lib.stride_tricks.sliding_window_view(text, n).T)

    counts = np.ones((len(corpus.vocabulary),) * n)  # one each to start with: nothing is impossible
    np.add.at(counts, ngrams(corpus.training), 1)
    p = counts / counts.sum(axis=-1, keepdims=True)
    return float(-np.log(p[ngrams(corpus.validation)]).mean())


def array_module(device: str) -> ModuleType:
    """NumPy or CuPy; for "auto" CuPy if it finds a GPU that the kernels run on (compute capability 8.0 or newer)."""
    if device == "cpu":
        return np
    try:
        import cupy
    except ImportError:
        if device == "cuda":
            raise
        return np
    if device == "cuda" or (cupy.cuda.is_available() and int(cupy.cuda.Device().compute_capability) >= 80):
        return cupy
    return np


def write_picture(path: str, curve: Curve, yardsticks: dict[str, float]) -> None:
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axes.plot(range(1, len(curve.training) + 1), curve.training, color="lightsteelblue", label="batch")
    axes.plot(*zip(*curve.validation, strict=True), "o-", color="navy", label="held-out text")
    for (name, loss), style in zip(yardsticks.items(), (":", "--"), strict=True):
        axes.axhline(loss, color="firebrick", linestyle=style, label=name)
    axes.set(xlabel="steps", ylabel="loss, nats per character")
    axes.legend()
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT with NumPy or CuPy and cuflash.")
    parser.add_argument("--steps", type=int, default=500, help=f"of {BATCH} x {SEQLEN} characters each")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", default="loss.png", help="curve of the loss to write")
    parser.add_argument("--weights", default="language_model.npz", help="file for the trained weights")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    return args


if __name__ == "__main__":
    main()
