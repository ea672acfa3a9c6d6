"""Post-training of a pruned model on rows of text. What is trained is an option (engine/recovery/trained).

The paper (appendix H) states LoRA adapters, a linear schedule, batch 1 with 4 accumulated, and 8,000 rows of Alpaca.
The following is not stated there: one epoch; rows of at most 512 tokens, which covers nearly every row of Alpaca. The
loss covers the whole text including the prompt, because the aim is to recover the language model, not one style of
answers.

Training uses transformers' `Trainer`: AdamW without weight decay, no warm-up, gradients clipped to norm 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from blockpruner.engine.errors import RecoveryFailed, UserError
from blockpruner.engine.losses import token_kl, token_nll
from blockpruner.engine.model.full_memory import is_out_of_memory
from blockpruner.engine.modes import ordinary_modes
from blockpruner.engine.recovery.checkpoints import complete, latest_checkpoint, read_losses
from blockpruner.engine.recovery.config import Loss, RecoveryConfig
from blockpruner.engine.sections import Bos, ChatTemplate
from blockpruner.engine.text.chat import as_texts
from blockpruner.engine.text.rows import training_rows_of
from blockpruner.engine.text.tokens import token_ids

SAVE_STEPS = 20
"""Optimizer steps between two training checkpoints."""
IGNORED = -100
"""Label of a token that is not predicted: padding."""


@dataclass(frozen=True)
class TrainingRows:
    tokens: list[Tensor]
    """Token ids of each row, int64 [2 to seq_len], in the order in which the rows were drawn."""
    rest: list[str]
    """Held-out texts, which were not drawn."""
    notes: tuple[str, ...]
    """Differences between what was requested and what the source could provide."""

    @property
    def fingerprint(self) -> str:
        """Digest of the token ids."""
        digest = hashlib.sha256()
        for row in self.tokens:
            digest.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
        return digest.hexdigest()[:16]


def draw_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int,
    seq_len: int,
    seed: int,
    text_column: str = "text",
    chat_template: ChatTemplate = ChatTemplate.AUTO,
    bos: Bos = Bos.FIRST_WINDOW,
) -> TrainingRows:
    """Draw rows as calibration does (`random.Random(seed).sample`) and tokenise each row.

    bos: `every-window` is a BOS token before each row, `none` is no special tokens; otherwise the tokenizer's defaults.

    Raises UserError if the source is missing, is empty or lacks the column.
    """
    if num_rows < 1:
        raise UserError(f"expected `num_rows` of at least 1, got {num_rows}.")
    rows = training_rows_of(source, text_column)
    notes = []
    if num_rows > len(rows):
        notes.append(
            f"{source!r} has {len(rows)} rows, fewer than the {num_rows} requested; all are used, none held out"
        )
    order = rows.draw(num_rows, seed)
    texts, more = as_texts(rows, order, tokenizer, chat_template)
    encoded = token_ids(texts, tokenizer, is_plain=bos in (Bos.EVERY_WINDOW, Bos.NONE))
    if bos is Bos.EVERY_WINDOW:
        encoded = [[tokenizer.bos_token_id, *ids] for ids in encoded]
    tokens = [torch.tensor(ids[:seq_len], dtype=torch.long) for ids in encoded if len(ids) > 1]
    if num_long := sum(len(ids) > seq_len for ids in encoded):
        notes.append(f"{num_long} of {len(order)} rows are longer than {seq_len} tokens and were cut off")
    if len(tokens) < len(order):
        notes.append(f"{len(order) - len(tokens)} of {len(order)} rows have no token to predict and were left out")
    if not tokens:
        raise UserError(f"expected rows of at least two tokens in {source!r}, got none.")
    others = sorted(set(range(len(rows))) - set(order))
    rest, _ = as_texts(rows, others, tokenizer, chat_template)
    return TrainingRows(tokens, rest, (*more, *notes))


def draw_mixed_rows(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, num_rows: int, **how: Any
) -> TrainingRows:
    """Draw the same number of rows from each source, one more from the first ones if the number does not divide. how:
    see `draw_rows`."""
    if num_rows < len(sources):
        raise UserError(f"expected `num_rows` of at least {len(sources)}, one of each `data`, got {num_rows}.")
    shares = [num_rows // len(sources) + (number < num_rows % len(sources)) for number in range(len(sources))]
    drawn = [draw_rows(source, tokenizer, num_rows=share, **how) for source, share in zip(sources, shares, strict=True)]
    return TrainingRows(
        [row for one in drawn for row in one.tokens],
        [text for one in drawn for text in one.rest],
        tuple(note for one in drawn for note in one.notes),
    )


def train(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    config: RecoveryConfig,
    folder: Path,
    on_step: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
    *,
    projections: Collection[str] = (),
    teacher: PreTrainedModel | None = None,
    num_processes: int = 1,
) -> None:
    """Train what `config.train` says on the model's device, and write the result to `folder`.

    If the folder holds checkpoints of the same training, training resumes from the last one; on a CPU the result has
    the same bits as an uninterrupted training. `on_step` gets the step, the number of steps and the loss of the step.
    projections: names of the output projections within their layers, for `config.train=projections`.
    teacher: the dense model, for `config.loss=distill`; its logits are computed for one forward at a time.
    With `num_processes`, every process of a torch.distributed group calls this function and takes its share of the rows
    of each step; `config.accumulation` must be a multiple of it.

    Raises RecoveryFailed if the loss is not finite or the device does not have enough memory.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=model.device.type == "cpu",
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation // num_processes,
        learning_rate=config.train.lr,
        lr_scheduler_type="linear",
        seed=config.seed,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type != "cpu",
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # otherwise it spreads a batch over all visible GPUs with torch's DataParallel
    if (teacher is None) != (config.loss is Loss.TEXT):
        raise ValueError("a teacher is needed to distill, and for nothing else.")
    trainer = _Trainer(
        teacher=teacher,
        model=config.train.add(model, projections=projections, seed=config.seed),
        args=arguments,
        train_dataset=list(rows),
        data_collator=_collate,
        callbacks=[_Watch(on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    last = latest_checkpoint(folder)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RecoveryFailed(
            "the device does not have enough memory for this training; use a smaller `seq_len` or `batch_size`."
        ) from error
    if trainer.is_world_process_zero():
        config.train.save(trainer.model, folder)


def recorded_losses(folder: Path) -> list[float]:
    """Return the loss of each step of a finished training: the mean NLL over the predicted tokens, in nats."""
    last = latest_checkpoint(folder)
    assert last is not None
    return read_losses(last)


def recovered_share(dense: float, pruned: float, recovered: float) -> float | None:
    """Return the recovered share of the loss from pruning: 1 equals the dense model. None if nothing was lost."""
    lost = pruned - dense
    return (pruned - recovered) / lost if lost > 0 and math.isfinite(lost) else None


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Combine rows [T_i] into a batch [rows, longest], padded on the right."""
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    labels[:, 0] = IGNORED  # the first token is not predicted; the Trainer counts the labels, so it must not count
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": labels,
    }


class _Trainer(Trainer):  # type: ignore[misc]
    """Runs the teacher, if there is one, on what the model is about to read."""

    def __init__(self, *, teacher: PreTrainedModel | None, **options: Any) -> None:
        super().__init__(compute_loss_func=self._loss, **options)
        self._teacher = teacher
        self._dense: Tensor | None = None
        """The teacher's logits [rows, tokens, vocab] of one forward."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if self._teacher is not None:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                self._dense = self._teacher(**given, use_cache=False).logits
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        """Return a batch's share of the step's loss: its summed token losses divided by the number of tokens that the
        whole step predicts. Not every architecture's own loss uses that number."""
        logits = outputs.logits[:, :-1]
        targets = labels[:, 1:].to(logits.device)
        is_predicted = targets != IGNORED
        if self._dense is None:
            losses = token_nll(logits[is_predicted], targets[is_predicted])
        else:
            losses = token_kl(logits[is_predicted], self._dense[:, :-1].to(logits.device)[is_predicted])
        return losses.sum() / num_items_in_batch


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports each step, stops training if the loss is not finite, and marks complete checkpoints."""

    def __init__(self, on_step: Callable[[int, int, float], None]) -> None:
        self.on_step = on_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise RecoveryFailed(f"the loss of training step {state.global_step} is not finite; use a lower `lr`.")
        self.on_step(state.global_step, state.max_steps, logs["loss"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            ordinary_modes(folder)
            complete(folder)
