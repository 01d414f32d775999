"""The evaluation of many pruned variants of one network on the same samples, each against the intact one.

Two evaluators give one result. `DenseEvaluator` builds each variant and evaluates it, whatever the network
does. `PartialEvaluator` records the network once: per batch it runs the intact network and keeps the values
that the variants need, and per variant it runs again only the steps that the masked weights reach
(`partial_forward`). Its variants are the masked networks, which compute the same as the dense networks.

Where variants have their batch-norm statistics estimated anew, `PartialEvaluator` does so for the norms
that the change reaches, and `DenseEvaluator` for all norms. `evaluate_fast` evaluates one network by the
same faster steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data import Split
from autoprune.errors import AutopruneError, TraceError
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning.partial_forward import (
    Executor,
    NotRepeatableError,
    Program,
    Suffix,
    Values,
    find_suffix,
    fuse,
    make_calibration_program,
    make_program,
    to_channels_last,
)
from autoprune.structure import ChannelGraph, densify, masked, masked_tensors, record
from autoprune.tasks import CLASSIFICATION, Loss, Task, logits_of
from autoprune.torch_private import tree_flatten, tree_leaves, tree_unflatten
from autoprune.training import (
    EVAL_BATCH,
    evaluate,
    model_mode,
    recalibrate_,
)

CHANGED = 1e-6  # relative; the float32 rounding of another channel count stays below this
CHANGE_BATCH = 64  # samples whose outputs are compared to detect a change; a guess
CORE_BATCH = 64  # samples per core and batch, whose activations stay in the caches; measured: 2x over 512
CUT_BYTES = 2**29  # of kept values per batch; a guess that fits beside anything
WEIGHT_BYTES = 2**29  # of changed weights in one pass; more variants take further passes. A guess
ROUNDING = 1e-3  # of the largest output, between program and network; rounding is 1e-6 on ResNets
NUM_CHECKED = 3  # variants compared with masked networks first: of the first, middle and last group


@dataclass(frozen=True, kw_only=True, eq=False)
class VariantSetup:
    """The network, the samples and the settings by which all variants of one network are measured.

    Attributes:
        model: the intact network that `graph` was traced from.
        split: the samples that the variants are evaluated on.
        calibration: training data that estimate the batch-norm statistics anew; None leaves them alone.
        num_batches, batch_size: the number and the size of the calibration's batches.
        exact: whether to repeat the network's own arithmetic instead of faster steps.
    """

    model: nn.Module
    graph: ChannelGraph
    split: Split
    device: torch.device
    calibration: Split | None = None
    num_batches: int = 0
    batch_size: int = 128
    task: Task = CLASSIFICATION
    exact: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class VariantResult:
    """The evaluation of one variant, and whether its output differs from the intact network's at all."""

    evaluation: Evaluation
    changed: bool


class VariantEvaluator(Protocol):
    """An evaluator of the pruned variants of one network."""

    @property
    def baseline(self) -> Evaluation:
        """The evaluation of the intact network on the same samples."""

    def measure(self, plans: Sequence[PruningPlan]) -> Iterator[VariantResult]:
        """Measure each variant in turn, and give the results in the order of the plans."""


def choose_evaluator(setup: VariantSetup) -> tuple[VariantEvaluator, str]:
    """Return the faster evaluator if it reproduces the network, otherwise the general one and why."""
    if setup.task.score is not None:
        return DenseEvaluator(setup), "the study has its own evaluate"
    if not setup.graph.groups:
        return DenseEvaluator(setup), "there is nothing to prune"
    try:
        partial = PartialEvaluator(setup)
        partial.check()
    except (NotRepeatableError, TraceError) as error:
        return DenseEvaluator(setup), str(error)
    except AutopruneError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return DenseEvaluator(setup), f"the partial pass failed: {reason[:120]}"
    return partial, ""


