"""Times whole GRPO steps of TRL's `GRPOTrainer`: sampling, reference log-probs, update.

Stand-alone: it imports nothing of this project and runs in an environment of its own,

    python3.11 -m venv trlenv
    trlenv/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0

and is called by `bench_peers.subprocess_peer`: JSON request on stdin, one JSON line on stdout.

Request: model (Hugging Face directory), prompts (token ids, one list a question; a step takes all
of them), group_size, new_tokens (of every completion: none ends early), micro_rows (sequences of
one forward and backward pass), learning_rate, beta1, beta2, weight_decay, clip_norm, clip, kl,
entropy, repeats, threads.
Response: step_secs (seconds of each step but the first, which is not counted), kl (mean, nats a
token), version.

TRL is left at its defaults but for what the request names: float32, gradient checkpointing, its
own chunked log-probs, one update a step (so that the log-probs at sampling are not computed).
"""

import itertools
import json
import os
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # no call of home while a step is timed


def distinct(completions: list[str], **_) -> list[float]:
    """A reward that differs within a group: distinct characters of each completion."""
    return [float(len(set(text))) for text in completions]


def texts_of(tokenizer, prompts: list[list[int]]) -> list[str]:
    """The prompts' texts, which TRL turns back into the same ids."""
    texts = [tokenizer.decode(ids) for ids in prompts]
    if tokenizer(text=texts)["input_ids"] != prompts:
        sys.exit("prompts must be token ids that their text is encoded as")
    return texts


def run(request: dict) -> dict:
    """The response to a request; see the module's docstring."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    class Clock(transformers.TrainerCallback):
        """When each step ended."""

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
    means = trainer.state.log_history[-1]  # over all steps, logged at the end
    if means["completions/min_length"] != request["new_tokens"]:
        sys.exit(f"completions had {means['completions/min_length']} tokens at least")
    return {
        "step_secs": [end - start for start, end in itertools.pairwise(clock.ends)],
        "kl": means["kl"],
        "version": f"{trl.__version__}, torch {torch.__version__}",
    }


def main() -> None:
    """Reads the request, limits the threads, prints the response."""
    request = json.load(sys.stdin)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["threads"]])
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries print there
    response = run(request)
    print(json.dumps(response), file=stdout)


if __name__ == "__main__":
    main()
