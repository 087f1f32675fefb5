"""What a run has cost and reached, as `report.json` and as a table."""

import resource
import sys
from typing import Any

import torch

from pack_ptq.bits import UNQUANTIZED, average_activation_bits, average_weight_bits
from pack_ptq.graph.chain import Chain
from pack_ptq.sensitivity import layer_sizes
from pack_ptq.types import BitPlan, MixedPrecision, Unit

SCALE_BYTES, ZERO_POINT_BYTES = 4, 1
FIDELITY = ["same class", "KL"]  # how near the outputs are to full precision
COPY_BYTES = 8  # of each extra code of a channel, which channel it is and by how much it is shifted


def bit_summary(chain: Chain, units: list[Unit], plan: BitPlan) -> dict[str, Any]:
    """Give average bits over the whole network and per unit, weighted by element counts; extra codes count, too."""
    sizes = layer_sizes(chain)
    codes = {name: float(quantizer.expansion) for name, quantizer in chain.quantizers.items()}
    weights = {path: size.weights for path, size in sizes.items()}
    inputs = {path: size.inputs for path, size in sizes.items()}

    def averages(start: int, stop: int) -> dict[str, float]:
        layers, names = chain.layers_of(start, stop), chain.quantizers_of(start, stop)
        return {
            "weight_average": average_weight_bits({p: codes[p] * plan.weight[p] for p in layers}, weights),
            "activation_average": average_activation_bits(
                {p: codes[p] * (plan.activation[p] or UNQUANTIZED) for p in names}, inputs
            ),
        }

    per_pack = [{"blocks": list(unit.blocks), **averages(unit.start, unit.stop)} for unit in units]
    return {**averages(0, len(chain)), "per_pack": per_pack}


def split_summary(chain: Chain) -> dict[str, int]:
    """Give the number of extra codes for outlying channels, by the layers that have any."""
    copies = {path: layer.input_quantizer.copies for path, layer in chain.layers.items()}
    return {path: int(extra.sum()) for path, extra in copies.items() if extra is not None}


def mixed_summary(mixed: MixedPrecision | None) -> dict[str, Any]:
    """Give the entries of a run with mixed precision: what packs got, by which budget and sensitivities; else none."""
    if mixed is None:
        return {}
    return {
        "mixed": {
            name: {"weight": weight, "activation": activation} for name, (weight, activation) in mixed.packs.items()
        },
        "granularity": mixed.granularity,
        "predicted_kl": mixed.predicted_kl,
        "budget": {"name": mixed.budget, **mixed.limits},
        "sensitivity": {
            pack.name: {
                kind: {str(width): kl for width, kl in values.items()}
                for kind, values in (("weight", pack.weight), ("activation", pack.activation))
            }
            for pack in mixed.sensitivity
        },
        "pareto": [point.to_json() for point in mixed.pareto],
    }