class DenseEvaluator:
    """An evaluator that builds each variant as a dense network of its own."""

    def __init__(self, setup: VariantSetup) -> None:
        self.setup = setup

    @cached_property
    def baseline(self) -> Evaluation:
        """The evaluation of the intact network."""
        return self._evaluate(self.setup.model)

    def measure(self, plans: Sequence[PruningPlan]) -> Iterator[VariantResult]:
        """Build, recalibrate and evaluate each variant in turn."""
        setup = self.setup
        for plan in plans:
            pruned = densify(setup.model, setup.graph, plan)
            changed = differs(self._output(pruned), self._intact)
            if setup.calibration is not None:
                recalibrate_(
                    pruned, setup.calibration, num_batches=setup.num_batches, batch_size=setup.batch_size,
                    device=setup.device,
                )  # fmt: skip
            yield VariantResult(evaluation=self._evaluate(pruned), changed=changed)

    @cached_property
    def _intact(self) -> Tensor:
        return self._output(self.setup.model)

    @cached_property
    def _sample(self) -> Tensor:
        return next(self.setup.split.batches(CHANGE_BATCH, device=self.setup.device))[0]

    def _evaluate(self, model: nn.Module) -> Evaluation:
        setup = self.setup
        return evaluate(model, setup.split, device=setup.device, task=setup.task)

    def _output(self, model: nn.Module) -> Tensor:
        with model_mode(model, self.setup.device, training=False), torch.no_grad():
            return flat_output(model(self._sample))


def flat_output(output: Any) -> Tensor:
    """Return all tensors of an output as one vector (N,), in float64."""
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    return torch.cat([x.detach().flatten().double() for x in leaves]) if leaves else torch.zeros(0)


def differs(output: Tensor, intact: Tensor) -> bool:
    """Return whether an output differs from the intact network's, beyond rounding."""
    if output.shape != intact.shape:
        return True
    scale = float(intact.abs().max()) if len(intact) else 0.0
    return len(intact) > 0 and not float((output - intact).abs().max()) <= CHANGED * scale


@dataclass(frozen=True, kw_only=True, eq=False)
class _Compiled:
    """A program for one batch size, ready to run, with the names of the statistics among its outputs."""

    program: Program
    executor: Executor
    statistics: Mapping[int, str] = field(default_factory=dict)
    suffixes: dict[frozenset[str], Suffix] = field(default_factory=dict)

    def suffix(self, names: Iterable[str]) -> Suffix:
        """Return the suffix that the weights of these names reach."""
        key = frozenset(names)
        if key not in self.suffixes:
            self.suffixes[key] = find_suffix(self.program, key)
        return self.suffixes[key]

    def needed(self, part: Suffix) -> set[int]:
        """Return the values that `outputs` takes from a run of the whole program."""
        return {*part.cut, *(v for i, v in enumerate(self.program.outputs) if i not in part.outputs)}

    def outputs(self, part: Suffix, bound: Values, cut_values: Values) -> list[Tensor]:
        """Return all outputs of the program with some weights changed."""
        new = self.executor.run_suffix(part, bound, cut_values)
        return [new.get(i, cut_values.get(v)) for i, v in enumerate(self.program.outputs)]  # type: ignore[misc]


