"""Frozen records that cross between the rooms of the house; each checks itself and goes through JSON."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pack_ptq.errors import refuse

BITS = range(2, 9)
BitGranularity = Literal["pack", "layer"]
ActivationKind = Literal["uniform", "focusing", "log_sqrt2", "row_scaled"]
ProductPrecision = Literal["highest", "high", "medium"]
KINDS_OF_ALL: tuple[ActivationKind, ...] = ("uniform", "focusing", "log_sqrt2")
KINDS: tuple[ActivationKind, ...] = (*KINDS_OF_ALL, "row_scaled")  # which needs rows of at least 0
SEEDS = range(2**32)  # as NumPy takes them
SEEDS_IN_WORDS = f"0 or more, up to {SEEDS[-1]}"


class Record:
    """JSON in and out for the frozen dataclasses below."""

    def to_json(self) -> dict[str, Any]:
        """Give the record as plain dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build the record again from what `to_json` gave; records inside it must be built by the caller."""
        return cls(**values)


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise refuse(key, value, ", ".join(choices))


@dataclass(frozen=True)
class Preprocessing(Record):
    """How a network wants its images.

    Attributes:
        image_size: Height and width in pixels after the crop.
        mean: Per channel, for pixel values in [0, 1].
        std: Per channel, for pixel values in [0, 1].
        crop_ratio: Side of the crop over the side of the resized image, in (0, 1].
        interpolation: Name in torchvision's `InterpolationMode`: nearest, bilinear, bicubic, lanczos.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float = 1.0
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class QuantizerSpec(Record):
    """How numbers of one kind (weights or activations) become codes.

    Attributes:
        bits: Width of a code, 2 to 8.
        observer: Where the range comes from: the extremes, a percentile, or the smallest L2.4 error (METHOD P3).
        percentile: Share of the values kept inside the range by the `percentile` observer, in (50, 100].
        per_channel: One scale per output channel (weights only) instead of one per tensor.
    """

    bits: int = 4
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    per_channel: bool = True

    def check(self, key: str) -> None:
        """Refuse values out of range, naming them below `key`.

        Raises:
            UserError: `observer` is unknown, `bits` or `percentile` is out of range.
        """
        _check_choice(f"{key}.observer", self.observer, ("minmax", "percentile", "mse"))
        if self.bits not in BITS:
            raise refuse(f"{key}.bits", self.bits, "2 to 8")
        if not 50 < self.percentile <= 100:
            raise refuse(f"{key}.percentile", self.percentile, "above 50 and at most 100")


@dataclass(frozen=True)
class LowRankSpec(Record):
    """How the linear layers of a unit are compensated before their weights are rounded (AIQViT, METHOD A2).

    Attributes:
        ranks: Candidates, of which each layer takes those below both its sizes. Where every layer is left with one,
            nothing is searched, and the steps of the search fit that one.
        search_steps: Steps that find each layer's rank, by turns on the candidates and on the choice between them; 0
            for no compensation.
        fit_steps: Further steps on the chosen candidates alone.
        learning_rate: Adam's rate for the candidates, relative to the root mean square of a layer's weights; in the
            further steps a cosine to 0.
        alpha_lr: Adam's last rate for the choice, to which it rises linearly from 0.
        drop_path: Share of the candidates left out of a step on the candidates, in [0, 1).
        held_out: Share of the samples that only the choice sees while it is searched, above 0 and at most 0.5.
        order: Whether the compensation is fitted `before` weights are quantized at all, or `joint`, with weights that
            are rounded to nearest.
    """

    ranks: tuple[int, ...] = (10, 20, 50, 100, 150)
    search_steps: int = 0
    fit_steps: int = 500
    learning_rate: float = 1e-3
    alpha_lr: float = 3e-3
    drop_path: float = 0.2
    held_out: float = 0.25
    order: Literal["before", "joint"] = "before"

    def check(self, key: str) -> None:
        """Refuse values out of range, naming them below `key`.

        Raises:
            UserError: Ranks are missing, repeated or below 1, a count or rate is too low, a share out of range, or the
                order is unknown.
        """
        _check_choice(f"{key}.order", self.order, ("before", "joint"))
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise refuse(f"{key}.ranks", list(self.ranks), "one or more different ranks, each 1 or more")
        for name in ("search_steps", "fit_steps"):
            if getattr(self, name) < 0:
                raise refuse(f"{key}.{name}", getattr(self, name), "0 or more")
        for name in ("learning_rate", "alpha_lr"):
            if not getattr(self, name) > 0:
                raise refuse(f"{key}.{name}", getattr(self, name), "above 0")
        if not 0 <= self.drop_path < 1:
            raise refuse(f"{key}.drop_path", self.drop_path, "at least 0 and below 1")
        if not 0 < self.held_out <= 0.5:
            raise refuse(f"{key}.held_out", self.held_out, "above 0 and at most 0.5")


