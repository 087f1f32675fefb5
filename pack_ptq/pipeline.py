"""The steps of one run. Each leaves its result in the run folder and is not done again when the run resumes."""

import copy
import json
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from pack_ptq.calibration import PASSES, set_ranges, watch_channels
from pack_ptq.callbacks import BitAssignment, Evaluation, HessianScoring, Observation, Packing
from pack_ptq.datamodules import PTQData
from pack_ptq.distributed import barrier
from pack_ptq.graph.chain import Chain
from pack_ptq.graph.norms import NormSite, find_norms, put_norms, reparameterise, watch_norms
from pack_ptq.graph.switch import switch
from pack_ptq.measurements import Measurements
from pack_ptq.modules.network import WholeNetwork
from pack_ptq.quant.quantizers import WeightMode
from pack_ptq.reconstruct import reconstruct
from pack_ptq.runs import TENSORBOARD, RunFolder
from pack_ptq.states import (
    put_ranges_state,
    put_tuned_state,
    put_unit_state,
    ranges_state,
    rest_state,
    tuned_state,
    unit_state,
)
from pack_ptq.trainers import is_first_process, make_trainer
from pack_ptq.tune import tune
from pack_ptq.types import BitPlan, Hardware, Plan, Recipe, TuningResult, Unit, UnitResult
from pack_ptq.views import Augment
from pack_ptq.workplace import Workplace


