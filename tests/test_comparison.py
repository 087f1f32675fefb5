"""The comparison's numbers against hand calculation, and its Markdown as a reader sees it."""

import json
import math

import pytest

from pack_ptq.comparison import compare_reports, markdown, row, spread


def report(seed: int, top1: float, packs: int = 2, steps: int = 10, weight_bits: float = 3.0) -> dict:
    return {
        "model": {"class_path": "nets.Net", "init_args": {"depth": 20}},
        "data": {"class_path": "d.Data"},
        "recipe": {"weight": {"bits": 3}, "activation": {"bits": 4}},
        "seed": seed,
        "protocol": "all",
        "profile": "paper",
        "versions": {"torch": "2"},
        "device": "cpu",
        "metrics": {
            "full_precision": {"top1": 90.0, "top5": 99.0},
            "rounded_to_nearest": {"top1": 70.0 + seed, "top5": 98.0},
            "quantized": {"top1": top1, "top5": 98.5},
            "num_samples": 500,
        },
        "bits": {"weight_average": weight_bits, "activation_average": 4.25},
        "size_bytes": {"full_precision": 99000, "quantized": 12345},
        "packs": [["b"]] * packs,
        "reconstruction": [{"steps": steps} for _ in range(packs + 2)],
        "seconds": {
            "calibration": 10.0,
            "scoring": 15.0,
            "sensitivity": 5.0,
            "reconstruction": {"total": 60.0 * (seed + 1)},
            "total": 1.0,
        },
    }


def test_spread_is_mean_sample_deviation_and_extremes() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found["std"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # n - 1 degrees of freedom
    assert (found["mean"], found["min"], found["max"]) == (3.0, 1.0, 6.0)
    assert spread([5.0]) == {"mean": 5.0, "std": None, "min": 5.0, "max": 5.0}


def test_keys_that_a_recipe_goes_before_are_told() -> None:
    changed = {"q": {"recipe.reconstruction.batch_size": {"stated": 32, "given": 16}}}
    comparison = compare_reports({"q": [report(0, 80.0)]}, planned=1, overridden=changed)
    assert comparison["overridden"] == changed
    line = "What recipes state goes before keys: q has recipe.reconstruction.batch_size 32 instead of 16."
    assert line in markdown(comparison).splitlines()


def test_row_holds_the_spread_and_every_run() -> None:
    found = row("qdrop", [report(0, 80.0), report(3, 82.0, packs=4)])
    assert found["recipe"] == "qdrop"
    assert found["seeds"] == [0, 3]
    assert found["metrics"]["top1"] == {"mean": 81.0, "std": pytest.approx(math.sqrt(2)), "min": 80.0, "max": 82.0}
    assert found["rounded_to_nearest"]["top1"]["mean"] == 71.5
    assert (found["total_steps"]["min"], found["total_steps"]["max"]) == (40, 60)
    assert found["steps_per_unit"]["mean"] == 10
    assert found["minutes"] == pytest.approx((90 + 270) / 2 / 60)
    assert found["full_precision"] == {"top1": 90.0, "top5": 99.0}
    assert [run["metrics"]["top1"] for run in found["runs"]] == [80.0, 82.0]
    assert [run["seconds"] for run in found["runs"]] == [90, 270]
    assert (found["device"], found["protocol"]) == (["cpu"], "all")


def test_tuning_counts_as_steps_and_time() -> None:
    tuned = report(0, 80.0) | {"tuning": {"steps": 7, "seconds": 30.0}}
    tuned["seconds"] = tuned["seconds"] | {"tuning": 30.0}
    plain = report(0, 80.0) | {"tuning": None}
    plain["seconds"] = plain["seconds"] | {"tuning": 0.0}
    found = [row("r", [each]) for each in (tuned, plain, report(0, 80.0))]
    assert [r["total_steps"]["mean"] for r in found] == [47, 40, 40]
    assert [r["steps_per_unit"]["mean"] for r in found] == [10, 10, 10]
    assert [r["minutes"] for r in found] == pytest.approx([2, 1.5, 1.5])


def test_rows_keep_the_order_and_unfinished_recipes_have_none() -> None:
    found = compare_reports({"z": [report(0, 80.0)], "none": [], "a": [report(0, 81.0)]}, planned=6, overridden={})
    assert [r["recipe"] for r in found["rows"]] == ["z", "a"]
    assert (found["runs_finished"], found["runs_planned"]) == (2, 6)
    assert "Not finished: 2 of 6 runs are done." in markdown(found)
    assert json.loads(json.dumps(found)) == found


def test_markdown_is_one_table_with_all_that_was_spent() -> None:
    reports = {"rtn": [report(0, 70.0, steps=0)], "q": [report(0, 80.0), report(1, 82.0, packs=3, weight_bits=3.5)]}
    lines = markdown(compare_reports(reports, planned=3, overridden={})).splitlines()
    assert lines[0] == "# Net (depth 20), W3A4, all"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(cells) for cells in table}) == 1
    cells = [dict(zip(table[0], line, strict=True)) for line in table[2:]]
    assert cells[0] == {
        "recipe": "rtn",
        "top1": "70.00",
        "top5": "98.50",
        "bits W / A": "3.00 / 4.25",
        "size kB": "12.3",
        "steps a unit": "0",
        "steps in all": "0",
        "packs": "2",
        "minutes": "1.5",
        "seeds": "0",
    }
    assert cells[1]["top1"] == "81.00 ± 1.41 (80.00 to 82.00)"
    assert cells[1]["bits W / A"] == "3.00 to 3.50 / 4.25"
    assert (cells[1]["packs"], cells[1]["steps in all"], cells[1]["seeds"]) == ("2 to 3", "40 to 50", "0, 1")
    text = "\n".join(lines)
    assert "Full precision: top1 90.00, top5 99.00. Measured on 500 test samples" in text
    assert "protocol all, profile paper, device cpu" in text
    assert "Not finished" not in text


def test_nearness_is_shown_where_all_runs_have_it() -> None:
    def near(seed: int, agreement: float, kl: float) -> dict:
        return report(seed, 80.0) | {"fidelity": {"quantized": {"agreement": agreement, "kl": kl}}}

    def head(reports: dict) -> list[str]:
        lines = markdown(compare_reports(reports, planned=3, overridden={})).splitlines()
        return [cell.strip() for cell in lines[2].strip("|").split("|")]

    runs = [near(0, 96.0, 0.02), near(1, 98.0, 0.04)]
    assert row("q", runs)["fidelity"]["kl"]["mean"] == pytest.approx(0.03)
    text = markdown(compare_reports({"q": runs}, planned=2, overridden={}))
    assert "| 97.00 ± 1.41 (96.00 to 98.00) | 0.0300 ± 0.0141 (0.0200 to 0.0400) |" in text
    assert "Same class: as full precision gives, in percent. KL: from full precision, in nats." in text
    assert head({"q": runs})[3:5] == ["same class", "KL"]
    for older in ({"q": [runs[0], report(1, 80.0)]}, {"q": runs, "r": [report(0, 80.0)]}):
        assert "KL" not in head(older)
