"""The training loop: one function runs any stage of a recipe, and resumes it to the bit.

Run folder: recipe.json (resolved), metrics.jsonl, loss.png, states/ (see state.py), and when the
stage is finished checkpoint/, a Hugging Face folder. Started again with the same recipe, a run that
was killed continues behind its last train state and ends with the same weights as one that never
stopped.

It deliberately has no callbacks and no trainer object; parallelism is applied from outside.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codellama.artifact import read_manifest, sha256_file, write_file
from codellama.data.corpus import KIND as CORPUS
from codellama.data.corpus import corpus_documents
from codellama.data.loader import Batch, Loader
from codellama.data.packing import PackingSettings
from codellama.model.attention import causal, within_documents
from codellama.model.checkpoint import DTYPES, load_checkpoint, save_checkpoint
from codellama.model.config import ModelConfig
from codellama.model.transformer import Transformer
from codellama.recipe import Recipe, Stage
from codellama.tokenizer import Tokenizer
from codellama.train.loss import chunk_loss, linear_cross_entropy
from codellama.train.metrics import MetricsLog, draw_curve, matrix_flops_per_s
from codellama.train.optim import learning_rate, make_optimizer
from codellama.train.progress import Progress
from codellama.train.state import load_latest_state, save_state
from codellama.train.validate import validate

RECORD = "recipe.json"
MAX_SKIPPED_STEPS = 10  # steps in a row whose gradient is not finite
# Stage settings that leave every batch and the rounded loss as they are.
CHANGEABLE = {
    "micro_batch", "compile", "validate_every", "validation_tokens", "save_every", "keep_states",
}  # fmt: skip


class TrainingStopped(Exception):  # noqa: N818  it is not an error
    """Training was asked to stop; a train state was written and the same command continues."""


def train(recipe: Recipe, stage_name: str, device: str = "cpu", n_workers: int = 1) -> Path:
    """Run one stage, or what is left of it, and return its checkpoint folder.

    Raises:
        ValueError: wrong stage, missing corpus or tokenizer, or the run folder holds a run with
            other settings.
        OSError: the checkpoint cannot be written; train states are untouched.
        TrainingStopped: SIGTERM or SIGINT arrived; the state of the last step is saved.
    """
    stage = recipe.stage(stage_name)
    run_dir = recipe.run_dir(stage_name)
    checkpoint = run_dir / "checkpoint"
    run_dir.mkdir(parents=True, exist_ok=True)
    with _only_trainer(run_dir), _stop_signals() as stop:
        record = _record(recipe, stage_name)
        _check_same_run(run_dir, record)
        if checkpoint.is_dir():
            print(f"{checkpoint}: already trained", file=sys.stderr)
            return checkpoint
        tokenizer = Tokenizer.load(recipe.tokenizer_dir)
        model = _initial_model(recipe, stage, tokenizer).to(device)
        optimizer = make_optimizer(model, stage)
        # Not before everything was found: a start that fails must not hold the folder.
        write_file(run_dir / RECORD, json.dumps(record, indent=2) + "\n")
        with _training_loader(recipe, stage, n_workers) as loader:
            step = 0
            if (resumed := load_latest_state(run_dir, model, optimizer)) is not None:
                step, loader_state = resumed
                loader.load_state_dict(loader_state)
                print(f"resumed at step {step}", file=sys.stderr)
            log = MetricsLog(run_dir, step)
            try:
                _run_steps(
                    recipe, stage, run_dir, model, optimizer, loader, tokenizer, log, step, stop
                )
            finally:
                log.close()
                _draw(run_dir)
        save_checkpoint(
            checkpoint, model.config, model.state_dict(), stage.dtype, write_more=tokenizer.save
        )
    return checkpoint


def _run_steps(
    recipe: Recipe,
    stage: Stage,
    run_dir: Path,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    loader: Loader,
    tokenizer: Tokenizer,
    log: MetricsLog,
    step: int,
    stop: list[int],
) -> None:
    """Take optimiser steps from `step` to the end of the stage."""
    first_step = step
    device = str(next(model.parameters()).device)
    forward = LossFunction(model, stage)
    peak = matrix_flops_per_s(device, DTYPES[stage.dtype])
    flops_per_token = model.config.train_flops_per_token(stage.seq_len)
    documents = corpus_documents(recipe.corpus_dir, "validation")
    if len(documents) == 0:
        print("warning: the corpus has no held-out documents: no validation", file=sys.stderr)

    def save() -> None:
        try:
            save_state(run_dir, step, model, optimizer, loader.state_dict(), stage.keep_states)
        except OSError as error:  # a full disk must not end a run; the older states stand
            print(f"warning: train state of step {step} not saved: {error}", file=sys.stderr)

    n_skipped = 0
    stepping_s = 0.0  # time in steps, without the first one: it starts workers and compiles
    last = time.perf_counter()
    with Progress(stage.steps, step) as progress:
        while step < stage.steps:
            rate = learning_rate(stage, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(loader)
            loss = torch.zeros((), device=device)
            weights = batch.loss_mask.float() / batch.loss_mask.sum().clamp(min=1)
            for micro, weight in zip(
                batch.micro_batches(stage.micro_batch),
                weights.split(stage.micro_batch),
                strict=True,
            ):
                part = forward(micro.to(device), weight.to(device))
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.grad_clip)
            if torch.isfinite(norm):
                optimizer.step()
                n_skipped = 0
            else:
                n_skipped += 1
                print(f"warning: step {step + 1} skipped: gradient is {norm}", file=sys.stderr)
                if n_skipped == MAX_SKIPPED_STEPS:
                    raise ValueError(
                        f"{n_skipped} steps in a row without a finite gradient; the train states "
                        f"in {run_dir / 'states'} are from before; lower peak_lr"
                    )
            optimizer.zero_grad(set_to_none=True)
            took = time.perf_counter() - last
            stepping_s += took if step > first_step else 0
            speed = stage.batch_tokens / took
            row: dict[str, Any] = {
                "step": step + 1,
                "loss": loss.item(),
                "lr": rate,
                "grad_norm": norm.item(),
                "skipped": n_skipped > 0,
                "tokens": (step + 1) * stage.batch_tokens,
                "tokens_per_s": round(speed, 1),
                "mfu": round(speed * flops_per_token / peak, 4),
                "stall_share": round(loader.stall_s / stepping_s, 5) if stepping_s else 0.0,
            }
            step += 1
            log.write(row)
            progress.update(row)
            if step % stage.validate_every == 0 or step == stage.steps:
                if len(documents) > 0:
                    result = validate(model, tokenizer, documents, stage)
                    log.write({"step": step, **result})
                    progress.note(step, result)
                _draw(run_dir)
            if step % stage.save_every == 0 or step == stage.steps or stop:
                save()
            last = time.perf_counter()
            if stop and step < stage.steps:
                raise TrainingStopped(
                    f"stopped at step {step} of {stage.steps}; the same command continues"
                )


class LossFunction:
    """Batch to loss: compiled where a C++ compiler exists, in the stage's precision."""

    def __init__(self, model: Transformer, stage: Stage) -> None:
        self._model = model
        self._dtype = DTYPES[stage.dtype]
        self._document_mask = stage.document_mask
        self._hidden: Any = model.model
        self._chunk: Any = chunk_loss
        if stage.compile and can_compile():
            self._hidden = torch.compile(self._decode, dynamic=False)
            self._chunk = torch.compile(chunk_loss)
        else:
            self._hidden = self._decode

    def _decode(self, tokens: Tensor, positions: Tensor, document_ids: Tensor) -> Tensor:
        if self._document_mask:
            return self._model.model(tokens, positions, within_documents(document_ids))
        # What attends across documents needs positions that do not start again in each.
        through = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        return self._model.model(tokens, through, causal)

    def __call__(self, batch: Batch, weights: Tensor) -> Tensor:
        """The weighted sum of the batch's losses. weights: [B, T] float32."""
        device = batch.tokens.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            hidden = self._hidden(batch.tokens, batch.positions, batch.document_ids)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self._model.lm_head.weight,
            batch.targets.flatten(),
            weights.flatten(),
            self._dtype,
            self._chunk,
        )