def size_summary(chain: Chain, plan: BitPlan) -> dict[str, int]:
    """Give bytes of the network: in float32 (BatchNorm folded), and as packed codes + scales + the rest."""
    tensors = {id(t): t for t in (*chain.network.parameters(), *chain.network.buffers())}
    total = rest = 0
    own = set()
    for layer in chain.layers.values():
        own |= {id(t) for t in layer.weight_quantizer.buffers()} | {id(layer.weight), id(layer.correction)}
        own |= {id(layer.noise), id(layer.input_mean)}
    for quantizer in chain.quantizers.values():
        own |= {id(t) for t in (*quantizer.parameters(), *quantizer.buffers())}
    rest = sum(t.nbytes for key, t in tensors.items() if key not in own)
    total = rest + sum(layer.weight.nbytes for layer in chain.layers.values())
    packed = 0
    for path, layer in chain.layers.items():
        elements = round(layer.weight.numel() * layer.input_quantizer.expansion)
        packed += -(-elements * plan.weight[path] // 8)
        packed += layer.weight_quantizer.scale.numel() * SCALE_BYTES
        packed += 0 if layer.noise is None else layer.noise.nbytes
        packed += 0 if layer.weight_quantizer.signed else layer.weight_quantizer.scale.numel() * ZERO_POINT_BYTES
    inputs = {id(quantizer) for name, quantizer in chain.quantizers.items() if plan.activation[name] is not None}
    packed += len(inputs) * (SCALE_BYTES + ZERO_POINT_BYTES)
    packed += sum(split_summary(chain).values()) * COPY_BYTES
    return {"full_precision": total, "quantized": packed + rest}


def peak_memory() -> int:
    """Give the largest memory this process has held, in bytes; on a GPU the device's memory is added."""
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return memory + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def render(report: dict[str, Any], run_dir: str) -> str:
    """Give the table that ends a run."""
    metrics, bits, size, seconds = report["metrics"], report["bits"], report["size_bytes"], report["seconds"]
    tuning, fidelity = report.get("tuning"), report.get("fidelity", {})  # older reports have neither
    names = list(metrics["full_precision"])
    rows = [["", *names, *(FIDELITY if fidelity else []), "weight bits", "activation bits", "size kB"]]
    for key, title in (
        ("full_precision", "full precision"),
        ("rounded_to_nearest", "rounded to nearest"),
        ("quantized", "quantized"),
    ):
        low = key != "full_precision"
        spent = [f"{bits['weight_average']:.2f}", f"{bits['activation_average']:.2f}"] if low else ["32", "32"]
        kilobytes = size["quantized" if low else "full_precision"] / 1000
        near = _fidelity_cells(fidelity.get(key)) if fidelity else []
        rows.append([title, *[f"{metrics[key][n]:.2f}" for n in names], *near, *spent, f"{kilobytes:,.1f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    rejected = [u["name"] for u in report["reconstruction"] if u["steps"] and not u["accepted"]]
    lines += [
        "",
        f"measured on {metrics['num_samples']} test samples with hard integer weights; protocol {report['protocol']}, "
        f"profile {report['profile']}, seed {report['seed']}",
        f"{len(report['packs'])} packs: " + " | ".join(" ".join(pack) for pack in report["packs"]),
        f"seconds: calibration {seconds['calibration']:.1f}, scoring {seconds['scoring']:.1f}, "
        + (f"sensitivity {seconds['sensitivity']:.1f}, " if "sensitivity" in seconds else "")
        + f"reconstruction {seconds['reconstruction']['total']:.1f}, "
        + (f"tuning {seconds['tuning']:.1f}, " if tuning else "")
        + f"total {seconds['total']:.1f}; "
        f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB",
    ]
    if "mixed" in bits:
        lines += _mixed_lines(bits)
    if tuning:
        fate = "" if tuning["accepted"] else ", and nothing of it kept"
        if tuning["accepted"] and tuning["after"] > tuning["before"]:
            fate = ", no worse beyond chance"
        change = f"KL {tuning['before']:.4g} -> {tuning['after']:.4g} nats on held-out samples"
        share = tuning.get("rate_share", 1.0)  # older reports have none
        rates = f" at {share:.2g} of the rates" if share < 1 else ""
        lines.append(f"tuning: {tuning['steps']} steps{rates}, {change}{fate}")
    if rejected:
        lines.append(f"kept rounded to nearest, for reconstruction ended worse: {', '.join(rejected)}")
    if report.get("split_channels"):  # older reports have none
        layers = ", ".join(f"{path} {extra}" for path, extra in report["split_channels"].items())
        lines.append(f"extra codes for outlying channels: {layers}")
    lines += _selection_lines(report.get("selections", []))  # older reports have none
    if report["left_out"]:
        lines.append(f"left in full precision, for no call reaches them: {', '.join(report['left_out'])}")
    lines += [f"run folder   {run_dir}", f"TensorBoard  tensorboard --logdir {run_dir}"]
    return "\n".join(lines)


def _fidelity_cells(values: dict[str, float] | None) -> list[str]:
    """Give the cells of `FIDELITY`; empty for full precision itself."""
    return ["", ""] if values is None else [f"{values['agreement']:.2f}", f"{values['kl']:.4f}"]


def _selection_lines(selections: list[dict[str, Any]]) -> list[str]:
    """Tell which calls pick points by the input's own coordinates, and which by what quantized layers give."""
    lines = []
    for is_full, title in (
        (True, "picked by coordinates in full precision"),
        (False, "picked by features of quantized layers"),
    ):
        modules: dict[str, list[str]] = {}
        for selection in selections:
            if selection["full_precision"] == is_full:
                modules.setdefault(selection["call"], []).append(selection["module"] or ".")
        if modules:
            lines.append(f"{title}: " + " | ".join(f"{call} in {', '.join(paths)}" for call, paths in modules.items()))
    return lines


def _mixed_lines(bits: dict[str, Any]) -> list[str]:
    """Give the bits of the packs (means, where layers have their own), the budget and what both should cost."""
    packs = " | ".join(f"{name} {pack['weight']}/{pack['activation']}" for name, pack in bits["mixed"].items())
    what = bits.get("granularity", "pack")  # older reports have none
    if what == "layer":
        packs = " | ".join(
            f"{' '.join(pack['blocks'])} {pack['weight_average']:.2f}/{pack['activation_average']:.2f}"
            for pack in bits["per_pack"]
        )
    limits = [
        f"{key.replace('_', ' ')} {value:,.{2 if key.endswith('average') else 0}f}"
        for key, value in bits["budget"].items()
        if key != "name"
    ]
    return [
        f"weight/activation bits: {packs}",
        f"budget {bits['budget']['name']} (at most {', '.join(limits)}): predicted KL {bits['predicted_kl']:.4g}, "
        f"summed over {what}s; {len(bits['pareto'])} points of the Pareto front in report.json and TensorBoard",
    ]
