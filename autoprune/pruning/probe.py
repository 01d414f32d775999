"""Measuring many pruned variants of one network on the same samples, each against the intact one.

Two ways, with one result. `WholeProbe` builds each variant and evaluates it, whatever the network does.
`ReplayProbe` records the network once: per batch it runs the intact network and keeps the values that the
variants need, and per variant it runs again only what the masked weights reach (`replay`, `fuse`). Its
variants are the masked networks, which compute what the dense ones do.

Where variants have their batch-norm statistics estimated anew, `ReplayProbe` does so for the norms that the
change reaches, `WholeProbe` for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data import Split
from autoprune.errors import AutopruneError, TraceError
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning.fuse import channels_last, fused
from autoprune.pruning.replay import (
    NotReplayableError,
    Program,
    Replay,
    Suffix,
    Values,
    calibrating,
    program,
    suffix,
)
from autoprune.structure import ChannelGraph, densify, masked, masked_tensors, record
from autoprune.tasks import CLASSIFICATION, Loss, Task, logits_of
from autoprune.training import (
    EVAL_BATCH,
    borrowed,
    evaluate,
    recalibrate_,
)

CHANGED = 1e-6  # relative; float32 rounding of another channel count stays below
CHANGE_BATCH = 64
CORE_BATCH = 64  # samples per core and batch: what a batch makes stays in the caches; measured: 2x over 512
CUT_BYTES = 2**29  # of kept values per batch; a guess that fits beside anything
WEIGHT_BYTES = 2**29  # of changed weights in one pass over the split; more variants take further passes
AGREES = 1e-3  # of the largest output, replayed against the network's own; rounding is 1e-6 on ResNets
NUM_CHECKED = 3  # variants compared with their masked networks before the replay is trusted


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all variants of one network are measured by.

    Attributes:
        calibration: training data that estimate the batch-norm statistics anew; None leaves them alone.
        num_batches, batch_size: of the calibration.
        exact: repeat the network's own arithmetic instead of faster steps.
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
class Measured:
    """One variant: what it scores, and whether its output differs from the intact network's at all."""

    evaluation: Evaluation
    changed: bool


class Probe(Protocol):
    """A way to measure variants."""

    @property
    def baseline(self) -> Evaluation:
        """The intact network on the same samples."""

    def measure(self, plans: Sequence[PruningPlan]) -> Iterator[Measured]:
        """Each variant in turn."""


def choose_probe(bench: Bench) -> tuple[Probe, str]:
    """The faster way if it reproduces this network, otherwise the general one and why."""
    if bench.task.score is not None:
        return WholeProbe(bench), "the study has its own evaluate"
    if not bench.graph.groups:
        return WholeProbe(bench), "there is nothing to prune"
    try:
        replayed = ReplayProbe(bench)
        replayed.check()
    except (NotReplayableError, TraceError) as error:
        return WholeProbe(bench), str(error)
    except AutopruneError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return WholeProbe(bench), f"the replay failed: {reason[:120]}"
    return replayed, ""


