"""Other libraries that decode the same model: transformers here, the others as subprocesses.

Every peer answers with the same dict: `decode_secs`, seconds of each repeat for `new_tokens`
greedy steps of all rows, prefill not included; `prefill_secs`, those of the prompts; `tokens`,
row 0's greedy ids; `version`. What is compiled or loaded on first use is not in them. This module
knows nothing of our own generator.
"""

import json
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from zerosearch_jax.errors import UserError


def torch_decode(
    directory: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    repeats: int,
    dtype: str,
    threads: int,
) -> dict:
    """Transformers on torch: `generate`, greedy, with its default KV cache.

    Decode is a run of `new_tokens + 1` tokens less a run of one; prefill is one forward pass over
    the prompts that fills the cache and computes the logits of the last position.

    Args:
      prompts: one list of token ids a row, all of one length.
      dtype: "float32" or "bfloat16", of weights and cache.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, which the peer transformers needs; "
            "run pip install -r requirements-test.txt"
        ) from error
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True
    )
    # Without an end token every row makes the tokens that were asked for.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    ids = torch.tensor([list(prompt) for prompt in prompts])
    mask = torch.ones_like(ids)

    def generate(count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count)
        return time.perf_counter() - start, out[0, ids.shape[1] :].tolist()

    def prefill() -> float:
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    decode_secs, prefill_secs = [], []
    with torch.inference_mode():
        prefill(), generate(new_tokens + 1)
        for _ in range(repeats):
            prefill_secs.append(prefill())
            first, _ = generate(1)
            total, tokens = generate(new_tokens + 1)
            decode_secs.append(total - first)
    return {
        "decode_secs": decode_secs,
        "prefill_secs": prefill_secs,
        "tokens": tokens[:new_tokens],
        "version": f"{transformers.__version__}, torch {torch.__version__}",
    }


def subprocess_peer(python: str | Path, script: str | Path, request: dict) -> dict:
    """The response of a peer script of `peers/` that runs under another interpreter.

    Args:
      python: interpreter of the environment that the script's head says how to make.
      request: what the script's head lists; written to its stdin as JSON.

    Raises:
      UserError: there is no such interpreter, or it lacks a package.
    """
    recipe = re.search(r"pip install (.+)", Path(script).read_text())[1]
    try:
        # -I: neither PYTHONPATH nor the user's own packages reach the other environment.
        done = subprocess.run(
            [str(python), "-I", str(script)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise UserError(
            f"{python} does not run ({error.strerror}); make an environment with "
            f"python3.11 -m venv and there pip install {recipe}"
        ) from error
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    if last.startswith("ModuleNotFoundError"):
        raise UserError(f"{last} ({script}); run {python} -m pip install {recipe}")
    raise RuntimeError(f"{script} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
