"""Generate text with a paged cache: many samples of one prompt, beam search, and prompts that begin alike.

The model is the one that `03_train_language_model.py` trains; without its weights a few steps are trained first. Keys
and values lie in the blocks of a `PagedKVCache` (Kwon et al. 2023): samples and beams of one prompt hold the same
blocks until they write different text, and a prompt that begins like an earlier one finds its blocks. Every text is
also generated without a cache, the whole context anew for each character, and must be the same in every character.

    python examples/03_train_language_model.py && python examples/07_generate_text.py
    python examples/07_generate_text.py --steps 60    # trains its own model

It prints what was written and how many blocks that took, beside a cache that reserves room for the longest text, and
saves a picture of the blocks in use.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import cuflash

gpt = importlib.import_module("03_train_language_model")  # beside this file

BLOCK_SIZE = 4  # tokens of a block; a character is a token
LONGEST = gpt.SEQLEN  # of a text with its prompt: what the model was trained on
SAMPLES, BEAMS = 8, 4
TEMPERATURE = 0.7
PROMPT = "\n\nThe statement "
QUESTIONS = ("for", "while the", "assert", "with")  # that follow one long introduction

Array = Any  # NumPy's or CuPy's
Tokens = list[int]


class Model(NamedTuple):
    parameters: dict[str, Array]
    vocabulary: str

    @property
    def head_dim(self) -> int:
        return int(gpt.WIDTH // gpt.HEADS)

    def encode(self, text: str) -> Tokens:
        return [self.vocabulary.index(character) for character in text]

    def decode(self, tokens: Tokens) -> str:
        return "".join(self.vocabulary[token] for token in tokens)

    def logits(self, tokens: Tokens) -> np.ndarray:
        """Of the token after these, from nothing but these."""
        context = np.asarray([tokens], like=self.parameters["embedding"])
        return to_host(gpt.gpt(self.parameters, context)[0][0, -1])


class Writer:
    """A model with a cache: `step` takes new tokens of some sequences and gives the logits of what follows each."""

    def __init__(self, model: Model) -> None:
        self.model = model
        blocks = 2 * SAMPLES * -(-LONGEST // BLOCK_SIZE)
        self.cache = cuflash.PagedKVCache(
            gpt.LAYERS, blocks, BLOCK_SIZE, gpt.HEADS, model.head_dim,
            dtype="float32", like=model.parameters["embedding"],
        )  # fmt: skip
        self.computed = 0  # tokens that went through the model
        self.blocks: list[int] = []  # in use after each step

    def step(self, seq_ids: list[int], tokens: list[Tokens]) -> np.ndarray:
        """(sequences, vocabulary)."""
        cache, parameters = self.cache, self.model.parameters
        counts = [len(new) for new in tokens]
        slots = cache.reserve(seq_ids, counts)
        lengths, tables = cache.seq_lens(seq_ids), cache.block_tables(seq_ids)
        ends = np.cumsum([0, *counts])
        before = np.repeat(
            to_host(lengths) - ends[1:], counts
        )  # so that position = before + place among all new tokens
        positions = before + np.arange(ends[-1])

        x, _ = gpt.embedding("embedding", parameters, np.asarray([[*chain(*tokens)]], like=parameters["embedding"]))
        for i in range(gpt.LAYERS):
            normal, _ = gpt.layer_norm(f"{i}.norm1", parameters, x)
            qkv, _ = gpt.linear(f"{i}.qkv", parameters, normal)
            q, k, v = np.moveaxis(qkv.reshape(-1, 3, gpt.HEADS, self.model.head_dim), 1, 0)
            cache.append(i, turned(k, positions), v.copy(), slots)
            y = cuflash.paged_attention(
                turned(q, positions), cache.k_cache(i), cache.v_cache(i), tables, lengths,
                cu_seqlens_q=ends, max_seqlen_q=max(counts),
            )  # fmt: skip
            x = x + gpt.linear(f"{i}.out", parameters, y.reshape(1, len(positions), -1))[0]
            normal, _ = gpt.layer_norm(f"{i}.norm2", parameters, x)
            up, _ = gpt.gelu(parameters, gpt.linear(f"{i}.up", parameters, normal)[0])
            x = x + gpt.linear(f"{i}.down", parameters, up)[0]
        cache.commit(seq_ids, tokens)
        self.computed += len(positions)
        self.blocks.append(cache.usage().in_use)
        last, _ = gpt.layer_norm("norm", parameters, x[:, ends[1:] - 1])
        return to_host(gpt.linear("head", parameters, last)[0][0])


def turned(x: Array, positions: np.ndarray) -> Array:
    """`rotate` of the training script for x (tokens, heads, head_dim) at any positions."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 1e-4 ** (np.arange(half) / half)
    cos, sin = (np.asarray(f.astype(x.dtype), like=x) for f in (np.cos(angle), np.sin(angle)))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


