"""Telling kinds of text apart: a linear model over hashed words, and the known models of others.

    "Cheap pills! Buy now" ─▶ cheap, pills, buy, now, cheap pills, pills buy, buy now ─▶ buckets 17, 4, 211, … of 2^20
    ─▶ a vector of length 1 ─▶ times weights (buckets, labels) ─▶ softmax ─▶ ("negative", 0.97)

Two words that meet in a bucket share its weights; of a million buckets few hold two. The model learns whatever tells
the two kinds apart, also the source that they come from: take both from alike pages. Joulin et al. 1607.01759.
"""
import functools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from answers import read_text
from archive import expand, read_archive
from checkpoint import claim_file, write_atomically, write_text
from clean import MODEL_CHARS, extract_text, fasttext_predict, hash_ngrams, hash_words, load_fasttext, normalize

SEPARATOR = "<|endoftext|>"
EPOCHS, MIN_UPDATES = 5, 2000                    # fewer texts than 400 are shown more often


class Classifier:
    """A linear model over hashed words and word pairs, after fastText's recipe.

    Two departures: no hidden layer, which adds nothing between two linear maps; a text's vector has length 1 (not the
    mean, whose gradient fades with the text's length), so that one rate fits short and long texts.
    """

    def __init__(self, bits: int = 18, seed: int = 0):
        self.bits, self.seed, self.labels = bits, seed, []
        self.weights = np.zeros((1 << bits, 0), dtype=np.float32)

    def features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the weights, their values) of a text: its words and pairs by hash, as a vector of length 1."""
        hashes = hash_words(normalize(text[:MODEL_CHARS]))[0]
        grams = np.concatenate([hash_ngrams(hashes, 1), hash_ngrams(hashes, 2)[:len(hashes) - 1]])
        buckets, counts = np.unique((grams >> np.uint64(64 - self.bits)).astype(np.int64), return_counts=True)
        return buckets, (counts / max(np.linalg.norm(counts), 1)).astype(np.float32)

    def train(self, texts: list[str], labels: list) -> "Classifier":
        """Fit by SGD, the step size falling from 1 to 0, to texts and labels of at least two kinds; returns itself."""
        if len(texts) != len(labels) or len(set(labels)) < 2:
            raise ValueError(f"{len(texts)} texts, labels {labels[:5]} …; give one label a text and at least two kinds")
        labels = [getattr(label, "item", lambda: label)() for label in labels]       # NumPy's numbers as Python's
        self.labels = sorted(set(labels), key=str)
        self.weights = np.zeros((1 << self.bits, len(self.labels)), dtype=np.float32)
        targets = np.eye(len(self.labels), dtype=np.float32)[[self.labels.index(label) for label in labels]]
        features, rng = [self.features(text) for text in texts], np.random.default_rng(self.seed)
        epochs = max(EPOCHS, -(-MIN_UPDATES // len(texts)))
        order = np.concatenate([rng.permutation(len(texts)) for _ in range(epochs)])
        for step, i in enumerate(order):
            buckets, values = features[i]
            error = _softmax(values @ self.weights[buckets]) - targets[i]         # the gradient of the cross entropy
            # Buckets are distinct, so that no np.add.at is needed.
            self.weights[buckets] -= (1 - step / len(order)) * values[:, None] * error
        return self

    def predict(self, text: str) -> tuple:
        """(label, its probability)."""
        if not self.labels:
            raise ValueError("this classifier is not trained; call train(texts, labels) or Classifier.load(path)")
        buckets, values = self.features(text)
        p = _softmax(values @ self.weights[buckets])
        return self.labels[int(p.argmax())], float(p.max())

    def save(self, path) -> None:
        """Write a plain .npz of the weights that are not zero; loading it runs no code."""
        rows, labels = np.flatnonzero(self.weights.any(axis=1)), json.dumps(self.labels)
        write_atomically(path, lambda file: np.savez_compressed(
            file, labels=labels, bits=self.bits, rows=rows, weights=self.weights[rows]))

    @classmethod
    def load(cls, path) -> "Classifier":
        """The classifier saved at `path`."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                model, labels = cls(int(arrays["bits"])), json.loads(str(arrays["labels"]))
                model.weights = np.zeros((1 << model.bits, len(labels)), dtype=np.float32)
                model.weights[arrays["rows"]], model.labels = arrays["weights"], labels
        except Exception as error:               # a strange file breaks the reader in a dozen ways
            raise ValueError(f"{path} is no classifier of `data.py classify train`: {error}") from error
        return model


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def load_classifier(path: str | None):
    """(function text -> (label, probability), its labels) from a file of ours or a fastText .bin; None: languages."""
    if path is None or Path(path).suffix in (".bin", ".ftz"):
        model = load_fasttext(path)
        labels = [label.removeprefix("__label__") for label in model.predict("a", k=-1, threshold=-1.0)[0]]
        return functools.partial(fasttext_predict, model), labels
    model = Classifier.load(path)
    return model.predict, model.labels


# --- training by command ---

@dataclass
class ClassifyConfig:
    """What `python data.py classify train` can be told."""
    positive: str | None = None          # texts of the kind looked for: a file or a pattern
    negative: str | None = None          # texts of the other kind
    out: str = "classifier.npz"          # the model; its report goes beside it as .json
    seed: int = 0                        # of the split and the order


def read_texts(pattern: str) -> list[str]:
    """The documents of files: WARC, WET, or plain text, by <|endoftext|> or else by line."""
    texts = []
    for path in expand(pattern):
        if {".warc", ".wet"} & set(Path(path).suffixes):
            texts += [extract_text(content) if is_html else content.decode("utf-8", "replace")
                      for _, content, is_html in read_archive(path, Counter())]
        else:
            text = read_text(path)
            texts += text.split(SEPARATOR if SEPARATOR in text else "\n")
    texts = [text for text in texts if text.strip()]
    if len(texts) < 10:
        raise ValueError(f"{pattern} holds {len(texts)} texts; give at least 10, to train on nine tenths of them")
    return texts


def train_classifier(config: ClassifyConfig) -> dict:
    """Train on nine tenths of the texts, write the model, and report on the held-out tenth."""
    if not config.positive or not config.negative:
        raise ValueError("give --positive=FILES and --negative=FILES")
    inputs = [path for pattern in (config.positive, config.negative) for path in expand(pattern)]
    beside = claim_file(claim_file(config.out, inputs).with_suffix(".json"), [*inputs, config.out])
    pairs = [(text, label) for label in ("positive", "negative") for text in read_texts(getattr(config, label))]
    pairs = [pairs[i] for i in np.random.default_rng(config.seed).permutation(len(pairs))]
    held_out, training = pairs[:len(pairs) // 10], pairs[len(pairs) // 10:]
    model = Classifier(bits=20, seed=config.seed).train(*map(list, zip(*training)))
    model.save(config.out)
    chosen = np.array([model.predict(text)[0] == "positive" for text, _ in held_out])
    truth = np.array([label == "positive" for _, label in held_out])
    right = int((chosen & truth).sum())
    report = {
        "trained_on": len(training), "held_out": len(held_out), "accuracy": float(np.mean(chosen == truth)),
        "precision": right / max(chosen.sum(), 1), "recall": right / max(truth.sum(), 1)}
    write_text(beside, json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    return report
