"""Optimising what modules should write at one position, so that a target becomes likely."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_core.errors import EditError
from kedit_core.host import ModelHost
from kedit_core.job import EditJob
from kedit_core.memory import free_bytes
from kedit_core.numerics.losses import kl_divergence, mean_nll
from kedit_core.numerics.states import Side, states_at_marks, wide
from kedit_core.numerics.tail import Tail
from kedit_core.probing import hidden_of, with_hidden
from kedit_core.progress import progress
from kedit_core.tokens import Row

VALUES = "values"  # the kind of artifact that keeps targets


@dataclass(frozen=True)
class ValueTask:
    """What one request optimises.

    Attributes:
        rows: prompts with their targets, marked where the change is added; the one without
            context comes first.
        anchor: a prompt whose next-token distribution at its mark should stay as it is.
        start: (d,) from which δ starts; by default zero.
        bound: of |δ|, instead of `max_norm_ratio` · |v₀|.
        decay: weight of |δ| in the loss, instead of `weight_decay` / |v₀|².
    """

    rows: tuple[Row, ...]
    anchor: Row
    start: Tensor | None = None
    bound: float | None = None
    decay: float | None = None


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the optimisation; see `optimise_values`.

    Attributes:
        stop: a task ends when its loss is below `stop_loss`, or when each of its target tokens is
            the most likely one in all its rows (arXiv:2502.01636), whichever loss it has then.
        reached_factor: of the NLL in the step after one in which all target tokens were the most
            likely ones (PMET, arXiv:2308.08742, §3.3).
        reached_kl: a task also ends when all target tokens are the most likely ones and its
            weighted KL is below this; with 0 it does not.
    """

    steps: int
    lr: float
    weight_decay: float
    max_norm_ratio: float
    kl_weight: float
    stop_loss: float = 5e-2
    stop: Literal["loss", "most-probable"] = "loss"
    reached_factor: float = 1.0
    reached_kl: float = 0.0


@dataclass(frozen=True)
class Value:
    """Result of one task.

    Attributes:
        initial: (d,) what the module wrote at the mark of the first row, float32 or wider.
        delta: (d,) what to add to it, likewise.
        losses: total loss at each step.
        nll: the target's mean negative log-likelihood over all rows at the last step.
    """

    initial: Tensor
    delta: Tensor
    losses: tuple[float, ...]
    nll: float

    @property
    def target(self) -> Tensor:
        """(d,) what the module should write."""
        return self.initial + self.delta