# Three ways to write. Each has a cached and a plain form, which must agree.


def draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    p = np.exp((logits - logits.max()) / TEMPERATURE)
    return int(rng.choice(len(p), p=p / p.sum()))


def samples(writer: Writer, prompt: Tokens, length: int) -> list[Tokens]:
    """SAMPLES continuations of a prompt that is computed once: forks hold its blocks together."""
    rngs = [np.random.default_rng(i) for i in range(SAMPLES)]
    seq_id, _ = writer.cache.add_sequence()
    logits = np.repeat(writer.step([seq_id], [prompt]), SAMPLES, axis=0)
    seq_ids = [seq_id, *(writer.cache.fork(seq_id) for _ in range(SAMPLES - 1))]
    texts = [list(prompt) for _ in seq_ids]
    while True:
        for text, row, rng in zip(texts, logits, rngs, strict=True):
            text.append(draw(row, rng))
        if len(texts[0]) == length:
            break
        logits = writer.step(seq_ids, [text[-1:] for text in texts])
    for seq_id in seq_ids:
        writer.cache.free(seq_id)
    return texts


def plain_samples(model: Model, prompt: Tokens, length: int) -> list[Tokens]:
    texts = []
    for i in range(SAMPLES):
        rng, text = np.random.default_rng(i), list(prompt)
        while len(text) < length:
            text.append(draw(model.logits(text), rng))
        texts.append(text)
    return texts


class Beam(NamedTuple):
    """A text and its log probability."""

    score: float
    text: Tokens