class WholeProbe:
    """Each variant as a dense network of its own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @cached_property
    def baseline(self) -> Evaluation:
        """The intact network."""
        return self._evaluate(self.bench.model)

    def measure(self, plans: Sequence[PruningPlan]) -> Iterator[Measured]:
        """Build, recalibrate, evaluate, forget."""
        bench = self.bench
        for plan in plans:
            pruned = densify(bench.model, bench.graph, plan)
            changed = differs(self._output(pruned), self._intact)
            if bench.calibration is not None:
                recalibrate_(
                    pruned, bench.calibration, num_batches=bench.num_batches, batch_size=bench.batch_size,
                    device=bench.device,
                )  # fmt: skip
            yield Measured(evaluation=self._evaluate(pruned), changed=changed)

    @cached_property
    def _intact(self) -> Tensor:
        return self._output(self.bench.model)

    @cached_property
    def _sample(self) -> Tensor:
        return next(self.bench.split.batches(CHANGE_BATCH, device=self.bench.device))[0]

    def _evaluate(self, model: nn.Module) -> Evaluation:
        bench = self.bench
        return evaluate(model, bench.split, device=bench.device, task=bench.task)

    def _output(self, model: nn.Module) -> Tensor:
        with borrowed(model, self.bench.device, training=False), torch.no_grad():
            return in_a_row(model(self._sample))


def in_a_row(output: Any) -> Tensor:
    """Everything that a model says, in one row."""
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    return torch.cat([x.detach().flatten().double() for x in leaves]) if leaves else torch.zeros(0)


def differs(output: Tensor, intact: Tensor) -> bool:
    """Whether an output is another one, beyond rounding."""
    if output.shape != intact.shape:
        return True
    scale = float(intact.abs().max()) if len(intact) else 0.0
    return len(intact) > 0 and not float((output - intact).abs().max()) <= CHANGED * scale


@dataclass(frozen=True, kw_only=True, eq=False)
class _Compiled:
    """A program for one batch size, ready to run, with the names of the statistics that it gives out."""

    program: Program
    replay: Replay
    statistics: Mapping[int, str] = field(default_factory=dict)
    suffixes: dict[frozenset[str], Suffix] = field(default_factory=dict)

    def suffix(self, names: Iterable[str]) -> Suffix:
        """What these weights reach."""
        key = frozenset(names)
        if key not in self.suffixes:
            self.suffixes[key] = suffix(self.program, key)
        return self.suffixes[key]

    def needed(self, part: Suffix) -> set[int]:
        """What `outputs` takes from a run of the whole program."""
        return {*part.cut, *(v for i, v in enumerate(self.program.outputs) if i not in part.outputs)}

    def outputs(self, part: Suffix, bound: Values, kept: Values) -> list[Tensor]:
        """All outputs with some weights changed."""
        new = self.replay.rerun(part, bound, kept)
        return [new.get(i, kept.get(v)) for i, v in enumerate(self.program.outputs)]  # type: ignore[misc]


@dataclass(kw_only=True, eq=False)
class Tally:
    """What one network has scored so far."""

    losses: float = 0.0
    correct: list[NDArray[np.bool_]] = field(default_factory=list)
    changed: bool = False

    def add(self, output: Any, targets: Tensor, loss: Loss) -> None:
        """Count one batch."""
        self.losses += float(loss(output, targets)) * len(targets)
        self.correct.append((logits_of(output).argmax(1) == targets).cpu().numpy())

    @property
    def evaluation(self) -> Evaluation:
        """Of all batches so far."""
        hits = np.concatenate(self.correct)
        return Evaluation(
            top1=float(hits.mean()), loss=self.losses / len(hits), num_samples=len(hits), correct=hits
        )


class ReplayProbe:
    """Each variant as the part of the recorded pass that its masked weights reach."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.loss = bench, bench.task.loss
        self.compiled: dict[tuple[int, bool], _Compiled] = {}
        self._baseline: Evaluation | None = None
        with self._weights() as weights:
            self.names = {g.name: self._masked_names(g.name, weights) for g in bench.graph.groups}
            self.batch = self._fitting_batch(weights)
            self.sample = next(bench.split.batches(self.batch, device=bench.device))[0]
            with borrowed(bench.model, bench.device, training=False), torch.no_grad():
                self.leaves, self.structure = tree_flatten(bench.model(self.sample))

    @property
    def baseline(self) -> Evaluation:
        """The intact network, by the same steps."""
        if self._baseline is None:
            list(self.measure([]))
        assert self._baseline is not None
        return self._baseline

    def check(self) -> None:
        """See that the replay gives what the network gives, intact and masked.

        Raises:
            NotReplayableError: it does not.
        """
        bench, groups = self.bench, self.bench.graph.groups
        spread = np.unique(np.linspace(0, len(groups) - 1, NUM_CHECKED).round().astype(int))
        plans = [_half(groups[i].name, groups[i].num_units) for i in spread]
        with self._weights() as weights:
            compiled = self._for(len(self.sample), weights)
            kept = compiled.replay.run(self.sample)
            found = [[kept[v] for v in compiled.program.outputs]]
            for plan in plans:
                changed = masked_tensors(bench.graph, plan, weights, readers_only=self._readers_only)
                part = compiled.suffix(changed)
                found.append(compiled.outputs(part, compiled.replay.bind(part, changed), kept))
        with borrowed(bench.model, bench.device, training=False), torch.no_grad():
            models = [bench.model, *(masked(bench.model, bench.graph, p).eval() for p in plans)]
            for model, outputs in zip(models, found, strict=True):
                want, got = in_a_row(model(self.sample)), in_a_row(outputs)
                if got.shape != want.shape or not agree(got, want):
                    raise NotReplayableError("its replay does not give what the network gives")

    def measure(self, plans: Sequence[PruningPlan]) -> Iterator[Measured]:
        """All variants in one pass over the split, or in as few as memory allows."""
        with self._weights() as weights, torch.no_grad():
            for chunk in self._chunks(plans, weights) or [[]]:
                yield from self._measure(chunk, weights)

    def _measure(self, plans: list[dict[str, Tensor]], weights: dict[str, Tensor]) -> list[Measured]:
        changes = self._recalibrated(plans, weights)
        tallies, intact, bound = [Tally() for _ in plans], Tally(), dict[tuple[int, int], Values]()
        replays: dict[int, Replay] = {}
        for number, (inputs, targets) in enumerate(
            self.bench.split.batches(self.batch, device=self.bench.device)
        ):
            compiled = self._for(len(inputs), weights)
            is_whole = number == 0 or self._baseline is None
            if not is_whole and len(inputs) not in replays:
                needed = (compiled.needed(compiled.suffix(c)) for c in changes)
                replays[len(inputs)] = compiled.replay.narrowed(frozenset[int]().union(*needed))
            kept = (compiled.replay if is_whole else replays[len(inputs)]).run(inputs)
            whole = [kept[v] for v in compiled.program.outputs] if is_whole else []
            if self._baseline is None:
                intact.add(self._output(whole), targets, self.loss)
            for index, changed in enumerate(changes):
                part, key = compiled.suffix(changed), (len(inputs), index)
                if key not in bound:
                    bound[key] = compiled.replay.bind(part, changed)
                outputs = compiled.outputs(part, bound[key], kept)
                if number == 0:
                    tallies[index].changed = differs(in_a_row(outputs), in_a_row(whole))
                tallies[index].add(self._output(outputs), targets, self.loss)
        self._baseline = self._baseline or intact.evaluation
        return [Measured(evaluation=t.evaluation, changed=t.changed) for t in tallies]

    def _recalibrated(
        self, plans: list[dict[str, Tensor]], weights: dict[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Each variant's changed weights with the statistics of the norms that they reach."""
        bench = self.bench
        if bench.calibration is None or not plans:
            return plans
        batches = bench.calibration.batches(bench.batch_size, device=bench.device, seed=0, augment=True)
        sums: list[dict[str, Tensor]] = [{} for _ in plans]
        count = 0
        for count, (inputs, _) in zip(range(1, bench.num_batches + 1), batches, strict=False):  # noqa: B007
            compiled = self._for(len(inputs), weights, calibrates=True)
            if not compiled.statistics:
                return plans
            kept = compiled.replay.run(inputs)
            for found, changed in zip(sums, plans, strict=True):
                part = compiled.suffix(changed)
                outputs = compiled.replay.rerun(part, compiled.replay.bind(part, changed), kept)
                for index, value in outputs.items():
                    name = compiled.statistics[part.outputs[index]]
                    found[name] = found[name] + value if name in found else value
        return [
            changed | {n: (v / count).to(weights[n].dtype) for n, v in found.items()}
            for changed, found in zip(plans, sums, strict=True)
        ]

    def _output(self, outputs: list[Tensor]) -> Any:
        """The model's output as its own forward would give it."""
        new = iter(outputs)
        return tree_unflatten(
            [next(new) if isinstance(x, Tensor) else x for x in self.leaves], self.structure
        )

    @contextmanager
    def _weights(self) -> Iterator[dict[str, Tensor]]:
        """Parameters and buffers by name, where and as the replay wants them."""
        bench = self.bench
        with borrowed(bench.model, bench.device, training=False), torch.no_grad():
            named = [
                *bench.model.named_parameters(remove_duplicate=False),
                *bench.model.named_buffers(remove_duplicate=False),
            ]
            weights = {n: t.detach() for n, t in named}
            yield weights if bench.exact else channels_last(weights)

    @property
    def _readers_only(self) -> bool:
        return not self.bench.graph.norm_widths

    def _masked_names(self, name: str, weights: dict[str, Tensor]) -> frozenset[str]:
        plan = _half(name, self.bench.graph.group(name).num_units)
        return frozenset(
            masked_tensors(self.bench.graph, plan, weights, readers_only=self._readers_only)
        )  # fmt: skip

    def _chunks(
        self, plans: Sequence[PruningPlan], weights: dict[str, Tensor]
    ) -> list[list[dict[str, Tensor]]]:
        """The variants' changed weights, in parts that fit into memory together."""
        chunks: list[list[dict[str, Tensor]]] = []
        used = 0
        for plan in plans:
            changed = masked_tensors(self.bench.graph, plan, weights, readers_only=self._readers_only)
            size = sum(t.numel() * t.element_size() for t in changed.values())
            if not chunks or used + size > WEIGHT_BYTES:
                chunks.append([])
                used = 0
            chunks[-1].append(changed)
            used += size
        return chunks

    def _fitting_batch(self, weights: dict[str, Tensor]) -> int:
        """The usual batch, halved until what is kept of one fits."""
        bench, on_cpu = self.bench, self.bench.device.type == "cpu"
        size = EVAL_BATCH if bench.exact or not on_cpu else CORE_BATCH * torch.get_num_threads()
        size = min(size, len(bench.split))
        while True:
            compiled = self._for(size, weights)
            kept = frozenset[int]().union(*(compiled.suffix(n).cut for n in self.names.values()))
            shapes = compiled.program.shapes
            if size == 1 or sum(4 * int(np.prod(shapes.get(v, ()))) for v in kept) <= CUT_BYTES:
                return size
            size //= 2

    def _for(self, size: int, weights: dict[str, Tensor], *, calibrates: bool = False) -> _Compiled:
        """The program for batches of this size, compiled once."""
        if (size, calibrates) not in self.compiled:
            self.compiled[size, calibrates] = self._compile(size, weights, calibrates)
        return self.compiled[size, calibrates]

    def _compile(self, size: int, weights: dict[str, Tensor], calibrates: bool) -> _Compiled:
        bench, names = self.bench, dict[int, str]()
        example = next(bench.split.take(np.zeros(1, dtype=np.int64)).batches(1, device=bench.device))[0]
        inputs = torch.zeros((size, *example.shape[1:]), dtype=example.dtype, device=bench.device)
        recording = record(bench.model, (inputs,))
        whole = made = program(recording, bench.device)
        if calibrates:
            made, names = calibrating(made)
        elif not bench.exact:
            whole = made = fused(made, weights, bench.device)
        kept = frozenset[int]().union(*(suffix(made, n).cut for n in self.names.values()))
        return _Compiled(program=made, replay=Replay(whole, weights, kept), statistics=names)


def miscounted(bench: Bench, plans: Sequence[PruningPlan]) -> tuple[str, ...]:
    """The groups whose pruned network does not cost what was predicted, by torch's own counter.

    Empty where the counter does not agree about the intact network: then it sees other operators.
    """
    graph, inputs = bench.graph, next(bench.split.batches(1, device=bench.device))[0]

    def counted(plan: PruningPlan) -> int:
        model = densify(bench.model, graph, plan).requires_grad_(False)  # the counter looks for gradients
        with (
            borrowed(model, bench.device, training=False),
            torch.no_grad(),
            FlopCounterMode(display=False) as found,
        ):
            model(inputs)
        return int(found.get_total_flops()) // 2

    if not plans or counted(PruningPlan.full(graph)) != graph.cost().macs:
        return ()
    return tuple(", ".join(p.keep) for p in plans if counted(p) != graph.cost(p).macs)


def _half(name: str, num_units: int) -> PruningPlan:
    keep = np.arange(num_units // 2, num_units, dtype=np.int64)
    return PruningPlan(keep={name: keep}, num_units={name: num_units})


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    scale = float(want.abs().max()) if len(want) else 0.0
    return len(want) == 0 or float((got - want).abs().max()) <= AGREES * scale