def can_compile() -> bool:
    """Whether torch.compile can build code for the CPU here: it needs a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _initial_model(recipe: Recipe, stage: Stage, tokenizer: Tokenizer) -> Transformer:
    """The float32 model that a stage starts from, random or loaded."""
    if stage.init == "random":
        config = ModelConfig.named(recipe.model.name).replace(**recipe.model.overrides)
        model = Transformer(_with_stage(config, stage))
        model.initialise(torch.Generator().manual_seed(stage.seed))
    else:
        parent = Path(stage.init)
        if stage.init in recipe.stages:
            parent = recipe.run_dir(stage.init) / "checkpoint"
            if not parent.is_dir():
                raise ValueError(f"stage {stage.init!r} comes first: {parent} does not exist")
        loaded = load_checkpoint(parent, dtype="float32")
        model = Transformer(_with_stage(loaded.config, stage))
        model.load_state_dict(loaded.state_dict())
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model has vocab_size {model.config.vocab_size}, "
            f"the tokenizer {tokenizer.vocab_size}"
        )
    return model.train()


def _with_stage(config: ModelConfig, stage: Stage) -> ModelConfig:
    """The model's config with what a stage may change: rotary base and context length."""
    return config.replace(
        max_position_embeddings=stage.seq_len, rope_theta=stage.rope_theta or config.rope_theta
    )