class Penalty(Protocol):
    """A further term of the loss."""

    @property
    def watch(self) -> Sequence[str]:
        """Paths of blocks above the changed one, but for the last, whose outputs it reads."""
        ...

    def __call__(self, owner: Tensor, delta: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """The term of each task that is optimised side by side with others.

        Args:
            owner: (rows,) number of the task of each row, without anchors.
            delta: (tasks, d).
            states: for each watched block (rows, d) what it hands on at the rows' marks.

        Returns:
            (tasks,); what stands there for tasks without rows does not count: they are done.
        """
        ...


def target_values(
    job: EditJob,
    module: str,
    layer: int,
    tasks: Sequence[ValueTask],
    settings: ValueSettings,
    *,
    companions: Sequence[str] = (),
    penalty: Penalty | None = None,
) -> list[Value]:
    """As `optimise_values`; kept in the store, task by task, for an unedited model.

    A key is everything that a value depends on: the model, the place, the settings and the task.
    So a search over what comes after the values, another batch with the same facts, and another
    method that wants the same values find them.

    Args:
        penalty: a dataclass that does not relate tasks; its fields enter the key.
        job, module, layer, tasks, settings, companions: as for `optimise_values`.

    Raises:
        EditError: the loss is not finite.
    """
    common: dict[str, object] = {
        "model": job.fingerprint,
        "modules": [module, *companions],
        "settings": asdict(settings),
    }
    if penalty is not None:
        common["penalty"] = [type(penalty).__name__, asdict(cast(Any, penalty))]
    keys = [{**common, "task": _content(task)} for task in tasks]
    is_kept = not job.is_edited and all(task.start is None for task in tasks)
    stored = [job.artifacts.get(VALUES, key) if is_kept else None for key in keys]
    found = {n: _unpacked(tensors) for n, tensors in enumerate(stored) if tensors is not None}
    missing = [n for n in range(len(tasks)) if n not in found]
    if missing:
        wanted = [tasks[n] for n in missing]
        values = optimise_values(
            job.host, module, layer, wanted, settings, companions=companions, penalty=penalty
        )
        for n, value in zip(missing, values, strict=True):
            packed = _packed(value)
            found[n] = _unpacked(packed)  # as it will be found, in the last digit too
            if is_kept:
                job.artifacts.put(VALUES, keys[n], packed)
    return [found[n] for n in range(len(tasks))]


def optimise_values(
    host: ModelHost,
    module: str,
    layer: int,
    tasks: Sequence[ValueTask],
    settings: ValueSettings,
    *,
    companions: Sequence[str] = (),
    penalty: Penalty | None = None,
    together: bool = False,
    plain: bool = False,
) -> list[Value]:
    """For each task the change δ of a module's output that makes its target likely.

    Minimises, with Adam from δ = 0 (Meng et al. 2022, arXiv:2202.05262, eq. 4, with the weight
    decay of its authors' code, which divides a norm by a squared one),

        mean over rows of NLL + kl_weight · KL(p₀ ‖ p_δ) + weight_decay · |δ| / |v₀|² + penalty

    where v₀ is the module's own output.  After each step |δ| is cut to max_norm_ratio · |v₀|.
    The last of the steps only measures.  Tasks are optimised side by side, as many as memory
    holds (`memory_chunks`); finished ones are dropped.

    Args:
        host: a causal model with frozen weights.
        module: path of the module whose output is changed: block `layer`, or one inside it.
        layer: its block.
        tasks: each with a δ of its own.
        settings: of the optimisation.
        companions: further modules of the block whose outputs are changed along with it, each by
            a δ of its own, which is not returned (PMET, arXiv:2308.08742, eq. 7).
        penalty: a further term of the loss.
        together: take all tasks at once, for a penalty that relates them; not more than the first
            that `memory_chunks` gives.
        plain: run the whole model in every step, one task after the other; the oracle of the fast
            way.

    Raises:
        EditError: the loss is not finite.
    """
    values: list[Value] = []
    if together:
        chunks: Iterable[Sequence[ValueTask]] = [tasks]
    else:
        chunks = [[task] for task in tasks] if plain else memory_chunks(host, layer, tasks)
    with progress(len(tasks), "targets", "fact") as bar:
        for chunk in chunks:
            optimisation = _Optimisation(
                host, (module, *companions), layer, chunk, settings, penalty, plain
            )
            values += optimisation.run()
            bar.update(len(chunk))
    return values


def memory_chunks(
    host: ModelHost, layer: int, tasks: Sequence[ValueTask]
) -> Iterator[list[ValueTask]]:
    """As many tasks at a time as memory holds beside one another, in their order; at least one."""
    site = host.blocks[layer].mlp_out
    width = host.weight(site).shape[1] if site is not None else 4 * host.anatomy.hidden_size
    # Numbers that autograd keeps of a block at one position, a little above what was measured.
    numbers = 16 * host.anatomy.hidden_size + 6 * width
    position = numbers * host.dtype.itemsize * (len(host.blocks) - layer)
    label = 16 * host.model.config.get_text_config().vocab_size  # logits, in float32 with gradients
    limit = free_bytes(host.device)
    chunk: list[ValueTask] = []
    used = 0
    for task in tasks:
        positions = sum(len(row.ids) - row.mark for row in task.rows)
        labels = sum(len(row.targets) for row in task.rows) + 1  # the anchor's
        needed = positions * position + labels * label
        if chunk and used + needed > limit:
            yield chunk
            chunk, used = [], 0
        chunk.append(task)
        used += needed
    if chunk:
        yield chunk


def _content(task: ValueTask) -> dict[str, object]:
    """What of a task its value depends on, for a key."""
    rows = [[row.ids, row.targets, row.mark] for row in (*task.rows, task.anchor)]
    return {"rows": rows, "bound": task.bound, "decay": task.decay}


def _packed(value: Value) -> dict[str, Tensor]:
    return {
        "initial": value.initial,
        "delta": value.delta,
        "losses": torch.tensor(value.losses),
        "nll": torch.tensor(value.nll),
    }


def _unpacked(stored: Mapping[str, Tensor]) -> Value:
    losses = tuple(stored["losses"].tolist())
    return Value(stored["initial"], stored["delta"], losses, stored["nll"].item())


def _adds_to_stream(host: ModelHost, module: str, layer: int, row: Row) -> bool:
    """Whether a change of the module's output changes its block's output by just that.

    Then the block needs no repeating.  It does not hold where the output is normalised or scaled
    before it is added, and the last block has none above it.
    """
    if layer + 1 == len(host.blocks):
        return False
    points: dict[str, tuple[str, Side]] = {"stream": (host.blocks[layer].path, "output")}
    stream = states_at_marks(host, [row], points)["stream"]
    handle = host.base_module(module).register_forward_hook(
        lambda m, args, out: with_hidden(out, hidden_of(out) + stream[0].to(hidden_of(out)))
    )
    try:
        changed = states_at_marks(host, [row], points)["stream"]
    finally:
        handle.remove()
    return bool(((changed - 2 * stream).abs() <= 1e-2 * stream.abs().max()).all())


class _Optimisation:
    """Some tasks, each with its δ, from the first step to the last."""

    def __init__(
        self,
        host: ModelHost,
        modules: Sequence[str],
        layer: int,
        tasks: Sequence[ValueTask],
        settings: ValueSettings,
        penalty: Penalty | None,
        plain: bool,
    ) -> None:
        self.host, self.modules, self.layer = host, modules, layer
        self.tasks, self.settings, self.penalty, self.plain = tasks, settings, penalty, plain
        first = [task.rows[0] for task in tasks]
        points: dict[str, tuple[str, Side]] = {path: (path, "output") for path in modules}
        own = states_at_marks(host, first, points)
        self.initial = torch.stack([wide(own[path]) for path in modules], dim=1)  # (n, points, d)
        norms = self.initial.norm(dim=2)
        self.bounds = settings.max_norm_ratio * norms
        self.decays = settings.weight_decay / norms.square()
        self.delta = torch.zeros_like(self.initial)
        for n, task in enumerate(tasks):
            if task.decay is not None:
                self.decays[n, 0] = task.decay
            if task.bound is not None:
                self.bounds[n, 0] = task.bound
            if task.start is not None:
                self.delta[n, 0] = task.start
        self.delta.requires_grad_(True)
        alone = not plain and len(modules) == 1
        self.is_above = alone and _adds_to_stream(host, modules[0], layer, first[0])

    def run(self) -> list[Value]:
        """Minimise; rows of tasks that are done are dropped when they are half of all."""
        settings, count = self.settings, len(self.tasks)
        adam = torch.optim.Adam([self.delta], lr=settings.lr)
        nll, histories = [0.0] * count, [list[float]() for _ in range(count)]
        reached = torch.zeros(count, dtype=torch.bool, device=self.delta.device)
        rows = _Rows(self, list(range(count)))
        try:
            for step in range(settings.steps):
                losses = rows.losses(reached)
                ends = losses.total < settings.stop_loss
                if settings.stop == "most-probable":
                    ends = ends | losses.reached
                if settings.reached_kl > 0:
                    ends = ends | (losses.reached & (losses.kl <= settings.reached_kl))
                reached = losses.reached
                columns = torch.stack([losses.total.detach(), losses.nll, ends.to(losses.nll)])
                for n, total, measured, ended in zip(range(count), *columns.tolist(), strict=True):
                    if n not in rows.active:
                        continue
                    if not math.isfinite(total):
                        row = self.tasks[n].rows[0]
                        text = self.host.tokenizer.decode(row.prompt, skip_special_tokens=True)
                        raise EditError(
                            f"The loss of the target after {text!r} became {total} in step {step}. "
                            f"Lower the learning rate, or load the model in float32."
                        )
                    histories[n].append(total)
                    nll[n] = measured
                    if ended:
                        rows.active.discard(n)
                if step == settings.steps - 1 or not rows.active:
                    break
                self._step(adam, losses.total, rows.active)
                if 2 * len(rows.active) <= len(rows.members):
                    rows.release()
                    rows = _Rows(self, sorted(rows.active))
        finally:
            rows.release()
        delta = self.delta.detach()
        return [
            Value(self.initial[n, 0].cpu(), delta[n, 0].cpu(), tuple(histories[n]), nll[n])
            for n in range(count)
        ]

    def _step(self, adam: torch.optim.Adam, losses: Tensor, active: Set[int]) -> None:
        """One update of the active tasks' δ, cut to its bound."""
        chosen = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
        chosen[list(active)] = True
        adam.zero_grad()
        losses[chosen].sum().backward()
        kept = self.delta.detach().clone()
        adam.step()
        with torch.no_grad():
            scale = (self.bounds / self.delta.norm(dim=2).clamp(min=1e-12)).clamp(max=1)
            self.delta.mul_(scale[..., None])
            self.delta[~chosen] = kept[~chosen]


@dataclass(frozen=True)
class _Losses:
    """Of each task: the whole loss, its NLL, its weighted KL, whether its targets lead."""

    total: Tensor
    nll: Tensor
    kl: Tensor
    reached: Tensor


class _Rows:
    """The rows of some tasks, the anchor last in each, and their losses as functions of δ.

    Attributes:
        members: numbers of the tasks that have rows here.
        active: those that are not done.
    """

    def __init__(self, of: _Optimisation, members: Sequence[int]) -> None:
        self._of = of
        self.members, self.active = members, set(members)
        tasks = [of.tasks[n] for n in members]
        rows = [
            row
            for task in tasks
            for row in (*task.rows, replace(task.anchor.until_mark, targets=(0,)))
        ]
        sizes = torch.tensor([len(task.rows) + 1 for task in tasks])
        device = of.delta.device
        self.owner = torch.tensor(members).repeat_interleave(sizes).to(device)
        self.is_anchor = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.is_anchor[sizes.cumsum(0) - 1] = True
        marks = [row.mark for row in rows]
        self.tail = Tail(of.host, rows, of.layer + of.is_above, marks, plain=of.plain)
        # All on one device, also where the model lies on several.
        label_rows, unchanged = self.tail.label_rows.to(device), self.tail.unchanged.to(device)
        self.anchors = self.is_anchor[label_rows]
        self.labels = self.tail.labels.to(device)[~self.anchors]
        self.rows = label_rows[~self.anchors]
        self.reference = torch.log_softmax(wide(unchanged[self.anchors]), dim=-1)
        self._states: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        paths = [of.host.blocks[of.layer].path] if of.is_above else of.modules
        for point, path in enumerate(paths):
            module = of.host.module(path) if of.is_above else of.host.base_module(path)
            is_inside = path.startswith(f"{of.host.blocks[of.layer].attention}.")
            places = self.tail.places(marks, padded=of.is_above or is_inside)
            self._handles.append(module.register_forward_hook(self._inject(point, places)))
        for path in () if of.penalty is None else of.penalty.watch:
            block = of.host.module(path)
            self._handles.append(
                block.register_forward_hook(self._keep(path, self.tail.places(marks)))
            )

    def release(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _inject(self, point: int, places: Tensor) -> Callable[..., Any]:
        """Forward hook: add each row's δ at its mark."""

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            shape = hidden_of(output).shape
            hidden = hidden_of(output).reshape(-1, shape[-1])
            added = self._of.delta[self.owner, point].to(hidden)
            changed = hidden.index_put((places.to(hidden.device),), added, accumulate=True)
            return with_hidden(output, changed.reshape(shape))

        return add

    def _keep(self, path: str, places: Tensor) -> Callable[..., Any]:
        """Forward hook: keep what a block hands on at the marks."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_of(output)
            state = hidden.reshape(-1, hidden.shape[-1])[places.to(hidden.device)]
            self._states[path] = state.to(self._of.delta.device)

        return keep

    def losses(self, reached: Tensor) -> _Losses:
        """The losses of all tasks; those without rows here have zeros.

        Args:
            reached: (tasks,) whether all target tokens were the most likely ones a step ago.
        """
        of, settings = self._of, self._of.settings
        logits = self.tail.logits().to(of.delta.device)
        targets, labels, rows = logits[~self.anchors], self.labels, self.rows
        zeros = of.delta.new_zeros(len(of.tasks))
        per_row = mean_nll(targets, labels, rows, len(self.owner))
        counts = zeros.index_add(0, self.owner, (~self.is_anchor).to(zeros)).clamp(min=1)
        nll = zeros.index_add(0, self.owner, per_row) / counts
        missed = (targets.detach().argmax(dim=-1) != labels).to(zeros)
        misses = zeros.index_add(0, self.owner[rows], missed)
        kl = zeros.index_add(
            0, self.owner[self.is_anchor], kl_divergence(self.reference, logits[self.anchors])
        )
        kl = settings.kl_weight * kl
        decay = (of.decays * of.delta.norm(dim=2)).sum(dim=1)
        weight = torch.where(reached, settings.reached_factor, 1.0)
        total = weight * nll + kl + decay
        if of.penalty is not None:
            states = {path: state[~self.is_anchor] for path, state in self._states.items()}
            owner = self.owner[~self.is_anchor]
            total = total + of.penalty(owner, of.delta[:, 0], states)
        return _Losses(total, nll.detach(), kl.detach(), misses == 0)