@dataclass(kw_only=True, eq=False)
class Tally:
    """The running counts of one network: its loss and its correct samples."""

    losses: float = 0.0
    correct: list[NDArray[np.bool_]] = field(default_factory=list)
    changed: bool = False

    def add(self, output: Any, targets: Tensor, loss: Loss) -> None:
        """Add the loss and the correct samples of one batch."""
        self.losses += float(loss(output, targets)) * len(targets)
        self.correct.append((logits_of(output).argmax(1) == targets).cpu().numpy())

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation of all batches so far."""
        hits = np.concatenate(self.correct)
        return Evaluation(
            top1=float(hits.mean()), loss=self.losses / len(hits), num_samples=len(hits), correct=hits
        )


class PartialEvaluator:
    """An evaluator that runs only the part of a recorded pass that a variant's masked weights reach."""

    def __init__(self, setup: VariantSetup) -> None:
        self.setup, self.loss = setup, setup.task.loss
        self.compiled: dict[tuple[int, bool], _Compiled] = {}
        self._baseline: Evaluation | None = None
        with self._weights() as weights:
            self.names = {g.name: self._masked_names(g.name, weights) for g in setup.graph.groups}
            self.batch = self._fitting_batch(weights)
            self.sample = next(setup.split.batches(self.batch, device=setup.device))[0]
            with model_mode(setup.model, setup.device, training=False), torch.no_grad():
                self.leaves, self.structure = tree_flatten(setup.model(self.sample))

    @property
    def baseline(self) -> Evaluation:
        """The evaluation of the intact network, by the same steps."""
        if self._baseline is None:
            list(self.measure([]))
        assert self._baseline is not None
        return self._baseline

    def check(self) -> None:
        """Check that the program gives the same outputs as the network, intact and masked.

        Raises:
            NotRepeatableError: an output differs beyond rounding.
        """
        setup, groups = self.setup, self.setup.graph.groups
        spread = np.unique(np.linspace(0, len(groups) - 1, NUM_CHECKED).round().astype(int))
        plans = [_half(groups[i].name, groups[i].num_units) for i in spread]
        with self._weights() as weights:
            compiled = self._for(len(self.sample), weights)
            values = compiled.executor.run(self.sample)
            results = [[values[v] for v in compiled.program.outputs]]
            for plan in plans:
                changed = masked_tensors(setup.graph, plan, weights, readers_only=self._readers_only)
                part = compiled.suffix(changed)
                results.append(compiled.outputs(part, compiled.executor.bind(part, changed), values))
        with model_mode(setup.model, setup.device, training=False), torch.no_grad():
            models = [setup.model, *(masked(setup.model, setup.graph, p).eval() for p in plans)]
            for model, outputs in zip(models, results, strict=True):
                expected, actual = flat_output(model(self.sample)), flat_output(outputs)
                if actual.shape != expected.shape or not outputs_match(actual, expected):
                    raise NotRepeatableError("its recorded pass does not give what the network gives")

    def measure(self, plans: Sequence[PruningPlan]) -> Iterator[VariantResult]:
        """Measure all variants in one pass over the split, or in as few passes as memory allows."""
        with self._weights() as weights, torch.no_grad():
            for chunk in self._chunks(plans, weights) or [[]]:
                yield from self._measure(chunk, weights)

    def _measure(self, plans: list[dict[str, Tensor]], weights: dict[str, Tensor]) -> list[VariantResult]:
        changes = self._recalibrated(plans, weights)
        tallies, intact, bound = [Tally() for _ in plans], Tally(), dict[tuple[int, int], Values]()
        executors: dict[int, Executor] = {}
        for number, (inputs, targets) in enumerate(
            self.setup.split.batches(self.batch, device=self.setup.device)
        ):
            compiled = self._for(len(inputs), weights)
            is_whole = number == 0 or self._baseline is None
            if not is_whole and len(inputs) not in executors:
                needed = (compiled.needed(compiled.suffix(c)) for c in changes)
                executors[len(inputs)] = compiled.executor.restricted_to(frozenset[int]().union(*needed))
            values = (compiled.executor if is_whole else executors[len(inputs)]).run(inputs)
            whole = [values[v] for v in compiled.program.outputs] if is_whole else []
            if self._baseline is None:
                intact.add(self._output(whole), targets, self.loss)
            for index, changed in enumerate(changes):
                part, key = compiled.suffix(changed), (len(inputs), index)
                if key not in bound:
                    bound[key] = compiled.executor.bind(part, changed)
                outputs = compiled.outputs(part, bound[key], values)
                if number == 0:
                    tallies[index].changed = differs(flat_output(outputs), flat_output(whole))
                tallies[index].add(self._output(outputs), targets, self.loss)
        self._baseline = self._baseline or intact.evaluation
        return [VariantResult(evaluation=t.evaluation, changed=t.changed) for t in tallies]

    def _recalibrated(
        self, plans: list[dict[str, Tensor]], weights: dict[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Return each variant's changed weights with the statistics of the norms that they reach."""
        setup = self.setup
        if setup.calibration is None or not plans:
            return plans
        batches = setup.calibration.batches(setup.batch_size, device=setup.device, seed=0, augment=True)
        sums: list[dict[str, Tensor]] = [{} for _ in plans]
        count = 0
        for count, (inputs, _) in zip(range(1, setup.num_batches + 1), batches, strict=False):  # noqa: B007
            compiled = self._for(len(inputs), weights, calibrates=True)
            if not compiled.statistics:
                return plans
            values = compiled.executor.run(inputs)
            for statistics, changed in zip(sums, plans, strict=True):
                part = compiled.suffix(changed)
                outputs = compiled.executor.run_suffix(part, compiled.executor.bind(part, changed), values)
                for index, value in outputs.items():
                    name = compiled.statistics[part.outputs[index]]
                    statistics[name] = statistics[name] + value if name in statistics else value
        return [
            changed | {n: (v / count).to(weights[n].dtype) for n, v in statistics.items()}
            for changed, statistics in zip(plans, sums, strict=True)
        ]

    def _output(self, outputs: list[Tensor]) -> Any:
        """Return the outputs in the structure that the model's own forward returns."""
        new = iter(outputs)
        return tree_unflatten(
            [next(new) if isinstance(x, Tensor) else x for x in self.leaves], self.structure
        )

    @contextmanager
    def _weights(self) -> Iterator[dict[str, Tensor]]:
        """Give the parameters and buffers by name, on the device and in the layout of the program."""
        setup = self.setup
        with model_mode(setup.model, setup.device, training=False), torch.no_grad():
            named = [
                *setup.model.named_parameters(remove_duplicate=False),
                *setup.model.named_buffers(remove_duplicate=False),
            ]
            weights = {n: t.detach() for n, t in named}
            yield weights if setup.exact else to_channels_last(weights)

    @property
    def _readers_only(self) -> bool:
        return not self.setup.graph.norm_widths

    def _masked_names(self, name: str, weights: dict[str, Tensor]) -> frozenset[str]:
        plan = _half(name, self.setup.graph.group(name).num_units)
        return frozenset(
            masked_tensors(self.setup.graph, plan, weights, readers_only=self._readers_only)
        )  # fmt: skip

    def _chunks(
        self, plans: Sequence[PruningPlan], weights: dict[str, Tensor]
    ) -> list[list[dict[str, Tensor]]]:
        """Return the variants' changed weights, in chunks that fit into memory."""
        chunks: list[list[dict[str, Tensor]]] = []
        num_bytes = 0
        for plan in plans:
            changed = masked_tensors(self.setup.graph, plan, weights, readers_only=self._readers_only)
            size = sum(t.numel() * t.element_size() for t in changed.values())
            if not chunks or num_bytes + size > WEIGHT_BYTES:
                chunks.append([])
                num_bytes = 0
            chunks[-1].append(changed)
            num_bytes += size
        return chunks

    def _fitting_batch(self, weights: dict[str, Tensor]) -> int:
        """Return the usual batch size, halved until the values kept of one batch fit into memory."""
        setup, on_cpu = self.setup, self.setup.device.type == "cpu"
        size = EVAL_BATCH if setup.exact or not on_cpu else CORE_BATCH * torch.get_num_threads()
        size = min(size, len(setup.split))
        while True:
            compiled = self._for(size, weights)
            cut = frozenset[int]().union(*(compiled.suffix(n).cut for n in self.names.values()))
            shapes = compiled.program.shapes
            if size == 1 or sum(4 * int(np.prod(shapes.get(v, ()))) for v in cut) <= CUT_BYTES:
                return size
            size //= 2

    def _for(self, size: int, weights: dict[str, Tensor], *, calibrates: bool = False) -> _Compiled:
        """Return the program for batches of this size, which is compiled once."""
        if (size, calibrates) not in self.compiled:
            self.compiled[size, calibrates] = self._compile(size, weights, calibrates)
        return self.compiled[size, calibrates]

    def _compile(self, size: int, weights: dict[str, Tensor], calibrates: bool) -> _Compiled:
        setup, names = self.setup, dict[int, str]()
        example = next(setup.split.take(np.zeros(1, dtype=np.int64)).batches(1, device=setup.device))[0]
        inputs = torch.zeros((size, *example.shape[1:]), dtype=example.dtype, device=setup.device)
        recording = record(setup.model, (inputs,))
        full = program = make_program(recording, setup.device)
        if calibrates:
            program, names = make_calibration_program(program)
        elif not setup.exact:
            full = program = fuse(program, weights, setup.device)
        cut = frozenset[int]().union(*(find_suffix(program, n).cut for n in self.names.values()))
        return _Compiled(program=program, executor=Executor(full, weights, cut), statistics=names)


def miscounted(setup: VariantSetup, plans: Sequence[PruningPlan]) -> tuple[str, ...]:
    """Return the names of groups whose pruned network does not have the predicted cost, by torch's counter.

    The result is empty where the counter disagrees about the intact network: then it sees other operators.
    """
    graph, inputs = setup.graph, next(setup.split.batches(1, device=setup.device))[0]

    def counted(plan: PruningPlan) -> int:
        model = densify(setup.model, graph, plan).requires_grad_(False)  # the counter looks for gradients
        with (
            model_mode(model, setup.device, training=False),
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            model(inputs)
        return int(counter.get_total_flops()) // 2

    if not plans or counted(PruningPlan.full(graph)) != graph.cost().macs:
        return ()
    return tuple(", ".join(p.keep) for p in plans if counted(p) != graph.cost(p).macs)


def _half(name: str, num_units: int) -> PruningPlan:
    keep = np.arange(num_units // 2, num_units, dtype=np.int64)
    return PruningPlan(keep={name: keep}, num_units={name: num_units})


def outputs_match(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two flat outputs of one length are the same but for rounding."""
    scale = float(expected.abs().max()) if len(expected) else 0.0
    return len(expected) == 0 or float((actual - expected).abs().max()) <= ROUNDING * scale


def evaluate_fast(setup: VariantSetup, model: nn.Module) -> Evaluation:
    """Evaluate a network on the setup's samples, recorded and run in fewer, faster steps where that works.

    The recording, about a tenth of a second, pays on a CPU only. The first batch is compared with the
    network's own output; where they differ, or the pass cannot be repeated, the network is evaluated as it
    is.
    """
    if setup.device.type == "cpu" and setup.task.score is None and not setup.exact:
        with suppress(NotRepeatableError, TraceError, RuntimeError, NotImplementedError, TypeError, KeyError):
            return _evaluate_recorded(setup, model)
    return evaluate(model, setup.split, device=setup.device, task=setup.task)


def _evaluate_recorded(setup: VariantSetup, model: nn.Module) -> Evaluation:
    loss, tally, size = setup.task.loss, Tally(), CORE_BATCH * torch.get_num_threads()
    executors: dict[int, Executor] = {}
    with model_mode(model, setup.device, training=False), torch.no_grad():
        named = (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        weights = to_channels_last({n: t.detach() for n, t in named})
        for inputs, targets in setup.split.batches(size, device=setup.device):
            if len(inputs) not in executors:
                program = fuse(make_program(record(model, (inputs,)), setup.device), weights, setup.device)
                executors[len(inputs)] = Executor(program, weights)
                leaves, structure = tree_flatten(model(inputs))
            executor = executors[len(inputs)]
            values = executor.run(inputs)
            new = [values[v] for v in executor.program.outputs]
            output = tree_unflatten([new.pop(0) if isinstance(x, Tensor) else x for x in leaves], structure)
            if not tally.correct and not outputs_match(flat_output(output), flat_output(leaves)):
                raise NotRepeatableError("its recorded pass does not give what the network gives")
            tally.add(output, targets, loss)
    return tally.evaluation
