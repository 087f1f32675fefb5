"""Compare recipes on shipped configurations, with the project's own weights and samples; the tables of docs/results.md.

python benchmarks/accuracy.py --configs cifar10/resnet20_w3a3 --recipes none qdrop --out runs/accuracy [any key]

Each configuration gets the folder OUT/CONFIG of one `pack-ptq compare`: run folders, comparison.md and comparison.json.
Weights and samples are looked for in PACK_PTQ_ASSETS; `digits_*` and `solids_*` have their own. Keys after the options
go to every run.
"""

from comparing import compare, options


def main() -> None:
    parser = options(__doc__, out="runs/accuracy")
    parser.add_argument("--recipes", nargs="+", default=["none"])
    chosen, keys = parser.parse_known_args()
    compare(chosen, chosen.recipes, keys)


if __name__ == "__main__":
    main()