def _training_loader(recipe: Recipe, stage: Stage, n_workers: int) -> Loader:
    settings = PackingSettings(
        stage.seq_len, stage.fim_rate, stage.spm_share, stage.max_document_chars, stage.seed
    )
    return Loader(
        partial(corpus_documents, recipe.corpus_dir, "train"),
        partial(Tokenizer.load, recipe.tokenizer_dir),
        settings,
        n_lanes=stage.batch_tokens // stage.seq_len,
        n_workers=n_workers,
    )


def _record(recipe: Recipe, stage_name: str) -> dict[str, Any]:
    """What a run is made of."""
    corpus = read_manifest(recipe.corpus_dir, CORPUS)
    vocabulary = recipe.tokenizer_dir / "tokenizer.model"
    if not vocabulary.is_file():
        raise ValueError(f"{recipe.tokenizer_dir}: not a tokenizer folder; prepare the recipe")
    return {
        "stage": stage_name,
        "corpus_fingerprint": corpus["fingerprint"],
        "tokenizer_sha256": sha256_file(vocabulary),
        "model": recipe.model.model_dump(mode="json"),
        "settings": recipe.stage(stage_name).model_dump(mode="json"),
    }


def _check_same_run(run_dir: Path, record: dict[str, Any]) -> None:
    """Refuse to continue a run that was made of something else."""
    path = run_dir / RECORD
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(set(_flat(record).items()) ^ set(_flat(before).items()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: {error}; delete {run_dir} to start again") from None
    if changed:
        raise ValueError(
            f"{run_dir} holds a run with another {changed[0][0]!r}; "
            "delete it, or set another `work`"
        )


def _flat(record: dict[str, Any]) -> dict[str, str]:
    """A record's values by dotted key, without what a run may be continued with changed."""
    flat: dict[str, str] = {}
    for part, values in record.items():
        if isinstance(values, dict):
            kept = {key: value for key, value in values.items() if key not in CHANGEABLE}
            flat |= {f"{part}.{key}": json.dumps(value) for key, value in kept.items()}
        else:
            flat[part] = json.dumps(values)
    return flat


def _draw(run_dir: Path) -> None:
    try:
        draw_curve(run_dir)
    except OSError as error:
        print(f"warning: loss curve not drawn: {error}", file=sys.stderr)


@contextmanager
def _only_trainer(run_dir: Path) -> Iterator[None]:
    """Hold the run folder's lock; a second trainer on the same folder is refused."""
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{run_dir} is being trained by {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list; the second one acts at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step; once more to stop now\n")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # signals can be handled only in the main thread
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
