"""The loader: steps of packed rows, exact at every step, whatever the number of processes.

    mixture -> slot 0: draw, encode, wait in the buffer, pack -> row 0 of every step
               slot 1:                ...                   -> row 1
               ...

A step has S slots. Each draws its own examples and packs its own rows, so rank r of R takes the
slots r, r + R, ..., some at a time, and 1 process, 4 processes and gradient accumulation see the
same rows. B rows of T tokens.
"""

from __future__ import annotations

import signal
import time
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from nanomolmo2.batch import IGNORED_LABEL, PACK_SUBSEGMENT, PREFIX_SUBSEGMENT, Batch
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.fields import RowLimits
from nanomolmo2.data.inspect import Encode, read_record
from nanomolmo2.data.mixture import Mixture, SlotStream
from nanomolmo2.data.packing import PACKING_BUFFER, Packer, count_crops, join
from nanomolmo2.data.preflight import preflight
from nanomolmo2.data.worker import Failure, guarded, received
from nanomolmo2.processor import Encoded, collate
from nanomolmo2.processor.collate import labels_of, subsegments_of

AHEAD = 2  # steps that a worker prepares while another is learned from
FEW = 100  # examples drawn before the fraction of bad ones is judged
# Row limits that a state of the data must agree with: key in the state, field of `RowPlan`.
STATE_KEYS = {
    "max_tokens": "max_tokens",
    "max_crops": "max_crops",
    "pool": "packing_buffer",
    "crop_weight": "crop_weight",
}


@dataclass
class Step:
    """What one process learns from in one step.

    Attributes:
        micro_batches: rows of this process's slots, the longest first, some at a time. The loss is
            a sum over all of them and all processes, divided by the weight of all their labels.
        tasks: of every branch of these rows, in reading order.
        branches: for each micro-batch (B, T) int64, which of ``tasks`` a token belongs to; -1 for
            what branches share, and for padding.
        state: of the data behind this step, plain JSON types; see `PackedLoader.load_state_dict`.
        counts: of this step: ``rows``, ``examples``, ``crops``, ``tokens`` (real ones), ``padding``
            (filled up in the micro-batches), ``capacity`` (tokens that the rows could hold).
        bad: examples left out since the beginning of the run, by cause.
        drawn: examples drawn since the beginning of the run; of replay none.
        waited: seconds until the step was there.
        first_bad: of every cause, a sentence on the first example that this process left out.
    """

    micro_batches: list[Batch]
    tasks: list[str]
    branches: list[Tensor]
    state: dict[str, Any]
    counts: dict[str, int]
    bad: dict[str, int]
    drawn: int
    waited: float = 0.0
    first_bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowPlan:
    """The rows of a step: how many, what each holds, and how they are padded together.

    Attributes:
        batch_size: S, rows of a step in all processes together.
        max_tokens, max_crops, packing_buffer, crop_weight: see `Packer`.
        micro_batch_size: rows of one process that are padded together; fewer are left for the last
            of a step if they do not divide.
    """

    batch_size: int
    max_tokens: int
    max_crops: int
    pad_token_id: int
    micro_batch_size: int = 1
    packing_buffer: int = PACKING_BUFFER
    crop_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}, expected at least 1")

    def packer(self) -> Packer[_Waiting]:
        """An empty packer of one slot."""
        return Packer(self.max_tokens, self.max_crops, self.packing_buffer, self.crop_weight)


