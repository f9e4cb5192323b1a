"""Scores a model that is being trained, through lm-eval, on all ranks that hold a part of it.

Every rank runs lm-eval over the same requests and answers its share; the answers are exchanged, so that all ranks know
all scores. Under ZeRO-3 a forward pass needs every rank, and shares may differ in their number of passes: before each
pass the ranks agree that one of them still needs it, and a rank that is done goes along with an empty one. Tasks that
generate text are refused: they need a pass for each token. The trainer gives the forward pass and finds this class by
its name; neither imports the other.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from evalsuite import bundle, definitions, runner, samples, scorable
from evalsuite.counting import CountingHFLM
from evalsuite.native import hf_config
from tinyllama import scratch
from tinyllama.errors import UserError
from tinyllama.model.config import ModelConfig
from tinyllama.tokenizer.export import export_hf

KEPT = ("value", "stderr", "ci95", "metric", "unit", "n")  # of a task's entry in results.json
LENGTH_MULTIPLE = 64  # rows are padded to it, so that a compiled model meets few shapes


class _Shape(torch.nn.Module):
    """What HFLM asks of a model object: a config, a device, weights that can be tied. The weights are elsewhere."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.config, self.device = hf_config(config), device

    def tie_weights(self) -> None:
        """Nothing is tied in this architecture."""


class LiveLM(CountingHFLM):
    """lm-eval's interface over a forward pass that all ranks take together. Collective."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        shape: _Shape,
        tokenizer: Any,
        batch_size: int,
        max_length: int,
        control: Any,
    ) -> None:
        """forward: ids (B, T) to logits (B, T, V). control: a group of all ranks apart from the training's."""
        super().__init__(
            pretrained=shape, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
        )
        self._forward, self._control = forward, control
        self.only_checks = False  # while requests are checked before the training, and none is scored

    def _pass(self, needed: bool, ids: torch.Tensor) -> torch.Tensor | None:
        """One forward pass of all ranks, if any of them needs it."""
        wanted = torch.tensor([int(needed)], dtype=torch.int32)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._control)
        return self._forward(ids) if wanted.item() else None

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor | None:
        """Logits (B, T, V) of right-padded rows (B, T); causal, so the padding changes nothing before it."""
        rows, length = inps.shape
        padded = min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.max_length)
        ids = inps.new_zeros(self.batch_size_per_gpu, padded)
        ids[:rows, :length] = inps
        logits = self._pass(True, ids)
        return None if logits is None else logits[:rows, :length]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        # All ranks know all requests and all answers, and so they agree on an error; alone, one would wait for ever.
        scorable.refuse_unscorable(requests, self.max_length, self._instances)
        if self.only_checks:
            return [(0.0, False)] * len(requests)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = self._answers(requests[rank::ranks], *args, **kwargs) if requests[rank::ranks] else []
        empty = torch.zeros(self.batch_size_per_gpu, LENGTH_MULTIPLE, dtype=torch.int64, device=self.device)
        while self._pass(False, empty) is not None:
            pass
        shares: list[Any] = [None] * ranks
        dist.all_gather_object(shares, mine, group=self._control)
        found = [shares[index % ranks][index // ranks] for index in range(len(requests))]
        scorable.refuse_not_numbers(found)
        return found


class LiveEvaluation:
    """The tasks of one run, prepared once; calling it scores the model as it is now. Collective."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        model: ModelConfig,
        device: torch.device,
        control: Any,
        tokenizer_model: Path,
        tasks: str,
        data_dir: str | None,
        limit: int | None,
        batch_size: int,
    ) -> None:
        self.limit, self._control = limit, control
        self._scratch = scratch.make("tinyllama-eval-")
        if data_dir:
            bundle.go_offline(self._scratch / "huggingface")
        runner.quieten()
        self._prepared = definitions.prepare_for_training(tasks, data_dir, self._scratch)
        export_hf(tokenizer_model, self._scratch / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(self._scratch / "tokenizer")
        self._lm = LiveLM(forward, _Shape(model, device), tokenizer, batch_size, model.max_position_embeddings, control)
        self._lm.only_checks = True
        self()
        self._lm.only_checks = False

    def __call__(self) -> dict[str, dict[str, Any]]:
        """Per task: value, stderr, ci95, metric, unit and n; without those for which the model yields no numbers."""
        found: dict[str, dict[str, Any]] = {}
        for task in self._prepared:
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's bars would tear the training's
                    results = runner.run_task(self._lm, task, self.limit)
            except scorable.NotNumbersError:
                continue
            if results is not None:
                with contextlib.suppress(UserError):  # scores that are no numbers; the other ranks wait for this one
                    entry = runner.score(task.benchmark, results, task.leaves)
                    rows = samples.rows(results["samples"], entry["protocol"], results["asked"], task.benchmark.cluster)
                    samples.add_intervals(entry, samples.items(rows, entry["metric_key"]))
                    found[task.benchmark.name] = {key: entry[key] for key in KEPT}
        known = [found]
        dist.broadcast_object_list(known, group=self._control)
        return known[0]

    def close(self) -> None:
        """Remove what was prepared."""
        shutil.rmtree(self._scratch, ignore_errors=True)