@dataclass(frozen=True)
class ReconstructionSpec(Record):
    """How one pack is fitted (METHOD P3).

    Attributes:
        steps: Optimisation steps per unit, 0 for rounding to nearest without a fit; if not given, the recipe's `budget`
            decides.
        batch_size: Samples per step, taken from the activation cache.
        rounding_lr: Adam's rate for AdaRound's variables in a fit of 1000 steps; in others it goes as one over the root
            of their number, since in fewer steps each must go further (`rounding_rate`).
        activation_scale_lr: Adam's first rate for activation scales, relative to the scale; cosine to 0; 0 keeps them
            fixed.
        weight_scale_lr: The same for weight scales.
        input_drop: Share of the pack's input elements taken from the full-precision path (QDrop), in [0, 1].
        inner_drop: Share of the elements inside the pack that stay unquantized in a step (QDrop), in [0, 1].
        penalty_weight: Weight of the rounding penalty.
        penalty_start: Share of the steps before the penalty begins, in [0, 1).
        beta: First and last exponent of the penalty.
        evaluations: How often the hardened pack is measured while fitting; the best iterate is kept.
        cache_bytes: Memory for cached activations; what does not fit goes into memory-mapped files.
        loss: Error at the output of what is fitted: `mse` counts every element alike, `fisher` by the diagonal of the
            Fisher information (BRECQ, arXiv 2102.05426).
        granularity: What is fitted at once: a whole `pack`, or its layers one after the other, each with all `steps`
            (AdaRound, arXiv 2004.10568).
        low_rank: Compensation of linear layers before their weights are rounded.
        start: Where roundings begin: at the `weights` themselves, or where `gptq` leaves them, each input's weights
            making up for the rounding of those before (arXiv 2210.17323). Without steps the codes are those. Layers
            with more than 8192 weights for an output channel, and transposed convolutions, begin at their weights.
        curriculum: Share of the samples, those of the lowest loss, that the first batches are drawn from; it grows
            linearly to all of them (AIQViT, METHOD A4). In (0, 1]; if not given, all batches are drawn from all.
        bias_lr: Adam's first rate for corrections of biases, relative to the root mean square of their layer's output
            error; above 0 they start at its mean (arXiv 1906.04721), at 0 there are none. If not given, 0.01 in units
            with attention or GELU, whose activations are unlike those that ReLU cuts, and 0 in others.
    """

    steps: int | None = None
    batch_size: int = 32
    rounding_lr: float = 7e-3
    activation_scale_lr: float = 3e-3
    weight_scale_lr: float = 1e-3
    input_drop: float = 0.5
    inner_drop: float = 0.5
    penalty_weight: float = 0.01
    penalty_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    evaluations: int = 4
    cache_bytes: int = 4 * 2**30
    loss: Literal["mse", "fisher"] = "mse"
    granularity: Literal["pack", "layer"] = "pack"
    low_rank: LowRankSpec = field(default_factory=LowRankSpec)
    start: Literal["weights", "gptq"] = "weights"
    curriculum: float | None = None
    bias_lr: float | None = None

    def check(self, key: str) -> None:
        """Refuse values out of range, naming them below `key`.

        Raises:
            UserError: A count is too low, a share outside [0, 1], a choice unknown, or `fisher` asked of layers.
        """
        _check_choice(f"{key}.loss", self.loss, ("mse", "fisher"))
        _check_choice(f"{key}.granularity", self.granularity, ("pack", "layer"))
        _check_choice(f"{key}.start", self.start, ("weights", "gptq"))
        self.low_rank.check(f"{key}.low_rank")
        if self.curriculum is not None and not 0 < self.curriculum <= 1:
            raise refuse(f"{key}.curriculum", self.curriculum, "above 0 and at most 1")
        if self.loss == "fisher" and self.granularity == "layer":
            raise refuse(f"{key}.loss", self.loss, f"mse, or {key}.granularity pack")
        for name, least in (("steps", 0), ("batch_size", 1), ("evaluations", 1), ("cache_bytes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise refuse(f"{key}.{name}", value, f"{least} or more")
        for name in ("input_drop", "inner_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise refuse(f"{key}.{name}", getattr(self, name), "0 to 1")
        if not 0 <= self.penalty_start < 1:
            raise refuse(f"{key}.penalty_start", self.penalty_start, "at least 0 and below 1")
        for name in ("rounding_lr", "activation_scale_lr", "weight_scale_lr", "bias_lr", "penalty_weight"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise refuse(f"{key}.{name}", value, "0 or more")


@dataclass(frozen=True)
class TuningSpec(Record):
    """How scales and biases of the whole network are tuned when its codes are fixed.

    Attributes:
        steps: Optimisation steps, 0 for none; if not given, the recipe's `budget` decides.
        batch_size: Samples per step.
        weight_scale_lr: Adam's first rate for weight scales at up to 3 bits, relative to the scale. Every rate falls
            as a cosine to 0.
        activation_scale_lr: The same for activation scales, whatever the bits.
        bias_lr: As `weight_scale_lr` for biases, relative to the root mean square of a layer's biases; where all are 0,
            they stay.
        rate_power: Above 3 bits these two rates are lower by `(7 / (2^bits - 1))^rate_power`, 0 or more: 2 with the
            variance of the rounding error, 4 with its square, which short passes want.
        feature_weight: Of the squared error of what the last block gives, relative to its mean square, beside the
            divergence of the output in nats; 0 takes the output alone.
        average_views: Fit every view of a sample to the mean of the class probabilities over all its views, where the
            output is one row of classes a sample. The same mean judges what is kept.
        views: How often each calibration sample is taken at most, where the datamodule can `augment`: once as it is,
            then changed. No more are made than the steps use up.
        held_out: Share of the calibration samples, drawn at random, that judge the pass; neither it nor the fits of
            units see them.
        slow_share: Of all rates, below 1, for another pass of as many steps from the same start: what convolutional
            networks gain from is too fast for transformers and mobile ones. 0 for none.
        evaluations: How often a pass is judged; the best iterate is kept, unless the start is better by more than
            twice the standard error of the difference, or has less than half the divergence.
        first_drop: All rates are lowered by one factor until the first step promises to lower the loss by no more than
            this share of it, above 0; without it they stay as they are.
    """

    steps: int | None = None
    batch_size: int = 32
    weight_scale_lr: float = 1e-2
    activation_scale_lr: float = 3e-3
    bias_lr: float = 1e-2
    rate_power: float = 2.0
    feature_weight: float = 10.0
    average_views: bool = True
    views: int = 8
    held_out: float = 0.125
    slow_share: float = 0.2
    evaluations: int = 4
    first_drop: float | None = 0.3

    def check(self, key: str) -> None:
        """Refuse values out of range, naming them below `key`.

        Raises:
            UserError: A count is too low, a rate below 0, or all rates are 0 and there are steps to make.
        """
        if self.steps is not None and self.steps < 0:
            raise refuse(f"{key}.steps", self.steps, "0 or more")
        for name in ("batch_size", "views", "evaluations"):
            if getattr(self, name) < 1:
                raise refuse(f"{key}.{name}", getattr(self, name), "1 or more")
        if not 0 < self.held_out <= 0.5:
            raise refuse(f"{key}.held_out", self.held_out, "above 0 and at most 0.5")
        if not 0 <= self.slow_share < 1:
            raise refuse(f"{key}.slow_share", self.slow_share, "at least 0 and below 1")
        rates = ("weight_scale_lr", "activation_scale_lr", "bias_lr")
        for name in (*rates, "rate_power", "feature_weight"):
            if not getattr(self, name) >= 0:
                raise refuse(f"{key}.{name}", getattr(self, name), "0 or more")
        if self.first_drop is not None and not self.first_drop > 0:
            raise refuse(f"{key}.first_drop", self.first_drop, "above 0, or null for rates as they are")
        if self.steps != 0 and not any(getattr(self, name) for name in rates):
            raise refuse(f"{key}.{rates[0]}", 0.0, f"above 0, or {rates[1]} or {rates[2]} above 0")


TUNING_STEPS = {"fast": 100, "default": 1000, "best": 2000}
STEPS = {"fast": 60, "default": 1000, "best": 5000}


@dataclass(frozen=True)
class Recipe(Record):
    """What is quantized to how many bits, and with how much effort.

    Attributes:
        weight: For weights.
        activation: For the inputs of quantized layers; always per tensor.
        protocol: Treatment of the first and last layer, as METHOD.md names it.
        profile: `paper` has asymmetric weights; `deploy` has symmetric signed weights per channel and an int32 bias.
        budget: Steps per unit where `reconstruction.steps` is not given: 60, 1000 or 5000; and of the last pass where
            `tuning.steps` is not: 100, 1000 or 2000.
        reconstruction: Settings of the fit.
        tuning: Settings of the last pass over the whole network.
        layer_norm: `per_tensor` takes the outputs of LayerNorm as they are; `reparameterised` moves a scale and a zero
            point of every channel into the norm and the layers that read it (RepQ-ViT, METHOD A1).
        post_softmax: Codes of attention probabilities: `uniform`; `focusing` on a learned part of the range (AIQViT,
            METHOD A3); `log_sqrt2` in steps of half a bit (RepQ-ViT), which no integer runtime executes; `row_scaled`
            beside the largest of each row, by which the product's output is multiplied again.
        post_gelu: The same for what follows a GELU, without `row_scaled`.
        split_channels: Extra codes for outlying channels of a linear layer's input over the number of its channels, at
            most, in [0, 1]; the layer grows by as many columns, and they count in bits and bytes.
        activation_noise: Whether linear layers add fixed noise to their inputs before they quantize them, its amplitude
            `searched` by the layer's output error (NoisyQuant, arXiv 2211.16056); a runtime then adds one vector more.
        bias_correction: `input_mean` lets every bias take up what the rounded weights add to the layer's output on
            average, at all times while roundings and scales are fitted (arXiv 1906.04721, section 4.2).
    """

    weight: QuantizerSpec = field(default_factory=QuantizerSpec)
    activation: QuantizerSpec = field(default_factory=lambda: QuantizerSpec(per_channel=False))
    protocol: Literal["first_last_8", "all", "boundary_high"] = "first_last_8"
    profile: Literal["paper", "deploy"] = "paper"
    budget: Literal["fast", "default", "best"] = "default"
    reconstruction: ReconstructionSpec = field(default_factory=ReconstructionSpec)
    tuning: TuningSpec = field(default_factory=TuningSpec)
    layer_norm: Literal["per_tensor", "reparameterised"] = "reparameterised"
    post_softmax: ActivationKind = "row_scaled"
    post_gelu: ActivationKind = "uniform"
    split_channels: float = 0.0625
    activation_noise: Literal["none", "searched"] = "none"
    bias_correction: Literal["none", "input_mean"] = "input_mean"

    def __post_init__(self) -> None:
        _check_choice("recipe.protocol", self.protocol, ("first_last_8", "all", "boundary_high"))
        _check_choice("recipe.profile", self.profile, ("paper", "deploy"))
        _check_choice("recipe.layer_norm", self.layer_norm, ("per_tensor", "reparameterised"))
        _check_choice("recipe.post_softmax", self.post_softmax, KINDS)
        _check_choice("recipe.post_gelu", self.post_gelu, KINDS_OF_ALL)
        _check_choice("recipe.activation_noise", self.activation_noise, ("none", "searched"))
        _check_choice("recipe.bias_correction", self.bias_correction, ("none", "input_mean"))
        _check_choice("recipe.budget", self.budget, tuple(STEPS))
        if not 0 <= self.split_channels <= 1:
            raise refuse("recipe.split_channels", self.split_channels, "0 to 1")
        self.weight.check("recipe.weight")
        self.activation.check("recipe.activation")
        self.reconstruction.check("recipe.reconstruction")
        self.tuning.check("recipe.tuning")
        if self.activation.per_channel:
            raise refuse("recipe.activation.per_channel", True, "false (runtimes want one scale per tensor)")
        if self.profile == "deploy" and not self.weight.per_channel:
            raise refuse("recipe.weight.per_channel", False, "true with recipe.profile deploy")

    def kind_of(self, role: str) -> ActivationKind:
        """Give the kind of codes for values that come of `softmax`, of `gelu` or of `any` other operation."""
        kinds: dict[str, ActivationKind] = {"softmax": self.post_softmax, "gelu": self.post_gelu}
        return kinds.get(role, "uniform")

    @property
    def steps(self) -> int:
        """Optimisation steps per unit, 0 for no fit."""
        steps = self.reconstruction.steps
        return STEPS[self.budget] if steps is None else steps

    @property
    def tuning_steps(self) -> int:
        """Optimisation steps of the last pass over the whole network, 0 for none."""
        steps = self.tuning.steps
        return TUNING_STEPS[self.budget] if steps is None else steps


@dataclass(frozen=True)
class Hardware(Record):
    """Where the work runs.

    Attributes:
        accelerator: As Lightning names it.
        devices: Number of processes, one per device.
        matmul_precision: Of products in the steps of fits, as `torch.set_float32_matmul_precision` names it; `high`
            and `medium` let processors that can compute them with fewer bits (TF32, bfloat16) do so, and convolutions
            where these have a setting, which is on GPUs. All else is computed in full.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    devices: int = 1
    matmul_precision: ProductPrecision = "highest"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise refuse("hardware.devices", self.devices, "1 or more")


@dataclass(frozen=True)
class BlockScores(Record):
    """What scoring found out about each block, averaged over all calibration samples (METHOD P1).

    Attributes:
        names: Of the blocks, in execution order.
        scores: `S_b`, the estimated mean of the Hessian at the block's output.
        loss_increase: `E[L_q^b]`, in nats.
        squared_error: `E[dz^T dz]`, in squared units of the output.
        num_samples: Samples that were averaged.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...]
    loss_increase: tuple[float, ...]
    squared_error: tuple[float, ...]
    num_samples: int


@dataclass(frozen=True)
class Unit(Record):
    """Links `start..stop-1` of the chain, reconstructed together: the stem, a pack of blocks, or the head."""

    kind: Literal["stem", "pack", "head"]
    blocks: tuple[str, ...]
    start: int
    stop: int

    @property
    def name(self) -> str:
        """First block, and the last one if there are several."""
        return self.blocks[0] if len(self.blocks) == 1 else f"{self.blocks[0]}..{self.blocks[-1]}"


@dataclass(frozen=True)
class BitPlan(Record):
    """Bits of every layer; `None` for an input that is not quantized.

    Attributes:
        weight: Bits of the weight by layer path.
        activation: Bits of the input by layer path.
    """

    weight: dict[str, int]
    activation: dict[str, int | None]


@dataclass(frozen=True)
class PackSensitivity(Record):
    """What quantizing one pack alone does to the network's output: `KL(p_fp || p_q)` in nats, mean over samples.

    Attributes:
        name: Of the unit; where layers have bits of their own, of the first layer or product of those that share them.
        weight: By width of the weights, inputs unquantized.
        activation: By width of the layers' inputs, weights unquantized.
    """

    name: str
    weight: dict[int, float]
    activation: dict[int, float]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build the record again; JSON knows strings as keys only."""
        weight, activation = ({int(k): v for k, v in values[key].items()} for key in ("weight", "activation"))
        return cls(values["name"], weight, activation)


@dataclass(frozen=True)
class ParetoPoint(Record):
    """A bit assignment that no other one beats in both bytes of weights and predicted KL."""

    weight_bytes: int
    weight_average: float
    predicted_kl: float


@dataclass(frozen=True)
class MixedPrecision(Record):
    """How packs came to different bits (METHOD P4).

    Attributes:
        packs: Weight and activation bits by name of the pack, or of the layer or product where they have their own.
        predicted_kl: Sum of the chosen sensitivities, in nats.
        budget: Where the limits come from.
        limits: By resource, as `BitBudget` names them.
        sensitivity: Of every pack, layer or product.
        pareto: From few to many bytes of weights.
        granularity: What has bits of its own.
    """

    packs: dict[str, tuple[int, int]]
    predicted_kl: float
    budget: str
    limits: dict[str, float]
    sensitivity: tuple[PackSensitivity, ...]
    pareto: tuple[ParetoPoint, ...]
    granularity: BitGranularity = "pack"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build the record with the records inside it."""
        inside: dict[str, Any] = {
            "packs": {name: tuple(bits) for name, bits in values["packs"].items()},
            "sensitivity": tuple(PackSensitivity.from_json(pack) for pack in values["sensitivity"]),
            "pareto": tuple(ParetoPoint.from_json(point) for point in values["pareto"]),
        }
        return cls(**(values | inside))


@dataclass(frozen=True)
class UnitResult(Record):
    """How the reconstruction of a unit went.

    Attributes:
        name: Of the unit.
        blocks: Names of its blocks.
        steps: Optimisation steps that were made, on low-rank compensations too; where layers are fitted alone, of all
            its layers together.
        nearest_loss: Output error with weights rounded to nearest, in the measure of the fit's loss.
        final_loss: Output error with the hard codes that are kept.
        accepted: Whether the fit was better than rounding to nearest; if not, that is kept. Where layers are fitted
            alone this is decided for each, and here it is whether any was better.
        seconds: Time of the fit, caches included.
        ranks: Of the low-rank compensation that is kept, by layer path.
    """

    name: str
    blocks: tuple[str, ...]
    steps: int
    nearest_loss: float
    final_loss: float
    accepted: bool
    seconds: float
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TuningResult(Record):
    """How the last pass over the whole network went.

    Attributes:
        steps: Optimisation steps that were made, in one pass or two.
        before: `KL(p_fp || p_q)` on the held-out calibration samples before it, in nats, `p_fp` as in the fit.
        after: The same with what is kept.
        accepted: Whether something of it is kept; if not, all stays as it was. If so, `after` may be above `before`,
            by no more than chance.
        seconds: Time of the pass.
        rate_share: Factor by which all rates were lowered before the first step of the pass that is kept, or of the
            fastest if none is.
    """

    steps: int
    before: float
    after: float
    accepted: bool
    seconds: float
    rate_share: float = 1.0


@dataclass(frozen=True)
class Plan(Record):
    """What calibration has decided; `plan.json`.

    Attributes:
        scores: Of the blocks.
        units: That tile the chain.
        bits: Of every layer.
        input_shape: Of one sample.
        seconds: Time of calibration and scoring.
        mixed: How packs came to different bits, if they did.
    """

    scores: BlockScores
    units: tuple[Unit, ...]
    bits: BitPlan
    input_shape: tuple[int, ...]
    seconds: dict[str, float]
    mixed: MixedPrecision | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build the plan with the records inside it."""
        scores: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["scores"].items()}
        units = tuple(Unit(**(unit | {"blocks": tuple(unit["blocks"])})) for unit in values["units"])
        mixed = MixedPrecision.from_json(values["mixed"]) if values.get("mixed") else None
        shape, seconds = tuple(values["input_shape"]), values["seconds"]
        return cls(BlockScores(**scores), units, BitPlan(**values["bits"]), shape, seconds, mixed)
