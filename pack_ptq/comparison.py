"""What several runs of several recipes on one network have reached, as JSON and as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pack_ptq.overridden import in_words
from pack_ptq.report import FIDELITY

Report = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Give mean, sample standard deviation (nothing for one value) and the extremes."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "min": min(values), "max": max(values)}


def run_values(report: Report) -> dict[str, Any]:
    """Give what a comparison takes from the report of one run."""
    steps = [unit["steps"] for unit in report["reconstruction"]]
    # Not `total`: that of a resumed run counts from its last start.
    others = sum(value for name, value in report["seconds"].items() if name not in ("reconstruction", "total"))
    tuning = report.get("tuning") or {"steps": 0}  # older reports have none
    return {
        "seed": report["seed"],
        "metrics": report["metrics"]["quantized"],
        "rounded_to_nearest": report["metrics"]["rounded_to_nearest"],
        "fidelity": report.get("fidelity", {}).get("quantized", {}),  # older reports have none
        "weight_bits": report["bits"]["weight_average"],
        "activation_bits": report["bits"]["activation_average"],
        "size_bytes": report["size_bytes"]["quantized"],
        "steps_per_unit": max(steps),
        "total_steps": sum(steps) + tuning["steps"],
        "packs": len(report["packs"]),
        "seconds": others + report["seconds"]["reconstruction"]["total"],
        "device": report["device"],
        "protocol": report["protocol"],
        "full_precision": report["metrics"]["full_precision"],
    }


def row(recipe: str, reports: Sequence[Report]) -> dict[str, Any]:
    """Give one recipe's values over its seeds, and those of every run."""
    runs = [run_values(report) for report in reports]

    def over_seeds(key: str) -> dict[str, float | None]:
        return spread([run[key] for run in runs])

    def of_metrics(key: str) -> dict[str, dict[str, float | None]]:
        names = [name for name in runs[0][key] if all(name in run[key] for run in runs)]
        return {name: spread([run[key][name] for run in runs]) for name in names}

    numbers = ("weight_bits", "activation_bits", "size_bytes", "steps_per_unit", "total_steps", "packs")
    return {
        "recipe": recipe,
        "seeds": [run["seed"] for run in runs],
        "metrics": of_metrics("metrics"),
        "rounded_to_nearest": of_metrics("rounded_to_nearest"),
        "fidelity": of_metrics("fidelity"),
        **{key: over_seeds(key) for key in numbers},
        "minutes": over_seeds("seconds")["mean"] / 60,  # type: ignore[operator]  # only `std` may be nothing
        "device": sorted({run["device"] for run in runs}),
        "protocol": runs[0]["protocol"],
        "full_precision": {name: value["mean"] for name, value in of_metrics("full_precision").items()},
        "runs": runs,
    }


def compare_reports(
    reports: Mapping[str, Sequence[Report]], planned: int, overridden: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Give the content of `comparison.json`; `data` is that of the first run, whose seed others need not share.

    Args:
        reports: Of the finished runs by recipe, at least one in all; a recipe without any has no row.
        planned: Runs that the comparison will have.
        overridden: Keys for every run that a recipe goes before, by recipe, as `overridden.overridden` gives them.
    """
    rows = [row(recipe, its_own) for recipe, its_own in reports.items() if its_own]
    first = next(report for its_own in reports.values() for report in its_own)
    return {
        "model": first["model"],
        "data": first["data"],
        "protocol": first["protocol"],
        "profile": first["profile"],
        "weight_bits": first["recipe"]["weight"]["bits"],
        "activation_bits": first["recipe"]["activation"]["bits"],
        "full_precision": rows[0]["full_precision"],
        "num_samples": first["metrics"]["num_samples"],
        "versions": first["versions"],
        "runs_finished": sum(len(its_own) for its_own in reports.values()),
        "runs_planned": planned,
        "overridden": overridden,
        "rows": rows,
    }


def markdown(comparison: dict[str, Any]) -> str:
    """Give the content of `comparison.md`: a title, one table with a row for each recipe, and how to read it."""
    model, rows = comparison["model"], comparison["rows"]
    network = model.get("name") or model["class_path"].rsplit(".", 1)[-1]
    inner = ", ".join(f"{key} {value}" for key, value in (model.get("init_args") or {}).items())
    metrics = list(comparison["full_precision"])
    near = dict(zip(("agreement", "kl"), FIDELITY, strict=True)) if all(r["fidelity"] for r in rows) else {}
    costs = ("bits W / A", "size kB", "steps a unit", "steps in all", "packs", "minutes", "seeds")
    heads = ["recipe", *metrics, *near.values(), *costs]
    full = ", ".join(f"{name} {value:.2f}" for name, value in comparison["full_precision"].items())
    devices = sorted({device for r in rows for device in r["device"]})
    lines = [
        f"# {network}{f' ({inner})' if inner else ''}, W{comparison['weight_bits']}A{comparison['activation_bits']}, "
        f"{comparison['protocol']}",
        "",
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
        *(f"| {' | '.join(_cells(r, metrics, list(near)))} |" for r in rows),
        "",
        f"Full precision: {full}. Measured on {comparison['num_samples']} test samples with hard integer weights; "
        f"protocol {comparison['protocol']}, profile {comparison['profile']}, device {', '.join(devices)}.",
        "",
        "Metrics: mean ± sample standard deviation over the seeds (smallest to largest). "
        + ("Same class: as full precision gives, in percent. KL: from full precision, in nats. " if near else "")
        + "Bits: averages really spent. "
        "Steps in all: of all units and of the last pass over the network. "
        "Minutes: calibration, decisions and fits of one run without its measurements, mean over the seeds.",
    ]
    if comparison["overridden"]:
        changed = "; ".join(f"{recipe} has {in_words(found)}" for recipe, found in comparison["overridden"].items())
        lines += ["", f"What recipes state goes before keys: {changed}."]
    if comparison["runs_finished"] < comparison["runs_planned"]:
        lines += ["", f"Not finished: {comparison['runs_finished']} of {comparison['runs_planned']} runs are done."]
    return "\n".join(lines) + "\n"


def _cells(r: dict[str, Any], metrics: Sequence[str], near: Sequence[str]) -> list[str]:
    """Give the cells of one recipe."""
    return [
        r["recipe"],
        *(_with_spread(r["metrics"][name]) for name in metrics),
        *(_with_spread(r["fidelity"][name], 2 if name == "agreement" else 4) for name in near),
        f"{_range(r['weight_bits'], '.2f')} / {_range(r['activation_bits'], '.2f')}",
        _range({key: value / 1000 for key, value in r["size_bytes"].items() if value is not None}, ",.1f"),
        _range(r["steps_per_unit"], ",.0f"),
        _range(r["total_steps"], ",.0f"),
        _range(r["packs"], ".0f"),
        f"{r['minutes']:.1f}",
        ", ".join(str(seed) for seed in r["seeds"]),
    ]


def _with_spread(values: dict[str, Any], digits: int = 2) -> str:
    if values["std"] is None:
        return f"{values['mean']:.{digits}f}"
    mean, std, low, high = (f"{values[key]:.{digits}f}" for key in ("mean", "std", "min", "max"))
    return f"{mean} ± {std} ({low} to {high})"


def _range(values: dict[str, Any], form: str) -> str:
    low, high = (format(values[end], form) for end in ("min", "max"))
    return low if low == high else f"{low} to {high}"
