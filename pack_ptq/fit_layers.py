"""Fit the layers of a unit one after the other, each alone, as AdaRound does (arXiv 2004.10568)."""

from dataclasses import replace

from torch import Tensor

from pack_ptq.cache import fill
from pack_ptq.fit_part import Outcome, fit_part
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.part import layer_part, layer_rows, unit_part
from pack_ptq.graph.switch import Operations, quantized, switch
from pack_ptq.modules.output_error import output_error
from pack_ptq.modules.pack_data import PackData
from pack_ptq.quant.layers import QuantizedLayer
from pack_ptq.types import Recipe, Unit
from pack_ptq.views import derived_seed
from pack_ptq.workplace import Workplace


def fit_layers(chain: Chain, unit: Unit, data: PackData, recipe: Recipe, place: Workplace, label: str) -> Outcome:
    """Fit the layers in execution order and leave them with hard codes; the errors given are the unit's.

    Args:
        chain: The prepared network with its ranges set, all quantizers off.
        unit: That the layers belong to.
        data: Cached activations of the unit.
        recipe: Settings and number of steps of each layer.
        place: Where to run; its seed is of this unit and process.
        label: Of the unit's curves in TensorBoard, to which the layers' paths are added.
    """
    spec, whole = recipe.reconstruction, unit_part(chain, unit, label)
    with quantized(whole.operations, "nearest"):
        nearest_loss = output_error(whole.run, data)
    done: list[QuantizedLayer] = []
    outcomes: list[Outcome] = []
    for index, (path, rows) in enumerate(layer_rows(chain, list(whole.layers)).items()):
        part, layer = layer_part(chain, unit, path, label), whole.layers[path]
        before: Operations = [*done, *whole.products.values()]
        values = _layer_data(chain, unit, path, rows, data, before, spec.batch_size)
        # Layers that read the same tensor share its scale; moving it again would undo the fit of the first.
        is_free = all(other.input_quantizer is not layer.input_quantizer for other in done)
        of_layer = replace(
            spec,
            batch_size=spec.batch_size * rows,
            activation_scale_lr=spec.activation_scale_lr if is_free else 0.0,
        )
        alone = replace(recipe, reconstruction=of_layer)
        outcomes.append(fit_part(part, values, alone, replace(place, seed=derived_seed(place.seed, index))))
        values.close()
        switch([layer], "off", activations=False)
        done.append(layer)
    with quantized(whole.operations, "hard"):
        final_loss = output_error(whole.run, data)
    accepted, steps = any(each.accepted for each in outcomes), sum(each.steps for each in outcomes)
    ranks = {path: rank for each in outcomes for path, rank in each.ranks.items()}
    return Outcome(nearest_loss, final_loss, accepted, steps, ranks)


def _layer_data(
    chain: Chain, unit: Unit, path: str, rows: int, data: PackData, done: Operations, batch_size: int
) -> PackData:
    """Cache what a layer reads in both networks, behind the layers that are `done`, and its full-precision output.

    Args:
        chain: The prepared network, all quantizers off.
        unit: That the layer belongs to.
        path: Of the layer.
        rows: Of the layer's input per sample.
        data: Of the unit.
        done: Layers of the unit with hard codes, and its products.
        batch_size: Samples of one pass.
    """
    budget, count = data.target.budget, rows * len(data.target)

    def read(x: Tensor) -> Tensor:
        return chain.layer_input(x, unit.start, path)

    full = fill(budget, count, data.full_input.batches(batch_size), read)
    target = fill(budget, count, full.batches(batch_size * rows), chain.layers[path])
    with quantized(done, "hard"):
        low = fill(budget, count, data.quantized_input.batches(batch_size), read)
    return PackData(full, low, target)
