"""SFT and distillation: one trainer whose loss mixes cross entropy with a divergence from a teacher."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import SFTTrainer

from models.reasoner.callbacks import StepLog
from models.reasoner.corpus import IGNORED

_PAD_TO = 32


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to a multiple of 32.

    There is no mask on purpose: with causal attention nothing looks at padding on its right, its labels are ignored,
    and without a padding mask attention takes its fast path. `kept` [M] holds the positions, counted through the
    batch, whose next token is to be learned: found here, by the loader, so that the device need not be asked.
    """
    longest = -(-max(len(row["input_ids"]) for row in rows) // _PAD_TO) * _PAD_TO
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[index, :size] = torch.as_tensor(row["input_ids"], dtype=torch.long)
        labels[index, :size] = torch.as_tensor(row["labels"], dtype=torch.long)
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    kept = (following != IGNORED).nonzero().squeeze(-1)
    return {"input_ids": ids, "labels": labels, "kept": kept, "targets": following[kept]}


class SupervisedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFT whose loss is alpha * KL(teacher || student) + (1 - alpha) * cross entropy, on the solution's tokens.

    Without a teacher alpha is 0. Hinton et al. 2015, eq. 2-4; the divergence is scaled by the squared temperature as
    there. TRL's own loss waits for the device several times a step; this one never does.
    """

    def __init__(
        self, *args: Any, log: StepLog, teacher: Any = None, alpha: float = 0.0, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._step_log, self._alpha, self._temperature = log, alpha if teacher is not None else 0.0, temperature
        self._teacher = teacher
        if teacher is not None:
            self._teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixed loss over every solution token of the whole batch."""
        ids, kept, targets = inputs["input_ids"], inputs["kept"], inputs["targets"]
        outputs = model(input_ids=ids, use_cache=False)
        said = outputs.logits.flatten(0, 1).index_select(0, kept).float()
        entropy = functional.cross_entropy(said, targets, reduction="sum")
        loss, own = (1 - self._alpha) * entropy, max(1, len(kept))
        values = {"cross_entropy": entropy / own}
        if self._teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                told = self._teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1).index_select(0, kept)
            divergence = self._divergence(said, told.float())
            loss = loss + self._alpha * divergence
            values["kl"] = divergence / own
        self._step_log.keep(loss=loss / own, **values)
        loss = loss / (own if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, said: Tensor, told: Tensor) -> Tensor:
        t, width = self._temperature, min(said.shape[-1], told.shape[-1])
        said, told = said[:, :width], told[:, :width]  # what is beyond is padding of a table, no token
        student, teacher = functional.log_softmax(said / t, dim=-1), functional.log_softmax(told / t, dim=-1)
        return t * t * functional.kl_div(student, teacher, reduction="sum", log_target=True)