class Pipeline:
    """One network on its way, with what the steps share.

    Args:
        chain: The prepared network.
        data: Its samples.
        recipe: What to do.
        evaluation: How to measure.
        hardware: Where to run.
        seed: Of all random choices.
        folder: Where results go.
        show: Whether to tell the user what happens.
        measurements: Of other runs.
    """

    def __init__(
        self,
        chain: Chain,
        data: PTQData,
        recipe: Recipe,
        evaluation: Evaluation,
        hardware: Hardware,
        seed: int,
        folder: RunFolder,
        show: bool,
        measurements: Measurements | None = None,
    ) -> None:
        self.chain, self.data, self.recipe, self.evaluation = chain, data, recipe, evaluation
        self.hardware, self.folder, self.measurements = hardware, folder, measurements
        self.is_first = is_first_process()
        self.logger = TensorBoardLogger(folder.path, name="", version=TENSORBOARD)
        self.place = Workplace(seed, hardware, self.logger, folder.path, show and self.is_first)
        self.device = torch.device("cpu")
        self.reference = copy.deepcopy(chain.network)  # whose biases no tuning moves

    def _say(self, message: str) -> None:
        if self.place.show:
            print(message, flush=True)

    def start_processes(self) -> None:
        """Start the other processes, if any, and find this one's device and share of the data."""
        trainer = make_trainer(self.hardware, [], val_batches=1)
        if self.hardware.devices > 1:
            trainer.validate(WholeNetwork(self.chain), self.data, verbose=False)
        self.device = trainer.strategy.root_device

    def measure(self, what: str, weights: WeightMode) -> dict[str, float]:
        """Measure the network with its weights in a mode; only full precision (`off`) keeps its activations."""
        measured = json.loads(self.folder.measured.read_text()) if self.folder.measured.exists() else {}
        if what not in measured:
            file = self.measurements.file(self.chain, weights) if self.measurements else None
            values = Measurements.read(file) if file else None
            if values is None:
                values = self._test(what, weights)
                if file:
                    Measurements.write(file, values)
            measured["num_samples"] = values["num_samples"]
            measured[what] = values["metrics"]
            if values.get("fidelity"):  # older measurements have none
                measured.setdefault("fidelity", {})[what] = values["fidelity"]
            if self.is_first:
                self.folder.write_json(self.folder.measured, measured)
            switch(self.chain.operations, "off", activations=False)
            barrier()
        return measured[what]

    def _test(self, what: str, weights: WeightMode) -> dict[str, Any]:
        self._say(f"measuring: {what.replace('_', ' ')}")
        switch(self.chain.operations, weights, activations=weights != "off")
        found, reference = self.evaluation, None if weights == "off" else self.reference
        module = WholeNetwork(self.chain, reference=reference)
        make_trainer(self.hardware, [found]).test(module, self.data, verbose=False)
        return {"metrics": {**found.values}, "num_samples": found.num_samples, "fidelity": {**found.fidelity}}

    def plan(self, scoring: HessianScoring, packing: Packing, bits: BitAssignment) -> Plan:
        """Observe ranges, score blocks, form packs and assign bits, and put the ranges in place."""
        if self.folder.calibration.exists():
            put_norms(self.chain, self.folder.read_tensors(self.folder.norms))
        else:
            self._decide(scoring, packing, bits)
        barrier()
        put_ranges_state(self.chain, self.folder.read_tensors(self.folder.calibration))
        return Plan.from_json(json.loads(self.folder.plan.read_text()))

    def _decide(self, scoring: HessianScoring, packing: Packing, bits: BitAssignment) -> None:
        self._say("calibrating ranges")
        sites = self._norms()
        watch_norms(self.chain, sites)
        if self.recipe.split_channels > 0:
            watch_channels(self.chain)
        calibration = sum(self._validate([Observation(what)], forward=True) for what in PASSES)
        norms = reparameterise(self.chain, sites, self.recipe.activation.bits)
        recipe, chain = self.recipe, self.chain
        weight = dict.fromkeys(chain.layers, recipe.weight.bits)
        uniform = BitPlan(weight, dict.fromkeys(chain.quantizers, recipe.activation.bits))
        set_ranges(self.chain, uniform, recipe)
        self._say("scoring blocks")
        together: list[L.Callback] = [scoring, packing] if bits.needs_pass else [scoring, packing, bits]
        seconds = {"calibration": calibration, "scoring": self._validate(together, forward=False, logger=self.logger)}
        if bits.needs_pass:
            self._say("measuring sensitivities to bits")
            bits.units = packing.units
            seconds["sensitivity"] = self._validate([bits], forward=False, logger=self.logger)
        assert scoring.scores is not None
        assert bits.plan is not None
        set_ranges(self.chain, bits.plan, recipe, before=uniform)
        if self.is_first:
            units, shape = tuple(packing.units), self.chain.input_shape
            plan = Plan(scoring.scores, units, bits.plan, shape, seconds, bits.mixed)
            self.folder.write_json(self.folder.plan, plan.to_json())
            self.folder.write_tensors(self.folder.network, rest_state(self.chain))
            self.folder.write_tensors(self.folder.norms, norms)
            self.folder.write_tensors(self.folder.calibration, ranges_state(self.chain))

    def _norms(self) -> list[NormSite]:
        if self.recipe.layer_norm == "per_tensor":
            return []
        example = torch.randn(2, *self.chain.input_shape, generator=torch.Generator().manual_seed(0))
        return find_norms(self.chain, example.to(next(self.chain.network.parameters()).device))

    def _validate(self, callbacks: list[L.Callback], forward: bool, logger: TensorBoardLogger | None = None) -> float:
        began = time.perf_counter()
        trainer = make_trainer(self.hardware, callbacks, logger)
        trainer.validate(WholeNetwork(self.chain, forward), self.data, verbose=False)
        return time.perf_counter() - began

    @property
    def _augment(self) -> Augment | None:
        return self.data.augment if self.data.augments else None

    def reconstruct(self, plan: Plan) -> list[UnitResult]:
        """Reconstruct the units that no earlier run has finished."""
        self.chain.network.to(self.device)
        units, batches = list(plan.units), self.data.val_dataloader()
        return reconstruct(self.chain, units, batches, self.recipe, self.place, self._load_unit, self._save_unit)

    def tune(self) -> TuningResult | None:
        """Tune the whole network, if the recipe says so and no earlier run has."""
        if not self.recipe.tuning_steps:
            return None
        if not self.folder.tuned.exists():
            self._say("tuning scales and biases")
            result = tune(self.chain, self.data.val_dataloader(), self.recipe, self.place, self._augment)
            if self.is_first:
                self.folder.write_tensors(self.folder.tuned, tuned_state(self.chain, result))
        barrier()
        return put_tuned_state(self.chain, self.folder.read_tensors(self.folder.tuned))

    def _load_unit(self, index: int) -> UnitResult | None:
        path = self.folder.pack(index)
        return put_unit_state(self.chain, self.folder.read_tensors(path)) if path.exists() else None

    def _save_unit(self, index: int, unit: Unit, result: UnitResult) -> None:
        if self.is_first:
            self.folder.write_tensors(self.folder.pack(index), unit_state(self.chain, unit, result))
        barrier()
