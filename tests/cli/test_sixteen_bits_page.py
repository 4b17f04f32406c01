"""The page of ``benchmarks.sixteen_bits`` is that of its numbers, and its sentences follow from them."""

import json

from benchmarks import sixteen_bits as bench


def runs(*losses):
    return {seed: {"validation_loss": loss} for seed, loss in enumerate(losses)}


def test_the_page_is_made_from_the_numbers():
    results = json.loads(bench.PATH.read_text(encoding="utf-8"))
    assert bench.PATH.with_suffix(".md").read_text(encoding="utf-8") == bench.page(results)
    done = {(run["variant"], run["lr"], run["seed"]) for run in results["runs"]}
    left_out = set(results["missing"])
    for variant in bench.VARIANTS:
        wanted = {(variant.name, lr, seed) for lr in bench.RATES for seed in bench.SEEDS}
        assert wanted <= done or variant.name in left_out


def test_the_sentence_says_where_each_mean_lies():
    base = runs(1.0, 2.0)
    by_variant = {
        "float32": (base, base),
        "a": (runs(0.5, 2.5), base),
        "b": (runs(1.9, 2.2), base),
        "c": (runs(0.9, 1.0), base),
        "d": (runs(2.0, 2.0), base),
    }
    sentence = bench.conclusion(by_variant)
    assert sentence.endswith("within it for `a` and `d`; above it for `b`; below it for `c`.")


def test_the_extremes_are_those_of_single_seeds():
    base = runs(1.0, 2.0)
    by_variant = {mode: (runs(1.01, 1.98), base) for mode in bench.MODES}
    by_variant["nearest"] = (runs(1.5, 2.25), base)
    by_variant["split"] = (runs(1.0, 2.0625), base)
    sentence = bench.extremes(by_variant)
    assert "0.0625 or less with `stochastic`, `kahan`, `split` and `master`, 0.2500 or more with" in sentence