def best_beams(beams: list[Beam], logits: np.ndarray) -> list[tuple[int, Beam]]:
    """The BEAMS most likely continuations by one token, each with the beam that it continues."""
    log_p = logits - logits.max(axis=-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    scores = log_p + np.array([[beam.score] for beam in beams])
    best = np.argsort(-scores, axis=None, kind="stable")[:BEAMS]
    places = zip(*np.unravel_index(best, scores.shape), strict=True)
    return [(int(i), Beam(float(scores[i, token]), [*beams[i].text, int(token)])) for i, token in places]


def beam_search(writer: Writer, prompt: Tokens, length: int) -> Beam:
    """The likeliest text: beams that split share what they have in common, beams that are dropped give blocks back."""
    cache = writer.cache
    beams, seq_ids = [Beam(0.0, prompt)], [cache.add_sequence()[0]]
    logits = writer.step(seq_ids, [prompt])
    while True:
        chosen = best_beams(beams, logits)
        beams = [beam for _, beam in chosen]
        if len(beams[0].text) == length:
            break
        forks = [cache.fork(seq_ids[parent]) for parent, _ in chosen]
        for seq_id in seq_ids:
            cache.free(seq_id)
        seq_ids = forks
        logits = writer.step(seq_ids, [beam.text[-1:] for beam in beams])
    for seq_id in seq_ids:
        cache.free(seq_id)
    return beams[0]


def plain_beam_search(model: Model, prompt: Tokens, length: int) -> Beam:
    beams = [Beam(0.0, prompt)]
    while len(beams[0].text) < length:
        beams = [beam for _, beam in best_beams(beams, np.stack([model.logits(beam.text) for beam in beams]))]
    return beams[0]


def answers(writer: Writer, prompts: list[Tokens], length: int) -> list[Tokens]:
    """The likeliest next token, again and again; each prompt finds what it shares with those before it."""
    texts = []
    for prompt in prompts:
        seq_id, cached = writer.cache.add_sequence(prompt)
        cached = min(cached, len(prompt) - 1)  # the last token must go through the model, for its logits
        writer.cache.truncate(seq_id, cached)
        text = list(prompt)
        logits = writer.step([seq_id], [prompt[cached:]])
        while len(text) < length:
            text.append(int(logits[0].argmax()))
            logits = writer.step([seq_id], [text[-1:]])
        writer.cache.free(seq_id)
        texts.append(text)
    return texts


def plain_answers(model: Model, prompts: list[Tokens], length: int) -> list[Tokens]:
    texts = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < length:
            text.append(int(model.logits(text).argmax()))
        texts.append(text)
    return texts


def main() -> None:
    args = parse_arguments()
    model = load_model(args)
    length = args.length
    prompt = model.encode(PROMPT)
    introduction = model.encode("\n\n" + gpt.topics["with"].strip()[: length // 2])
    prompts = [introduction + model.encode(" " + question) for question in QUESTIONS]
    room = -(-length // BLOCK_SIZE)  # blocks of a text in a cache that reserves the longest for each

    curves = {}
    contiguous = {"parallel samples": SAMPLES * room, "beam search": BEAMS * room, "prompts that begin alike": room}
    texts: dict[str, Any] = {}
    for name, cached, plain in (
        ("parallel samples", lambda w: samples(w, prompt, length), lambda: plain_samples(model, prompt, length)),
        ("beam search", lambda w: beam_search(w, prompt, length), lambda: plain_beam_search(model, prompt, length)),
        (
            "prompts that begin alike",
            lambda w: answers(w, prompts, length),
            lambda: plain_answers(model, prompts, length),
        ),
    ):
        texts[name], curves[name] = compare(model, name, cached, plain, contiguous[name])
    print("\none of the samples:\n" + model.decode(texts["parallel samples"][0]).strip())
    print("\nthe likeliest text:\n" + model.decode(texts["beam search"].text).strip())
    write_picture(args.output, curves, contiguous)
    print(f"\nwrote {args.output}")


def compare(
    model: Model, name: str, cached: Callable[[Writer], Any], plain: Callable[[], Any], contiguous: int
) -> tuple[Any, list[int]]:
    """Both forms of one way to write: the same text, the time of each, and the blocks that the cache took."""
    writer = Writer(model)
    start = time.perf_counter()
    result = cached(writer)
    middle = time.perf_counter()
    expected = plain()
    seconds = middle - start, time.perf_counter() - middle
    same_text(result, expected)
    stats = writer.cache.stats()
    print(f"{name}: {seconds[0]:.2f} s, without a cache {seconds[1]:.2f} s, the same text")
    print(f"  {writer.computed} tokens computed, {stats.cached_tokens} found, {stats.copied_blocks} blocks copied")
    print(f"  at most {max(writer.blocks)} blocks in use; with the longest text reserved for each it were {contiguous}")
    if writer.cache.usage().in_use:
        raise SystemExit(f"{writer.cache.usage().in_use} blocks are still in use")
    return result, writer.blocks


def same_text(result: Any, expected: Any) -> None:
    """Beams by their texts: scores may differ in the last digits."""
    if isinstance(result, Beam):
        result, expected = result.text, expected.text
    if result != expected:
        raise SystemExit("the texts written with and without a cache differ")


def load_model(args: argparse.Namespace) -> Model:
    """Trained weights, or those of a few steps."""
    xp = gpt.array_module(args.device)
    if args.steps is None and Path(args.weights).exists():
        with np.load(args.weights) as saved:
            parameters = {name: xp.asarray(saved[name]) for name in saved.files if name not in ("vocabulary", "heads")}
            return Model(parameters, str(saved["vocabulary"]))
    corpus = gpt.read_corpus()
    parameters = {name: xp.asarray(array) for name, array in gpt.initial_parameters(len(corpus.vocabulary)).items()}
    gpt.train(parameters, xp.asarray(corpus.training), xp.asarray(corpus.validation), args.steps or 60)
    return Model(parameters, corpus.vocabulary)


def to_host(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def write_picture(path: str, curves: dict[str, list[int]], contiguous: dict[str, int]) -> None:
    figure, panels = plt.subplots(1, len(curves), figsize=(12, 3.6), layout="constrained")
    for axes, (name, blocks) in zip(panels, curves.items(), strict=True):
        axes.plot(blocks, color="navy", label="paged")
        axes.axhline(contiguous[name], color="firebrick", linestyle="--", label="the longest text reserved")
        axes.set(title=name, xlabel="step", ylabel=f"blocks of {BLOCK_SIZE} tokens in use", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with a paged cache of keys and values.")
    parser.add_argument("--weights", default="language_model.npz", help="of examples/03_train_language_model.py")
    parser.add_argument("--steps", type=int, default=None, help="train for so many steps instead of loading weights")
    parser.add_argument("--length", type=int, default=LONGEST, help=f"characters of a text, 48 to {LONGEST}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", default="blocks.png", help="picture of the blocks in use")
    args = parser.parse_args()
    if not 48 <= args.length <= LONGEST:
        parser.error(f"--length {args.length}: must be 48 to {LONGEST}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    return args


if __name__ == "__main__":
    main()
