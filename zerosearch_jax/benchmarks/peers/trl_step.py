"""Peer script: whole GRPO steps of TRL's `GRPOTrainer`: sampling, reference log-probs, update.

It imports nothing of this project but `respond.py` next to it. Make its environment with

    python3.11 -m venv trlenv
    trlenv/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0

`run_peers.subprocess_peer` calls it with a JSON request on stdin; it prints one JSON line.

Request: model (Hugging Face directory), prompts (one list of token ids per question; a step uses
all of them), group_size, new_tokens (length of every completion: none ends early), micro_rows
(sequences of one forward and backward pass), learning_rate, beta1, beta2, weight_decay, clip_norm,
clip, kl, entropy, repeats, threads.
Response: step_secs (seconds of each step except the first), kl (mean, nats per token), version.

Everything that the request does not set keeps TRL's default: float32, gradient checkpointing, TRL's
chunked log-probs, one update per step (so TRL does not recompute the log-probs at sampling).
"""

import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -I leaves the script's folder out

from respond import respond  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # No network calls while a step is timed.


def distinct(completions: list[str], **_) -> list[float]:
    """Reward: the number of distinct characters of each completion, which differs in a group."""
    return [float(len(set(text))) for text in completions]


def texts_of(tokenizer, prompts: list[list[int]]) -> list[str]:
    """Returns the prompts' texts; TRL encodes them as the same ids."""
    texts = [tokenizer.decode(ids) for ids in prompts]
    if tokenizer(text=texts)["input_ids"] != prompts:
        sys.exit("prompts must be token ids that equal the encoding of their text")
    return texts


def run(request: dict) -> dict:
    """Returns the response to a request; see the module's docstring."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    class Clock(transformers.TrainerCallback):
        """Records the time at the end of each step."""

        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **_):
            self.ends.append(time.perf_counter())

    torch.set_num_threads(request["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["model"])
    rows = len(request["prompts"]) * request["group_size"]
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out,
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=request["micro_rows"],
            gradient_accumulation_steps=rows // request["micro_rows"],
            num_generations=request["group_size"],
            num_iterations=1,
            max_completion_length=request["new_tokens"],
            generation_kwargs={"min_new_tokens": request["new_tokens"]},
            max_steps=1 + request["repeats"],
            learning_rate=request["learning_rate"],
            lr_scheduler_type="constant",
            adam_beta1=request["beta1"],
            adam_beta2=request["beta2"],
            weight_decay=request["weight_decay"],
            max_grad_norm=request["clip_norm"],
            epsilon=request["clip"],
            beta=request["kl"],
            entropy_coef=request["entropy"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=request["model"],
            reward_funcs=distinct,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts_of(tokenizer, request["prompts"])}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    means = trainer.state.log_history[-1]  # TRL logs means over all steps at the end.
    if means["completions/min_length"] != request["new_tokens"]:
        sys.exit(
            f"the shortest completion has {means['completions/min_length']} tokens, "
            f"not {request['new_tokens']}"
        )
    return {
        "step_secs": [end - start for start, end in itertools.pairwise(clock.ends)],
        "kl": means["kl"],
        "version": f"{trl.__version__}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    respond(run)
