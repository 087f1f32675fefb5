"""The tables of a sweep over architectures, as Markdown and JSON."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
GOOD = 0.98
CONSTANT = 0.01
HEAD = (
    "| module | model | parameters (M) | input | layers | products | MACs quantized (%) | left out | cosine "
    "| less the mean | noise | seconds |\n|---|---|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|"
)
INTRODUCTION = """# Every architecture of timm and torchvision

`python benchmarks/sweep_timm.py`: of each module of timm the smallest member (by parameters; among those within 20 % of
the fewest, the smallest input; timm's own `test_*` networks do not count, nor do names such as `large`, nor any but
those such as `tiny` where there are some) and all classification models of torchvision, with random weights and the
input size that their published weights were made for. Networks of more than 150 million
parameters are skipped. Each was prepared, its ranges were set from 16 generated images, all weights and activations
have 8 bits, and its logits for 8 other images are compared to those in full precision: the cosine similarity, averaged
over images; *less the mean* is the same after the logits' mean over the images has been taken off both.

- **Weights**: as initialised, but norms have gains in [0.75, 1.25] and biases of deviation 0.1; weights that are zero
  or small have the deviation 1/sqrt(fan-in), layer scales and residual gains lie in [0.1, 0.5], other zeros have the
  deviation 0.02; BatchNorm has mean 0 and the mean square of 8 of the images (`benchmarks/sweep_weights.py`).
- **MACs quantized**: of the matrix products and convolutions that PyTorch executes on data that depends on the input,
  the share inside quantized operations. It is counted where PyTorch dispatches them, below all that the preparation
  looks at (`benchmarks/sweep_coverage.py`).
- **Noise**: the similarity of the network in full precision to itself with 1 % white noise on the images. Where it is
  low, the random weights make a chaotic network, in which any rounding grows.
- **Seconds** of one processor, for all of this.
- **How the weights were chosen**: what random weights and images to take was settled by trying a few on tinynet_e,
  starnet_s050 and cspnext_tiny, with the similarity in view, before the sweep.
- **Low ones**: in `coat_tiny` one range for all channels of a depthwise convolution's input (`cpe2.proj`, -4780 to 3220
  under these weights) rounds most channels away; this operand alone has 0.55. `davit_tiny` has 0.961 with its weights
  alone quantized. `halonet_h1` and `efficientvit_b0` were not taken apart; the others are nearly as sensitive to noise
  on the images, or just below 0.98.
- **Refused or skipped**: above 150 million parameters, or for lack of memory (10 GB a network), none by structure.
- **When**: all in one sweep, but for `sam2_hiera_tiny` and `qwen3_vit_88m`, which ran later, when the recording of
  forward passes had stopped to hold all activations, so that they fitted into 10 GB.
- **Left out**: what the preparation lists as left in full precision. A product that ran in full precision and is not
  listed would be named here as **silent**.
"""


def write_summary(chosen: list[Entry], results: dict[tuple[str, str], Entry], folder: Path) -> None:
    """Write sweep_timm.md and sweep_timm.json."""
    rows = [results[key] for c in chosen if (key := (c["library"], c["model"])) in results]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep_timm.json").write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n")
    text = [INTRODUCTION]
    for library, title in (("timm", "timm, one network per module"), ("torchvision", "torchvision, every model")):
        of_library = [row for row in rows if row["library"] == library]
        total = sum(c["library"] == library for c in chosen)
        text += [f"## {title}\n", _counts(of_library, total), *_tables(of_library)]
    (folder / "sweep_timm.md").write_text("\n".join(text))


def _plain(row: Entry) -> Entry:
    return {key: value for key, value in row.items() if key != "traceback"}


def _counts(rows: list[Entry], total: int) -> str:
    prepared = [row for row in rows if row["status"] == "prepared"]
    good = [row for row in prepared if row["cosine"] > GOOD]
    silent = sum(bool(row["unlisted"]) for row in prepared)
    others = Counter(row["status"] for row in rows if row["status"] != "prepared")
    rest = "".join(f"; {count} {status}" for status, count in others.items())
    waiting = f"; {total - len(rows)} not yet run" if len(rows) < total else ""
    return (
        f"{total} networks: {len(good)} ({100 * len(good) / max(1, total):.0f} %) prepared with a similarity above "
        f"{GOOD}; {len(prepared) - len(good)} prepared with less{rest}{waiting}. "
        f"With anything silently in full precision: {silent}.\n"
    )


def _tables(rows: list[Entry]) -> list[str]:
    prepared = [_prepared(row) for row in rows if row["status"] == "prepared"]
    others = [_other(row) for row in rows if row["status"] != "prepared"]
    text = [HEAD, *prepared, ""] if prepared else []
    head = "| module | model | parameters (M) | input | outcome | reason | seconds |\n|---|---|--:|--:|---|---|--:|"
    return [*text, head, *others, ""] if others else text


def _start(row: Entry) -> str:
    return f"| {row['module']} | {row['model']} | {row['parameters'] / 1e6:.1f} | {row['input'][1]} |"


def _prepared(row: Entry) -> str:
    share = 100 * row["macs"]["quantized"] / max(1, row["macs"]["quantized"] + row["macs"]["outside"])
    mark = " (logits nearly constant)" if row["variation"] < CONSTANT else ""
    numbers = f"{row['cosine']:.4f}{mark} | {row['cosine_without_mean']:.4f} | {row['cosine_with_noise']:.4f}"
    covered = f"{row['layers']} | {row['products']} | {share:.2f} | {_left_out(row)}"
    return f"{_start(row)} {covered} | {numbers} | {row['seconds']:.0f} |"


def _left_out(row: Entry) -> str:
    """Name up to two of what is left out, and everything that is so silently."""
    names = [f"`{name}`" for name in row["left_out"][:2]]
    names += [f"{len(row['left_out']) - 2} more"] if len(row["left_out"]) > 2 else []
    return ", ".join([*names, *(f"**silent** `{name}`" for name in row["unlisted"])])


def _other(row: Entry) -> str:
    reason = row["reason"].replace("|", "\\|").replace("\n", " ")
    return f"{_start(row)} {row['status']} | {reason} | {row.get('seconds', 0):.0f} |"
