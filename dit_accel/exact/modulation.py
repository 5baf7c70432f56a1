"""Modulation tables of one denoiser: rows of its adaLN projections by the exact bits of the timestep.

The vectors that modulate depend on the timestep (and the few arguments a family names), so every projection
has one output per step of a schedule. They are computed before the loop, row by row in the shape the model
would have used: a product of another shape may take another kernel and differ in the last bit. Then the
projections answer with their row, and their weights may leave the device (TFMQ-DM, arXiv 2407.19547, has the
idea of the finite set; sizes in docs/DESIGN.md).
"""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.exact import keys, weights
from dit_accel.exact.stand_in import Answer
from dit_accel.families.base import Modulation
from dit_accel.session import Forward, Session

SCHEDULES = 4  # remembered at once; another resolution is another schedule where shifting is dynamic
Row = dict[str, Tensor]  # path of a projection -> its output


class Table:
    """The rows of one schedule and one shape of the batch."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.bytes = 0

    def add(self, name: bytes, row: Row) -> None:
        self.rows[name] = row
        self.bytes += size_of(row)


class ModulationTables:
    """All tables of one denoiser."""

    def __init__(self, session: Session, root: nn.Module, modulation: Modulation):
        self.session, self.root, self.modulation = session, root, modulation
        self.releases = False  # weights leave the device once a table holds what they make
        self.projections = {
            child.path: (pattern, child)
            for pattern in modulation.projections
            for child in weights.children(root, pattern)
        }
        self._embedders = [child for name in modulation.embedders for child in weights.children(root, name)]
        self.shelf = weights.Shelf(root)
        self.tables: OrderedDict[Any, Table] = OrderedDict()
        self.refused: str | None = None  # for good
        self.failed: Tensor | None = None  # on the device: a timestep was not the one foreseen
        self._stamp: list[Any] = []
        self._sample: list[bytes] = []
        self._foreseen: dict[Any, keys.Schedule | None] = {}  # of this run
        self._arguments: dict[str, tuple[Any, int | None, bytes]] = {}
        self._odd_shapes = False
        self._settled = False  # in this run the weights were taken off, and nothing asked for them since
        self._row: Row | None = None
        self._expected: dict[str, Tensor] = {}
        self._record: tuple[Table, bytes, dict[str, list[Tensor]]] | None = None

    def modules(self) -> list[nn.Module]:
        """The projections as they are now."""
        return [child.module for _, child in self.projections.values()]

    def new_run(self) -> None:
        """Forget what held for one run; look whether weights changed where their version does not tell."""
        self._foreseen.clear()
        self.failed, self._settled = None, False
        now = weights.sample(self._all())
        if self.tables and now != self._sample:
            self._drop("the weights of its projections changed")
        self._sample = now

    def begin(self, at: Forward, inputs: Mapping[str, Any]) -> list[tuple[nn.Module, Answer]]:
        """Find or make the row of this forward; who answers for which projection."""
        self._row, self._record, self._expected = None, None, {}
        timestep = inputs.get("timestep")
        if not isinstance(timestep, Tensor) or timestep.ndim != 1:
            self.session.exact_reasons["modulation"] = "computed: the timestep is not one number a sample"
            self._fetch()
            return []
        now = weights.stamp(self._all())
        if now != self._stamp:
            if self.tables:
                self._drop("a weight or an adapter of its projections changed")
            self._stamp = weights.stamp(
                self._all()
            )  # an adapter's module may have come back with its weights
            self._sample = weights.sample(self._all())
        self._choose(at, inputs, timestep)
        return [(child.module, partial(self._answer, path)) for path, (_, child) in self.projections.items()]

    def end(self) -> None:
        """After a forward: keep what it computed, and let the weights go where every row is at hand."""
        if self._record is not None:
            table, name, found = self._record
            if found.keys() == self.projections.keys() and all(len(outs) == 1 for outs in found.values()):
                self._keep(table, name, {path: outs[0].clone() for path, outs in found.items()})
        elif self._row is not None and self.releases and not self._odd_shapes and not self._settled:
            self.shelf.take(self.modules())
            self._settled = True
        self.session.exact["table bytes"] = sum(table.bytes for table in self.tables.values())
        self.session.exact["bytes off the device"] = self.shelf.bytes

    def _fetch(self) -> None:
        self.shelf.put_back()
        self._settled = False

    def drop(self) -> None:
        """Weights back, tables gone."""
        self._fetch()
        self.tables.clear()

    # ---- which row

    def _choose(self, at: Forward, inputs: Mapping[str, Any], timestep: Tensor) -> None:
        context = self._context(inputs, timestep)
        if context not in self._foreseen:
            scheduler = getattr(self.session.pipe, "scheduler", None)
            self._foreseen[context] = keys.foresee(scheduler, timestep, at.step)
            self._fill(context, at, inputs, timestep)
        if self.refused is not None:
            return
        schedule = self._foreseen[context]
        table = self._table(context)
        if not keys.at_hand(timestep) and schedule is not None and 0 <= at.step < len(schedule.names):
            name = schedule.names[at.step]
            differs = schedule.differs(at.step, timestep)
            self.failed = differs if self.failed is None else self.failed | differs
        else:
            name = keys.name_of(timestep)
        self._row = table.rows.get(name)
        if self._row is None:
            self._fetch()
            self._record = (table, name, {})
            self.session.note_once("modulation tables: a timestep outside the schedule was computed", "")

    def _context(self, inputs: Mapping[str, Any], timestep: Tensor) -> Any:
        """Everything but the timestep's value that a row depends on."""
        kinds = tuple(
            (name, value.dtype, value.device, value.shape if name == "timestep" else value.shape[0])
            for name in ("timestep", "hidden_states", "encoder_hidden_states")
            if isinstance(value := inputs.get(name), Tensor)
        )
        return kinds, tuple(self._value(name, inputs.get(name)) for name in self.modulation.arguments)

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple((key, self._value(f"{name}.{key}", item)) for key, item in sorted(value.items()))
        if not isinstance(value, Tensor):
            return repr(value)
        version = compat.version_of(value)
        known = self._arguments.get(name)
        if known is None or known[0] is not value or known[1] != version or version is None:
            known = value, version, keys.bits(value) + str((value.shape, value.dtype)).encode()
            self._arguments[name] = known  # keeps the tensor: its identity is not given to another
        return known[2]

    def _table(self, context: Any) -> Table:
        """The table of a schedule, made if there is none; the one longest unused goes."""
        schedule = self._foreseen[context]
        key = context, schedule.names if schedule is not None else ()
        table = self.tables.setdefault(key, Table())
        self.tables.move_to_end(key)
        while len(self.tables) > SCHEDULES:
            self.tables.popitem(last=False)
        return table

    # ---- making rows

    def _fill(self, context: Any, at: Forward, inputs: Mapping[str, Any], timestep: Tensor) -> None:
        """All rows of the schedule from this step on."""
        schedule = self._foreseen[context]
        if schedule is None or self.refused is not None:
            return
        table = self._table(context)
        ahead = range(at.step, len(schedule.names))
        missing = {schedule.names[step]: step for step in ahead if schedule.names[step] not in table.rows}
        if not missing:
            return
        self._fetch()
        # ordinary tensors: rows outlive a caller's inference mode
        with torch.inference_mode(False), torch.no_grad():
            for number, (name, step) in enumerate(missing.items()):
                argument = schedule.values[step : step + 1].clone().expand(timestep.shape)
                vectors = self.modulation.vectors(self.root, {**inputs, "timestep": argument})
                row = self._compute(vectors)
                if number == 0 and not self._fits(size_of(row) * len(missing)):
                    return
                table.add(name, row)
            self._expected = dict(self.modulation.vectors(self.root, inputs))

    def _compute(self, vectors: Mapping[str, Tensor]) -> Row:
        row: Row = {}
        for path, (pattern, child) in self.projections.items():
            out = child.module(vectors[pattern])
            # samples of one timestep have equal rows: one is kept where no bit differs
            alike = out.shape[0] > 1 and torch.equal(out, out[:1].expand_as(out))
            row[path] = out[:1].clone().expand_as(out) if alike else out
        return row

    def _fits(self, more: int) -> bool:
        """Whether tables stay smaller than the weights behind them; older schedules make room."""
        limit = weights.nbytes(self.modules())
        held = sum(table.bytes for table in self.tables.values())
        while len(self.tables) > 1 and held + more >= limit:  # the last is the one that is being filled
            _, oldest = self.tables.popitem(last=False)
            held -= oldest.bytes
        if held + more < limit:
            return True
        self.refused = f"not made: {more / 2**20:.1f} MiB of rows for {limit / 2**20:.1f} MiB of weights"
        self.session.exact_reasons["modulation"] = self.refused
        return False

    def _keep(self, table: Table, name: bytes, row: Row) -> None:
        limit = weights.nbytes(self.modules())
        if size_of(row) + sum(each.bytes for each in self.tables.values()) < limit:
            table.add(name, row)

    def _drop(self, why: str) -> None:
        self.session.note_once(f"modulation tables: {why}; they are made anew", "")
        self.drop()
        self._foreseen.clear()

    def _all(self) -> list[nn.Module]:
        return [*self.modules(), *(child.module for child in self._embedders)]

    # ---- answering

    def _answer(self, path: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        row = self._row
        if row is not None and len(args) == 1 and args[0].shape[:-1] == row[path].shape[:-1]:
            expected = self._expected.pop(self.projections[path][0], None)
            if expected is None or torch.equal(args[0], expected):
                self.session.exact["rows served"] += 1
                return row[path].contiguous()  # functions of a strided tensor may round otherwise
            self._refuse(path)
        elif row is not None:
            # halves of a batch: rows of the whole may differ from theirs in the last bit
            self._odd_shapes = True
            self._fetch()
        self.session.exact["rows computed"] += 1
        out = forward(*args, **kwargs)
        if self._record is not None:
            self._record[2].setdefault(path, []).append(out)
        return out

    def _refuse(self, path: str) -> None:
        self.refused = f"not used: {path} was given another vector than its family describes"
        self.session.exact_reasons["modulation"] = self.refused
        self.session.note_once(f"modulation tables: {self.refused}", "")
        self._row = None
        self.drop()


def size_of(row: Row) -> int:
    """Bytes of a row; samples that share one are counted once."""
    return sum(out.untyped_storage().nbytes() for out in row.values())