class PackedLoader:
    """Endless steps: ``for step in loader``. What was prepared and not handed out is drawn again.

    ``state_dict`` is that of the last step handed out.
    """

    def __init__(
        self,
        mixture: Mixture,
        encode: Encode,
        rows: RowPlan,
        *,
        rank: int = 0,
        world: int = 1,
        workers: Literal[0, 1] = 0,
        max_bad_fraction: float = 0.05,
        kept_bytes: int = 2 * 2**30,
    ) -> None:
        """
        Args:
            encode: an `Example` as the model sees it, the same at every call; branch k of it has
                subsegment k. ValueError for one that cannot be encoded.
            rank, world: this process of so many; ``rows.batch_size`` is a multiple of ``world``.
            workers: 1 prepares steps in another process, 0 between steps.
            max_bad_fraction: fraction of bad examples that is put up with, below 1. Each counts
                once, however often it is drawn.
            kept_bytes: most memory for images that wait in the packing buffers of this process;
                examples beyond it are encoded a second time when they get their row.
        Raises: ValueError for numbers that do not fit each other.
        """
        if not 0 <= rank < world or rows.batch_size < 1 or rows.batch_size % world:
            raise ValueError(
                f"found batch_size {rows.batch_size} for rank {rank} of {world} processes: "
                f"expected a multiple of the number of processes, so that all have as many rows"
            )
        if workers not in (0, 1):
            raise ValueError(f"workers is {workers}, expected 0 or 1: every process has its own")
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(
                f"max_bad_fraction is {max_bad_fraction}, expected a fraction from 0 to below 1"
            )
        self.workers = workers
        self.waited = 0.0  # seconds over all steps
        slots = range(rank, rows.batch_size, world)
        self._maker = _StepMaker(mixture, encode, rows, slots, max_bad_fraction, kept_bytes)
        self._state = self._maker.state_dict()

    def __iter__(self) -> Iterator[Step]:
        """Steps behind the last one that was handed out.

        Raises: ValueError once too many examples are bad, naming the causes, or if one has changed
            while it waited.
        """
        self._maker.load_state_dict(self._state)
        steps: Any = iter(self._maker)
        if self.workers:
            steps = iter(
                DataLoader(
                    self._maker,
                    batch_size=None,
                    num_workers=1,
                    prefetch_factor=AHEAD,
                    worker_init_fn=_begin_worker,
                    # Else it would take a number from the generator that dropout draws from.
                    generator=torch.Generator(),
                )
            )
        try:
            while True:
                start = time.perf_counter()
                step = received(steps)
                step.waited = time.perf_counter() - start
                self.waited += step.waited
                self._state = step.state
                yield step
        finally:
            if self.workers:
                # Left to the garbage collector, a worker may not be told and be waited for.
                steps._shutdown_workers()

    def warnings(self) -> list[str]:
        """What is probably a mistake in the data, to be said before a run is spent on it: one
        sentence each, see `preflight`.
        """
        return preflight(self._maker.mixture.sources, self._maker.limits)

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, for the slots of this process; plain JSON types."""
        return self._state

    def expect_changes(self) -> None:
        """The data are not what they were when the state was taken: examples that wait are read
        anew before the next step, instead of being compared with what they were.
        """
        self._maker.changed = True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the step that ``state`` came with, or that `merge_states` put together.

        Packing buffers are kept as numbers of examples, which are encoded again when they get
        their row.

        Raises: ValueError if the state is of other data or rows, or lacks slots of this process.
        """
        self._maker.load_state_dict(state)
        self._state = self._maker.state_dict()


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The states of all processes as one, to go on with any number of them.

    Raises: ValueError if they are not of one run.
    """
    states = list(states)
    if not states:
        raise ValueError("found no states to merge")
    merged = {**states[0], "slots": {}}
    for state in states:
        if {**state, "slots": {}} != {**merged, "slots": {}}:
            raise ValueError("found states of the data from different runs: merge those of one")
        merged["slots"].update(state["slots"])
    return merged


@dataclass
class _Waiting:
    """An example in a packing buffer; without ``read`` after a resume, or if memory is short."""

    source: int
    index: int
    tokens: int
    crops: int
    read: _Read | None = None


@dataclass
class _Read:
    encoded: Encoded
    tasks: list[str]  # of its branches


class _Slot:
    """One stream of rows."""

    def __init__(self, stream: SlotStream, packer: Packer[_Waiting]) -> None:
        self.stream, self.packer = stream, packer
        self.bad = Counter[str]()
        self.first_bad: dict[str, str] = {}
        # (source, index) of each, once in a process; a dict, so as to keep their order.
        self.bad_records: dict[tuple[int, int], None] = {}

    def state_dict(self) -> dict[str, Any]:
        waiting = [[w.source, w.index, w.tokens, w.crops] for w in self.packer.waiting]
        return {
            "stream": self.stream.state_dict(),
            "pool": waiting,
            "bad": dict(self.bad),
            "bad_records": list(map(list, self.bad_records)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.packer.waiting = [_Waiting(*numbers) for numbers in state["pool"]]
        self.bad = Counter(state["bad"])
        # Older states lack them.
        self.bad_records = dict.fromkeys(map(tuple, state.get("bad_records", [])))


class _StepMaker(IterableDataset[Step | Failure]):
    """Makes the steps, in this process or in a worker."""

    def __init__(
        self,
        mixture: Mixture,
        encode: Encode,
        rows: RowPlan,
        slots: Sequence[int],
        max_bad_fraction: float,
        kept_bytes: int,
    ) -> None:
        self.mixture, self.encode, self.rows = mixture, encode, rows
        self.max_bad_fraction = max_bad_fraction
        self.slots = {j: _Slot(mixture.slot(j, rows.batch_size), rows.packer()) for j in slots}
        self.bytes_left = self.kept_bytes = kept_bytes
        self.changed = False  # examples that wait may be others than those that were drawn
        # Of the sources whose bad examples are judged: what is mixed in beside them (replay) would
        # make the share of bad ones look smaller than it is.
        self.own = [
            k for k, source in enumerate(mixture.sources) if not getattr(source, "is_replay", False)
        ]
        self.limits = RowLimits.of(
            getattr(encode, "processor", None), rows.max_tokens, rows.max_crops
        )

    def __iter__(self) -> Iterator[Step | Failure]:
        is_worker = torch.utils.data.get_worker_info() is not None
        while True:
            yield guarded(self._step) if is_worker else self._step()

    def state_dict(self) -> dict[str, Any]:
        return {
            **{key: getattr(self.rows, name) for key, name in STATE_KEYS.items()},
            "slots": {str(j): slot.state_dict() for j, slot in self.slots.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, name in STATE_KEYS.items():
            value = getattr(self.rows, name)
            if state.get(key) != value:
                raise ValueError(
                    f"the state of the data has {name} {state.get(key)!r}, this run {value!r}: "
                    f"resume with the same rows, or start a new run"
                )
        missing = [j for j in self.slots if str(j) not in state["slots"]]
        if missing:
            raise ValueError(
                f"the state of the data lacks slot {missing[0]} and knows "
                f"{', '.join(state['slots'])}: merge the states of all processes, and resume with "
                f"the same batch size"
            )
        for j, slot in self.slots.items():
            slot.load_state_dict(state["slots"][str(j)])
        self.bytes_left = self.kept_bytes

    def _step(self) -> Step:
        if self.changed:
            self._read_all_again()
        step = Step([], [], [], {}, {}, {}, 0)
        counts = Counter[str]()
        slots = list(self.slots.values())
        packs = [self._pack(slot) for slot in slots]
        # Rows of about one length are padded together; the longest first, where memory may end.
        packs.sort(key=lambda pack: -sum(len(read.encoded.input_ids) for read in pack))
        size = self.rows.micro_batch_size
        for start in range(0, len(packs), size):
            group = packs[start : start + size]
            rows = [join([read.encoded for read in pack]) for pack in group]
            batch = collate(rows, self.rows.pad_token_id)
            branches = np.full(batch.input_ids.shape, -1)
            for out, row, pack in zip(branches, rows, group, strict=True):
                out[: len(row.input_ids)] = _number_branches(row, pack, len(step.tasks))
                step.tasks += [task for read in pack for task in read.tasks]
                counts["tokens"] += len(row.input_ids)
                counts["crops"] += count_crops(row)
                counts["examples"] += len(pack)
            counts["rows"] += len(rows)
            counts["padding"] += batch.input_ids.numel()
            step.micro_batches.append(batch)
            step.branches.append(torch.from_numpy(branches))
        counts["padding"] -= counts["tokens"]
        counts["capacity"] = counts["rows"] * self.rows.max_tokens
        step.counts = dict(counts)
        step.state = self.state_dict()
        step.bad = dict(sum((slot.bad for slot in slots), Counter()))
        step.first_bad = dict(ChainMap(*(slot.first_bad for slot in slots)))
        step.drawn = self._drawn()
        return step

    def _pack(self, slot: _Slot) -> list[_Read]:
        """The examples of a slot's next row."""
        while True:
            while not slot.packer.full:
                self._draw(slot)
            row = [self._read_again(slot, waiting) for waiting in slot.packer.take()]
            good = [read for read in row if read is not None]
            if good:
                return good

    def _draw(self, slot: _Slot) -> None:
        """Let the slot's next example wait, if it is good."""
        source, index = slot.stream.next()
        self._wait(slot, source, index)

    def _read_all_again(self) -> None:
        """Let what waits wait as it is now."""
        for slot in self.slots.values():
            before, slot.packer.waiting = slot.packer.waiting, []
            for waiting in before:
                self._wait(slot, waiting.source, waiting.index)
        self.changed = False

    def _wait(self, slot: _Slot, source: int, index: int) -> None:
        """Let an example wait, if it is good."""
        try:
            read = self._read(source, index)
            waiting = _Waiting(
                source, index, len(read.encoded.input_ids), count_crops(read.encoded)
            )
            slot.packer.add(waiting)
        except BadExample as bad:
            self._leave_out(slot, source, index, bad)
            return
        size = _num_bytes(read)
        if size <= self.bytes_left:
            self.bytes_left -= size
            waiting.read = read

    def _read_again(self, slot: _Slot, waiting: _Waiting) -> _Read | None:
        """What waited, read once more if it was not kept; None if it has become bad."""
        if waiting.read is not None:
            self.bytes_left += _num_bytes(waiting.read)
            return waiting.read
        try:
            read = self._read(waiting.source, waiting.index)
        except BadExample as bad:
            self._leave_out(slot, waiting.source, waiting.index, bad)
            return None
        found = len(read.encoded.input_ids), count_crops(read.encoded)
        if found != (waiting.tokens, waiting.crops):
            raise ValueError(
                f"{self._name(waiting.source, waiting.index)} had {waiting.tokens} tokens and "
                f"{waiting.crops} crops and now has {found[0]} and {found[1]}: the data, the "
                f"processor or its settings changed, or encoding draws at random; a run can only "
                f"go on with the same"
            )
        return read

    def _read(self, source: int, index: int) -> _Read:
        read = read_record(self.mixture.sources[source], index, self.encode, self.limits)
        encoded = read.encoded
        if (labels_of(encoded) == IGNORED_LABEL).all():
            raise BadExample("no answer", "nothing in it is learned")
        subsegments = subsegments_of(encoded)
        found = int(subsegments[subsegments != PREFIX_SUBSEGMENT].max()) + 1
        if found > len(read.example.branches):
            raise ValueError(
                f"{self._name(source, index)} has {len(read.example.branches)} branches and was "
                f"encoded with {found}: encode must give branch k the subsegment k"
            )
        return _Read(encoded, [branch.task for branch in read.example.branches[:found]])

    def _leave_out(self, slot: _Slot, source: int, index: int, bad: BadExample) -> None:
        """Count a bad example.

        Raises: ValueError if there are too many by now.
        """
        slot.bad[bad.cause] += 1
        slot.first_bad.setdefault(bad.cause, f"{self._name(source, index)}: {bad.detail}")
        slots = self.slots.values()
        if not any((source, index) in other.bad_records for other in slots):
            slot.bad_records[source, index] = None
        drawn = self._drawn()
        causes = sum((other.bad for other in slots), Counter[str]())
        if drawn < FEW or causes.total() <= self.max_bad_fraction * drawn:
            return
        # A record that comes again is not another bad one. A source gives no more than it has.
        draws = [sum(numbers) for numbers in zip(*(s.stream.drawn for s in slots), strict=True)]
        seen = sum(min(draws[k], self.mixture.sizes[k]) for k in self.own)
        different = sum(len(other.bad_records) for other in slots)
        if different > self.max_bad_fraction * seen:
            listed = ", ".join(f"{cause} {n}" for cause, n in causes.most_common())
            allowed = f"{self.max_bad_fraction:.0%}"
            raise ValueError(
                f"{causes.total()} of {drawn} examples are bad, more than {allowed} ({listed}); "
                f"the last is {self._name(source, index)}: {bad.detail}; mend the data, make rows "
                f"larger if examples are too long, or allow a larger share of bad ones "
                f"(--max-bad-share, or max_bad_fraction of the recipe)"
            )

    def _drawn(self) -> int:
        """Examples of the judged sources drawn since the beginning of the run."""
        return sum(slot.stream.drawn[k] for slot in self.slots.values() for k in self.own)

    def _name(self, source: int, index: int) -> str:
        return f"{self.mixture.sources[source].name}, example {index}"


def _num_bytes(read: _Read) -> int:
    pixels = read.encoded.pixel_values
    return 0 if pixels is None else pixels.nbytes


def _number_branches(row: Encoded, pack: Sequence[_Read], first: int) -> np.ndarray:
    """(T,) which branch of all a token belongs to, counted from ``first``; -1 what they share."""
    subsegments = subsegments_of(row)
    example, branch = np.divmod(subsegments, PACK_SUBSEGMENT)
    firsts = first + np.cumsum([0, *(len(read.tasks) for read in pack[:-1])])
    return np.where(branch == PREFIX_SUBSEGMENT, -1, firsts[example] + branch)


def _begin_worker(worker: int) -> None:
    """Share tensors by name: by handle, a step of many rows would need more than a process has."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    ignore_signals(worker)


def ignore_signals(worker: int) -> None:
    """For a process that prepares data: a signal to the whole group of processes is for the
    training loop, which still needs the data of its last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
