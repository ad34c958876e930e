"""Other libraries that run the same model: transformers in this process, others as subprocesses.

The response of a decoding peer has the keys

  decode_secs    seconds of each repeat for `new_tokens` greedy steps of all rows, without prefill
  prefill_secs   seconds of each repeat for the prompts
  tokens         greedy token ids of row 0
  version

and the response of a training peer has `step_secs` (seconds of each whole GRPO step) and `version`.
Compilation and loading on first use are not timed. This module does not use our generator or
learner.
"""

import json
import re
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from zerosearch_jax.errors import UserError


def torch_decode(
    directory: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    repeats: int,
    dtype: str,
    threads: int = 0,
    device: str = "cpu",
) -> dict:
    """Times greedy `generate` of transformers on torch, with its default KV cache.

    Decode time is a run of `new_tokens + 1` tokens minus a run of one token. Prefill time is one
    forward pass over the prompts that fills the cache and computes the last position's logits.

    Args:
      prompts: one list of token ids per row, all of one length.
      dtype: "float32" or "bfloat16", for weights and cache.
      threads: CPU threads; 0 leaves the choice to torch.
      device: torch's device name, "cpu" or "cuda".

    Returns:
      The response of a decoding peer; see the module's docstring.

    Raises:
      UserError: torch or transformers is missing, or torch sees no GPU.
    """
    torch, transformers = _torch(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU; install a build of torch with CUDA, or leave out this peer with "
            "--config.torch_device=''"
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True
    ).to(device)
    # Without an end token every row generates exactly the requested number of tokens.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
    mask = torch.ones_like(ids)

    def generate(count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count)
        tokens = out[0, ids.shape[1] :].tolist()  # This waits for the device.
        return time.perf_counter() - start, tokens

    def prefill() -> float:
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1).logits[0, 0, 0].item()
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


class TorchUpdater:
    """GRPO updates by transformers on torch, with checkpointed layers and fused AdamW.

    The update is plain torch code: log-softmax and entropy over the whole logits, the frozen
    reference as a second model, gradients summed over micro-batches, no decay of norms and biases.

    Args:
      dtype: "float32", or "bfloat16" for autocast over float32 parameters.
      clip: the ratio stays in [1 - clip, 1 + clip].
      kl, entropy: weights of the k3 KL and of the entropy bonus.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        dtype: str,
        threads: int,
        learning_rate: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        clip_norm: float,
        clip: float,
        kl: float,
        entropy: float,
    ):
        self._torch, transformers = _torch(threads)
        self._model, self._reference = (
            transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=self._torch.float32, local_files_only=True
            )
            for _ in range(2)
        )
        self._reference.requires_grad_(False)
        with warnings.catch_warnings():  # Deprecated name that all releases since 5.0 have.
            warnings.simplefilter("ignore", FutureWarning)
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model.train()  # Eval mode would not checkpoint; there is no dropout.
        parameters = list(self._model.parameters())
        self._optimizer = self._torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=(beta1, beta2),
            weight_decay=weight_decay,
            fused=True,
        )
        self._autocast = dtype == "bfloat16"
        self._clip_norm, self._clip, self._kl, self._entropy = clip_norm, clip, kl, entropy

    def update(self, arrays: Mapping[str, np.ndarray], micro_rows: int) -> tuple[float, float]:
        """Runs one update; returns its seconds and loss.

        Args:
          arrays: tokens, targets, mask, old_logprobs, advantages and weights, each `[R, T]` with
            one sequence per row. Target t follows token t; the other arrays refer to the target.
          micro_rows: rows of one forward and backward pass.
        """
        began = time.perf_counter()
        total = 0.0
        for start in range(0, len(arrays["tokens"]), micro_rows):
            part = {
                name: self._torch.from_numpy(array[start : start + micro_rows])
                for name, array in arrays.items()
            }
            loss = self._loss(part)
            loss.backward()
            total += loss.item()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - began, total

    def _logits(self, model, part):
        with self._torch.autocast("cpu", self._torch.bfloat16, enabled=self._autocast):
            return model(input_ids=part["tokens"].long(), use_cache=False).logits.float()

    def _loss(self, part):
        torch, targets = self._torch, part["targets"].long()[..., None]
        with torch.no_grad():
            logits = self._logits(self._reference, part)
            reference = logits.gather(-1, targets)[..., 0] - logits.logsumexp(-1)
            del logits
        log_p = torch.log_softmax(self._logits(self._model, part), dim=-1)
        logprobs = log_p.gather(-1, targets)[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = torch.exp(logprobs - part["old_logprobs"])
        clipped = ratio.clamp(1 - self._clip, 1 + self._clip)
        surrogate = -torch.minimum(ratio * part["advantages"], clipped * part["advantages"])
        d = reference - logprobs
        kl = torch.exp(d) - d - 1
        terms = surrogate - self._entropy * entropy + self._kl * kl
        return (terms * part["weights"] * part["mask"]).sum()


def subprocess_peer(python: str | Path, script: str | Path, request: dict) -> dict:
    """Runs a script of `peers/` under another interpreter and returns its response.

    Args:
      python: interpreter of the environment that the script's docstring describes.
      request: the keys that the script's docstring lists; sent to its stdin as JSON.

    Raises:
      UserError: the interpreter does not run or lacks a package.
      RuntimeError: the script failed in another way.
    """
    recipe = re.search(r"pip install (.+)", Path(script).read_text())[1]
    try:
        # -I keeps PYTHONPATH and the user's packages out of the other environment.
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
            f"python3.11 -m venv and run pip install {recipe} in it"
        ) from error
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    if last.startswith("ModuleNotFoundError"):
        raise UserError(f"{last} ({script}); run {python} -m pip install {recipe}")
    raise RuntimeError(f"{script} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def _torch(threads: int):
    """Imports torch, limited to `threads` unless 0, and transformers."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(
            f"the peer transformers needs {error.name}, which is not installed; "
            "run pip install -r requirements-test.txt"
        ) from error
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers
