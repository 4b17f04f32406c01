"""Train a small GPT with float32 and with bfloat16 weights: ``python -m benchmarks.sixteen_bits``.

The other packages: ``pip install --no-deps torch-optimi torchao pytorch_optimizer``. Finished runs are kept in the JSON file
and not repeated.
"""

import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_warmup as fw
from benchmarks.common import RESULTS, table
from fused_warmup.cli.machine import describe
from fused_warmup.cli.train.data import CONTEXT, load
from fused_warmup.cli.train.loops import evaluate, loss_of
from fused_warmup.cli.train.models import GPT
from fused_warmup.reference.rounding import MODES

STEPS, WARMUP, BATCH, LAST = 2000, 100, 8, 100
SEEDS, RATES = (0, 1, 2), (1e-3, 2e-4)
SHAPE = {"width": 96, "heads": 4, "layers": 2}
# the same for all; some of the classes have other defaults
OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
# steps whose changes of the weights are counted, one in 20 of the last ones
COUNTED = range(STEPS - LAST + 19, STEPS, 20)
PATH = RESULTS / "sixteen_bits.json"
BASE, STABLE = "float32", "pytorch_optimizer StableAdamW, float32"
HEADINGS = ["weights", "training loss", "validation loss", "above float32", "changed", "bytes per parameter"]


@dataclass(frozen=True)
class Variant:
    """Weights of a dtype and an optimizer.

    Attributes:
        name: Name in the table.
        make: Returns the optimizer for parameters, a learning rate and a seed.
        package: Distribution that has the optimizer.
        dtype: Dtype of the weights.
        base: Variant with float32 weights to compare it with; None for such a one.
    """

    name: str
    make: Callable
    package: str = "fused_warmup"
    dtype: torch.dtype = torch.bfloat16
    base: str | None = BASE


def ours(mode, state_dtype=torch.float32):
    """Return a function that makes our AdamW with a rounding mode and a dtype of states, as ``make`` of ``Variant``."""
    return lambda params, lr, seed: fw.AdamW(
        params, lr=lr, param_rounding=mode, rounding_seed=seed, state_dtype=state_dtype, **OPTIONS
    )


def torch_adamw(params, lr, seed):
    """Make torch's AdamW; its states are bfloat16 as the weights."""
    return torch.optim.AdamW(params, lr=lr, fused=True, **OPTIONS)


def optimi_adamw(params, lr, seed):
    """Make the AdamW of torch-optimi with Kahan summation; bfloat16 states."""
    import optimi

    return optimi.AdamW(params, lr=lr, kahan_sum=True, **OPTIONS)


def torchao_adamw(params, lr, seed):
    """Make the AdamW of torchao with stochastic rounding; bfloat16 states, rounded to nearest."""
    from torchao.optim import _AdamW

    return _AdamW(params, lr=lr, bf16_stochastic_round=True, **OPTIONS)


def stable_adamw(params, lr, seed):
    """Make StableAdamW of pytorch_optimizer with Kahan summation; bfloat16 states, and smaller updates by design."""
    from pytorch_optimizer import StableAdamW

    return StableAdamW(params, lr=lr, kahan_sum=True, **OPTIONS)


VARIANTS = (
    Variant(BASE, ours("nearest"), dtype=torch.float32, base=None),
    Variant("nearest", ours("nearest")),
    Variant("stochastic", ours("stochastic")),
    Variant("kahan", ours("kahan")),
    Variant("split", ours("split")),
    Variant("master", ours("master")),
    Variant("float32, states bfloat16", ours("nearest", torch.bfloat16), dtype=torch.float32),
    Variant("stochastic, states bfloat16", ours("stochastic", torch.bfloat16)),
    Variant("split, states bfloat16", ours("split", torch.bfloat16)),
    Variant("torch AdamW(fused=True)", torch_adamw, "torch"),
    Variant("optimi AdamW, kahan_sum", optimi_adamw, "torch-optimi"),
    Variant("torchao _AdamW, bf16_stochastic_round", torchao_adamw, "torchao"),
    Variant("pytorch_optimizer StableAdamW, kahan_sum", stable_adamw, "pytorch_optimizer", base=STABLE),
    Variant(STABLE, stable_adamw, "pytorch_optimizer", torch.float32, base=None),
)


def set_rate(opt, rate):
    """Set the learning rate, in place where it is a tensor."""
    for group in opt.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def changed_share(before, params):
    """Return the share of elements that differ from copies made before a step."""
    changed = sum((old != new).sum().item() for old, new in zip(before, params, strict=True))
    return changed / sum(param.numel() for param in params)


def state_bytes(opt, params):
    """Return the bytes of state per parameter, without the counts of steps."""
    tensors = [
        x for state in opt.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim()
    ]
    return sum(x.numel() * x.element_size() for x in tensors) / sum(param.numel() for param in params)


# the backward pass of the default takes twice as long for bfloat16 on a CPU
@sdpa_kernel(SDPBackend.MATH)
def train(variant, lr, seed, data, steps=STEPS):
    """Train once and return the entry of the run."""
    torch.manual_seed(seed)
    model = GPT(data.classes, **SHAPE).to(variant.dtype)
    params = list(model.parameters())
    opt = variant.make(params, lr, seed)
    generator = torch.Generator().manual_seed(seed)
    losses, shares = [], []
    for step in range(steps):
        index = torch.randint(len(data.train.targets), (BATCH,), generator=generator)
        loss = loss_of(model(data.train.inputs[index]), data.train.targets[index])
        opt.zero_grad()
        loss.backward()
        before = copy.deepcopy(params) if step in COUNTED else None
        set_rate(opt, lr * min(1.0, (step + 1) / WARMUP))
        opt.step()
        losses.append(loss.item())
        if before is not None:
            shares.append(changed_share(before, params))
    return {
        "variant": variant.name,
        "lr": lr,
        "seed": seed,
        "train_loss": statistics.fmean(losses[-LAST:]),
        "validation_loss": evaluate(model, data.validation)["loss"],
        "changed": statistics.fmean(shares) if shares else None,
        "weight_bytes": params[0].element_size(),
        "state_bytes": state_bytes(opt, params),
        "parameters": sum(param.numel() for param in params),
    }


def settings(data):
    """Return what all runs have in common; runs of other settings are not reused."""
    return {
        "steps": STEPS,
        "warmup": WARMUP,
        "batch": BATCH,
        **SHAPE,
        **OPTIONS,
        "data": data.source,
        "windows": len(data.validation.targets),
    }


def load_results(data):
    """Read the results of an earlier call, which may have been interrupted; empty ones for other settings."""
    expected = json.loads(json.dumps(settings(data)))
    if PATH.exists():
        results = json.loads(PATH.read_text(encoding="utf-8"))
        if results["settings"] == expected:
            return {**results, "missing": {}}
    return {"settings": expected, "versions": {}, "missing": {}, "runs": []}


def run_all(results, data):
    """Train all variants that have no run yet, and write the results after each."""
    done = {(run["variant"], run["lr"], run["seed"]) for run in results["runs"]}
    for seed, lr, variant in product(SEEDS, RATES, VARIANTS):
        if (variant.name, lr, seed) in done or variant.name in results["missing"]:
            continue
        try:
            run = train(variant, lr, seed, data)
        except ImportError as error:
            results["missing"][variant.name] = str(error)
            continue
        results["runs"].append(run)
        results["machine"] = describe()
        results["versions"][variant.package] = version(variant.package)
        PATH.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(run), flush=True)


def mean_and_range(values, sign=""):
    """Format the mean of values and their range."""
    ends = f"{min(values):{sign}.4f} to {max(values):{sign}.4f}"
    return f"{statistics.fmean(values):{sign}.4f} ({ends})"


def listed(names):
    """Join names to a list of words."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def above(runs, base):
    """Return how far the validation losses lie above those of other runs with the same seed."""
    return [run["validation_loss"] - base[seed]["validation_loss"] for seed, run in runs.items()]


def row(name, runs, base):
    """Return one table row; runs are by seed."""
    first = next(iter(runs.values()))
    changed = statistics.fmean(run["changed"] for run in runs.values())
    return [
        name,
        mean_and_range([run["train_loss"] for run in runs.values()]),
        mean_and_range([run["validation_loss"] for run in runs.values()]),
        "" if runs is base else mean_and_range(above(runs, base), "+"),
        f"{100 * changed:.0f} %",
        f"{first['weight_bytes']} + {first['state_bytes']:.0f}",
    ]


def conclusion(by_variant):
    """Return where the mean validation loss of each variant lies: within the spread of float32, above or below."""
    found = {"within": [], "above": [], "below": []}
    for name, (runs, base) in by_variant.items():
        if runs is base:
            continue
        losses = [run["validation_loss"] for run in base.values()]
        mean = statistics.fmean(run["validation_loss"] for run in runs.values())
        place = "below" if mean < min(losses) else "above" if mean > max(losses) else "within"
        found[place].append(f"`{name}`")
    where = [f"{place} it for {listed(names)}" for place, names in found.items() if names]
    return f"Mean validation loss and the spread of the seeds of float32: {'; '.join(where)}."


def extremes(by_variant):
    """Return the sentence on the differences that our modes make for one seed."""
    runs, base = by_variant["nearest"]
    least = min(map(abs, above(runs, base)))
    modes = [mode for mode in MODES if mode != "nearest"]
    most = max(abs(x) for mode in modes for x in above(*by_variant[mode]))
    return (
        f"Differences from float32 for one seed: {most:.4f} or less with {listed([f'`{mode}`' for mode in modes])}, "
        f"{least:.4f} or more with `nearest`."
    )


def page(results):
    """Return the text of the results page."""
    lines = ["# bfloat16 weights", "", *describe_runs(results)]
    for lr in RATES:
        runs = {variant.name: {} for variant in VARIANTS}
        for run in results["runs"]:
            if run["lr"] == lr:
                runs[run["variant"]][run["seed"]] = run
        by_variant = {v.name: (runs[v.name], runs[v.base or v.name]) for v in VARIANTS if runs[v.name]}
        rows = [row(name, *pair) for name, pair in by_variant.items()]
        lines += [
            f"## Learning rate {lr:g}",
            "",
            *table(HEADINGS, rows),
            "",
            f"{conclusion(by_variant)} {extremes(by_variant)}",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def describe_runs(results):
    """Return the paragraphs on what was trained and measured, and where."""
    machine, parameters = results["machine"], results["runs"][0]["parameters"]
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"The character GPT of `fused-warmup train`, smaller: width {SHAPE['width']}, {SHAPE['heads']} heads, "
        f"{SHAPE['layers']} layers, {parameters:,} parameters, contexts of {CONTEXT}. Data: {results['settings']['data']}. "
        f"{STEPS:,} steps of {BATCH} windows of AdamW with betas {OPTIONS['betas']}, eps {OPTIONS['eps']:g} and weight decay "
        f"{OPTIONS['weight_decay']:g}; {WARMUP} steps of linear warmup, then a constant rate; no clipping, no averages. "
        f"Seeds {listed([str(seed) for seed in SEEDS])}: all variants of a seed have the same batches and the same initial "
        "weights, rounded to bfloat16 unless the weights are float32. Activations and gradients have the dtype of the "
        "weights, and attention is computed without torch's fused kernel; the loss is computed in float32.",
        "",
        "The modes of `param_rounding` are ours, with both moments in float32 unless `states bfloat16` "
        "(`state_dtype=torch.bfloat16`) is said. torch and the other packages keep them in "
        "bfloat16 beside bfloat16 weights. StableAdamW clips updates, so it is "
        "compared with its own runs on float32 weights.",
        "",
        f"Training loss: mean over the last {LAST} steps. Validation loss: of {results['settings']['windows']} held-out "
        "windows, after the training. Both: mean over the seeds, and from the smallest to the largest. Above float32: difference of the "
        "validation losses of one seed. Changed: share of the weights whose stored value a step changes, mean of "
        f"{len(COUNTED)} of the last {LAST} steps. Bytes per parameter: of the weight and of the state, without counts.",
        "",
        f"{machine['cpu']}, 1 thread, {machine['instruction_set']}, Python {machine['versions']['python']}; {packages}.",
        "",
    ]
    for name, reason in results["missing"].items():
        lines += [f"Not measured: {name}: {reason}.", ""]
    return lines


def main():
    """Run all trainings that are missing and write the results page."""
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    data = load("gpt")
    results = load_results(data)
    run_all(results, data)
    PATH.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
