"""How much each element of a unit's output matters to the network's: the diagonal Fisher information (BRECQ)."""

import torch
from torch import Tensor

from pack_ptq.cache import Storage, fill
from pack_ptq.distributed import all_reduce
from pack_ptq.errors import UserError
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.switch import quantized
from pack_ptq.losses import kl_from_full_precision
from pack_ptq.types import Unit


@torch.no_grad()
def squared_gradient(chain: Chain, unit: Unit, x: Tensor) -> Tensor:
    """Give `g^2`, `g = d KL(p_fp || p_q) / dz` at the output `z` of a unit that alone is rounded to nearest.

    At full precision the divergence is at its minimum and `g` is zero, so BRECQ takes `g` with quantized blocks.

    Args:
        chain: The prepared network with its ranges set, all quantizers off.
        unit: The links that are quantized.
        x: The unit's input in the full-precision network, shape (batch, ...).

    Returns:
        The square for every sample and element, in the form of the unit's output.

    Raises:
        UserError: No gradient comes through the links after the unit.
    """
    reference = chain.run(x, unit.start)
    with quantized(chain.operations_of(unit.start, unit.stop), "nearest"):
        output = chain.run(x, unit.start, unit.stop)
    with torch.enable_grad():
        output.requires_grad_()
        # Samples do not meet in the network, so the gradient of the sum holds each sample's own.
        divergence = kl_from_full_precision(chain.run(output, unit.stop).double(), reference.double()).sum()
    if not divergence.requires_grad:
        raise UserError(
            f"recipe.reconstruction.loss is 'fisher', but the output gives no gradient to {unit.name}; allowed: mse"
        )
    return torch.autograd.grad(divergence, output)[0].square()


def fisher_weights(chain: Chain, unit: Unit, inputs: Storage, batch_size: int) -> Storage:
    """Cache BRECQ's weights of the squared error at a unit's output (arXiv 2102.05426): `g^2` over its mean.

    The mean is over the unit's whole cache and all processes, so that losses keep the size of unweighted ones and the
    rounding penalty its balance with them. BRECQ's code differs: it quantizes all blocks up to this one, takes the KL
    averaged over a batch and weighs by `(|g| + 1)^2`; as such a `g` is far below 1, its weights are close to 1 each.

    Args:
        chain: The prepared network with its ranges set, all quantizers off.
        unit: The links that are to be fitted.
        inputs: The unit's input in the full-precision network.
        batch_size: Samples of one pass.

    Returns:
        Weights in the form of the unit's output; all 1 where nothing comes of quantizing the unit.

    Raises:
        UserError: A gradient is no number, or there is none.
    """
    batches = inputs.batches(batch_size)
    weights = fill(inputs.budget, len(inputs), batches, lambda x: squared_gradient(chain, unit, x))
    total = sum(rows.sum(dtype=torch.float64).item() for rows in weights.batches(batch_size))
    total, count = all_reduce(torch.tensor([total, weights.tensor.numel()], dtype=torch.float64)).tolist()
    mean = total / count
    if not mean < float("inf"):
        raise UserError(f"the Fisher information at the output of {unit.name} is {mean}; allowed: finite outputs")
    if mean > 0:
        weights.tensor.div_(mean)
    else:
        weights.tensor.fill_(1)
    return weights
