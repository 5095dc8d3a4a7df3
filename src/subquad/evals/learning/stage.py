"""One step on a task: a batch's loss and gradients, on a GPU from a recording, and a look at held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.errors import UnsupportedError
from subquad.core.state import precise
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.model import Learner
from subquad.evals.learning.task import IGNORE, Batch, Task
from subquad.train.loop import FIRST_STEPS, Stage
from subquad.train.optimiser import slow
from subquad.train.precision import autocast
from subquad.train.recorded import Recorded

# Held-out rows that are looked at on the way, and how often, in steps.
PROBE_ROWS, PROBE_STEPS = 256, 100
# Columns that recorded steps have are a multiple of this, which transforms and tiles like.
WIDTH = 64


class TaskStage(Stage):
    """Minimise the cross-entropy of a task's answers; now and then, look at held-out rows.

    Args:
        task: what is learned.
        model: trained in place.
        batches: by step.
        say: told in a line what is settled on the way.
        probe_rows: held-out rows that are looked at.
    """

    name = "learn"

    def __init__(
        self,
        task: Task,
        model: Learner,
        batches: Batches,
        say: Callable[[str], None] | None = None,
        *,
        probe_rows: int = PROBE_ROWS,
    ) -> None:
        self.task, self.model, self.batches, self.say = task, model, batches, say
        self.device = next(model.parameters()).device
        self.tokens_per_step = batches.rows * task.length
        self.new, self.old = list(model.parameters()), list[nn.Parameter]()
        self.clipped: Sequence[Sequence[nn.Parameter]] = [self.new]
        self.most = slow(model)
        self._at, self._rows = 0, batches.rows
        # In the first steps it turns out how many rows fit into memory.
        self._plain: int | float = FIRST_STEPS if self.device.type == "cuda" else math.inf
        self._recorded: Recorded | None = None
        self._padded = False
        self._probe = held_out(task, batches.seed, probe_rows)

    def step(self) -> dict[str, Tensor]:
        """One batch, some rows at a time."""
        figures: dict[str, Tensor] = {}
        if self._at % PROBE_STEPS == 0:
            right_n, asked_n, _ = tested(self.model, self._probe, self._rows)
            figures["held_out"] = right_n.sum() / asked_n.sum()
        batch = self.batches(self._at)
        self._at += 1
        self._plain -= 1
        loss, accuracy = self._replay(batch) if self._plain < 0 and self._rows >= len(batch) else self._by_parts(batch)
        return {"loss": loss, "accuracy": accuracy, **figures}

    def _by_parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of a batch, and its gradients, as many rows at a time as fit."""
        count = (batch.targets != IGNORE).sum().to(self.device)
        parts = (batch.rows(start, start + self._rows).to(self.device) for start in range(0, len(batch), self._rows))
        losses, rights = zip(*(self._part(part, count) for part in parts), strict=True)
        return torch.stack(losses).sum(), torch.stack(rights).sum()

    def _part(self, part: Batch, count: Tensor) -> tuple[Tensor, Tensor]:
        """What some rows add to loss and accuracy of a batch with `count` answers, and to the gradients."""
        loss_n, right_n = answers(self.model(part), part.targets)
        share = loss_n.sum() / count
        share.backward()  # pyright: ignore[reportUnknownMemberType]
        return share.detach(), right_n.sum() / count

    def _replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`_by_parts` of a whole batch with the launches of a recorded step, where the step can be recorded."""
        padded = batch.is_padded or batch.inputs.shape[1] < self.task.length
        if self._recorded is None:
            self._padded = padded
        if padded and not self._padded:
            return self._by_parts(batch)
        if self._padded:
            batch = batch.widened(-(-self.task.length // WIDTH) * WIDTH)
        # Of locked memory copies wait for no earlier step.
        inputs = [x.pin_memory() for x in (batch.inputs, batch.targets, batch.lengths_b)]

        def run(inputs: Tensor, targets: Tensor, lengths_b: Tensor) -> tuple[Tensor, Tensor]:
            # A weight that was cast before would stay as it is for ever.
            with autocast(self.device, keep_casts=False):
                return self._part(Batch(inputs, targets, lengths_b, padded), (targets != IGNORE).sum())

        if self._recorded is None:
            try:
                self._recorded = Recorded(run, [x.to(self.device) for x in inputs], self.new)
            except UnsupportedError as error:
                self._plain = math.inf
                if self.say is not None:
                    self.say(f"steps are launched kernel by kernel: {error}")
                return self._by_parts(batch)
        loss, accuracy = self._recorded(*inputs)
        return loss, accuracy

    def fewer_rows(self) -> int | None:
        """Half as many rows at once from now on; None where it is one already."""
        if self._rows == 1:
            return None
        self._rows //= 2
        return self._rows

    def weights(self) -> dict[str, Tensor]:
        """The model's."""
        return self.model.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""
        self.model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """The next step."""
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it."""
        self._at = state["at"]


def answers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every answer in nats, 0 where none is asked for, and whether it is right."""
    loss = F.cross_entropy(
        logits.flatten(0, -2).to(precise(logits.dtype)), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return loss.view_as(targets), (logits.argmax(-1) == targets) & (targets != IGNORE)


@torch.no_grad()
def tested(model: Learner, batch: Batch, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right answers, answers asked for, and summed cross-entropy of each row.

    Args:
        model: in the mode of tests meanwhile.
        batch: on any device.
        rows: at once.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found: list[list[Tensor]] = []
    for start in range(0, len(batch), rows):
        part = batch.rows(start, start + rows).to(device)
        with autocast(device):
            loss, right = answers(model(part), part.targets)
        sums = (x.view(len(part), -1).sum(1) for x in (right, part.targets != IGNORE, loss))
        found.append([x.cpu() for x in sums])
    model.train(training)
    right_n, asked_n, loss_n = (torch.cat(x) for x in zip(*found, strict=True))
    return right_n, asked_n, loss_n


def held_out(task: Task, seed: int, rows: int) -> Batch:
    """So many rows of the test, or all that there are."""
    return task.batch("test", seed, 0, rows if task.held_out is None else min(rows, task.held_out))
