"""Decode and prefill speed against other libraries and against the machine's limits.

All libraries run the same weights on the same prompts. They decode greedily, without an
end-of-text token, one after the other. Decode counts the tokens of all rows after the prompt;
prefill counts the tokens of the prompts.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from zerosearch_jax.benchmarks import run_peers
from zerosearch_jax.benchmarks.config import BandwidthBenchConfig, DecodeBenchConfig
from zerosearch_jax.benchmarks.rows import Row
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.generate.stops import build_stop_table
from zerosearch_jax.models.config import from_hf
from zerosearch_jax.models.transformer import init_params
from zerosearch_jax.models.weights import load_params, save_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.text.tokenizer import encode
from zerosearch_jax.training import factory

PEERS = Path(__file__).parent / "peers"
PRECISIONS = {
    "bfloat16": dict(dtype=jnp.bfloat16),
    "int8 weights, bfloat16 cache": dict(dtype=jnp.bfloat16, int8_weights=True),
}


def run(config: DecodeBenchConfig) -> list[Row]:
    """Rows for each number of slots and each available peer, and against the machine's limits."""
    model = factory.load_model(config.model, make_mesh(), "float32")
    rng = np.random.default_rng(0)
    words = rng.integers(1000, model.config.vocab_size - 1000, (max(config.slots), 4096)).tolist()
    rows, others = [], peers(config)
    copied, multiplied = copy_bandwidth(config.threads), gemm_peak()
    for slots in config.slots:
        prompts = [row[: config.prompt_tokens] for row in words[:slots]]
        tokens = slots * config.new_tokens
        decoder = Decoder(model, prompts, config.new_tokens)
        ours = decoder.rates(config.repeats)
        if slots == min(config.slots):
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
            moved = [rate / slots * size / 1e9 for rate in ours]
            rows.append(Row(f"decode {slots} / copy bandwidth", moved, copied, "GB/s"))
        if slots == max(config.slots):
            done = [rate * flops_per_token(model, config) / 1e9 for rate in ours]
            rows.append(Row(f"decode {slots} / GEMM peak", done, multiplied, "GFLOP/s"))
        for name, peer in others.items():
            # Ours runs before and after the peer, so that a slow minute hits both.
            ours = decoder.rates(config.repeats)
            response = peer(prompts, config.new_tokens)
            ours += decoder.rates(config.repeats)
            same = len(os.path.commonprefix([decoder.first, response["tokens"]]))
            print(f"{name}: first {same} of {config.new_tokens} greedy tokens of row 0 equal ours")
            rates = [tokens / secs for secs in response["decode_secs"]]
            rows.append(Row(f"decode {slots} / {name}", ours, rates, "tokens/s"))
            print(rows[-1], flush=True)
    prompts = [words[0][: config.prefill_tokens]]
    for name, peer in others.items():
        ours = prefill_rates(model, prompts, config.repeats)
        secs = peer(prompts, 1)["prefill_secs"]
        ours += prefill_rates(model, prompts, config.repeats)
        rates = [config.prefill_tokens / s for s in secs]
        rows.append(Row(f"prefill {config.prefill_tokens} / {name}", ours, rates, "tokens/s"))
        print(rows[-1], flush=True)
    for name, options in PRECISIONS.items():
        print(f"{name} against float32: {precision_effect(model, options)}")
    return rows


def peers(config: DecodeBenchConfig) -> dict[str, Callable[[Sequence[Sequence[int]], int], dict]]:
    """The available peers by name, each a function `(prompts, new_tokens) -> response`.

    The docstring of `run_peers` describes the response.
    """

    def script(python: str, name: str):
        def run_script(prompts, new_tokens):
            return run_peers.subprocess_peer(
                python,
                PEERS / name,
                dict(
                    model=str(Path(config.model).absolute()),
                    prompts=[list(prompt) for prompt in prompts],
                    slots=len(prompts),
                    new_tokens=new_tokens,
                    repeats=config.repeats,
                    dtype="float32",
                    threads=config.threads,
                ),
            )

        return run_script

    def torch(prompts, new_tokens):
        return run_peers.torch_decode(
            config.model,
            prompts,
            new_tokens=new_tokens,
            repeats=config.repeats,
            dtype="float32",
            threads=config.threads,
        )

    found = {"transformers": torch}
    for name, python, file in (
        ("tunix", config.peers.tunix_python, "tunix_decode.py"),
        ("llama.cpp", config.peers.llamacpp_python, "llamacpp_decode.py"),
    ):
        if python:
            found[name] = script(python, file)
        else:
            print(f"{name}: not run (config.peers has no interpreter for it)")
    return found


def accelerator(config: BandwidthBenchConfig) -> list[Row]:
    """Decoding of random models on an accelerator, against its memory bandwidth and torch.

    A step must read at least the weights once and every row's cache; only these bytes count.

    Raises:
      UserError: `config.peak_gb_per_s` is missing, or torch sees no GPU.
    """
    if not config.peak_gb_per_s:
        raise UserError(
            "config.peak_gb_per_s is 0; set the device's memory bandwidth, such as "
            "--config.peak_gb_per_s=3350 for an H100 SXM"
        )
    rows = []
    for name, shape in config.models.items():
        model_config, dtype = from_hf(dict(shape)), factory.dtype_of(config.dtype)
        ids = np.random.default_rng(0).integers(
            0, model_config.vocab_size, (max(config.slots), config.prompt_tokens)
        )
        with TemporaryDirectory() as directory:
            save_params(directory, init_params(model_config, 0, dtype=dtype), model_config)
            params = load_params(directory, model_config, make_mesh(), dtype=dtype)
            model = factory.Model(model_config, params, None, {})
            for slots in config.slots:
                prompts = ids[:slots].tolist()
                precision = dict(dtype=dtype, int8_weights=config.int8_weights)
                decoder = Decoder(model, prompts, config.new_tokens, **precision)
                rates = decoder.rates(config.repeats)
                read = bytes_per_step(model, slots, config)
                moved = [rate / slots * read / 1e9 for rate in rates]
                title = f"decode {name} {slots}"
                rows.append(Row(f"{title} / bandwidth", moved, [config.peak_gb_per_s], "GB/s"))
                print(rows[-1], flush=True)
                if not config.torch_device:
                    continue
                response = run_peers.torch_decode(
                    directory,
                    prompts,
                    new_tokens=config.new_tokens,
                    repeats=config.repeats,
                    dtype=config.dtype,
                    device=config.torch_device,
                )
                peer = [slots * config.new_tokens / secs for secs in response["decode_secs"]]
                rows.append(Row(f"{title} / transformers", rates, peer, "tokens/s"))
                print(rows[-1], flush=True)
    return rows


def bytes_per_step(model: factory.Model, slots: int, config: BandwidthBenchConfig) -> float:
    """Bytes that a step over `slots` rows must read, averaged over the steps of a repeat."""
    c = model.config
    leaves = jax.tree.leaves(model.params)
    size = leaves[0].dtype.itemsize
    weights = sum(leaf.size for leaf in leaves)
    if not c.tie_embeddings:
        weights -= c.vocab_size * c.embed_dim  # A step reads one row per slot.
    weights *= 1 if config.int8_weights else size
    context = config.prompt_tokens + config.new_tokens / 2
    return weights + slots * context * 2 * c.num_layers * c.num_kv_heads * c.head_dim * size


def make_generator(model: factory.Model, rows: int, max_tokens: int, **options) -> Generator:
    """Returns a loaded generator without stop strings or end tokens, with room for `rows` rows."""
    generator = Generator(
        model.config,
        stop_table=build_stop_table([b""] * model.config.vocab_size, ()),
        end_ids=[],
        slots=rows,
        max_tokens=max_tokens,
        mesh=make_mesh(),
        window_tokens=64,
        **options,
    )
    generator.load(model.params)
    return generator


class Decoder:
    """Compiled greedy decoding of `new_tokens` tokens after each prompt.

    Attributes:
      first: tokens of row 0.
    """

    def __init__(
        self, model: factory.Model, prompts: Sequence[Sequence[int]], new_tokens: int, **options
    ):
        self._prompts, self._new_tokens = prompts, new_tokens
        self._generator = make_generator(
            model,
            len(prompts),
            len(prompts[0]) + new_tokens,
            prefill_rows=min(len(prompts), 8),
            prefill_buckets=(len(prompts[0]),),
            chunk_tokens=new_tokens,
            **options,
        )
        self._rate()

    def rates(self, repeats: int) -> list[float]:
        """Tokens per second of each repeat, over all rows."""
        return [self._rate() for _ in range(repeats)]

    def _rate(self) -> float:
        rows = range(len(self._prompts))
        self._generator.start(rows, self._prompts)
        self._generator.drain()
        began = time.monotonic()
        out = self._generator.decode(
            rows,
            key=jax.random.key(0),
            streams=[(row, 0) for row in rows],
            max_new_tokens=self._new_tokens,
            sampling=GREEDY,
        )
        self.first = out[0].tokens
        return len(rows) * self._new_tokens / (time.monotonic() - began)


def prefill_rates(model: factory.Model, prompts: Sequence[Sequence[int]], repeats: int):
    """Prompt tokens per second of each repeat."""
    size = len(prompts[0])
    generator = make_generator(
        model, len(prompts), size + 64, prefill_rows=len(prompts), prefill_buckets=(size,)
    )
    rates = []
    for repeat in range(repeats + 1):
        # Prefill leaves out the last token, so there is one more. The first token differs each
        # time, so that no repeat shares an earlier prefill.
        prompt = [[repeat + 1, *row[1:], 0] for row in prompts]
        began = time.monotonic()
        generator.start(range(len(prompts)), prompt)
        generator.drain()
        rates.append(len(prompts) * size / (time.monotonic() - began))
    return rates[1:]


def precision_effect(model: factory.Model, options: dict, samples: int = 256) -> str:
    """Describes how lower precision changes the log-prob of a token sampled after real text.

    Args:
      options: the generator's options for the lower precision.
      samples: most passages of the embedded world that are used.
    """
    batch, tokens = 32, 48
    passages = [encode(model.tokenizer, p.text) for p in corpus(load_entities())]
    prompts = [ids[:tokens] for ids in passages if len(ids) >= tokens][:samples]
    settings = dict(prefill_rows=batch, prefill_buckets=(tokens,), chunk_tokens=1)
    exact, coarse = (
        make_generator(model, batch, 2 * tokens, **settings, **more) for more in ({}, options)
    )
    same, differences = 0, []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        drawn = []
        for generator in (exact, coarse):
            generator.start(range(len(part)), part)
            drawn.append(
                generator.decode(
                    range(len(part)),
                    key=jax.random.key(0),
                    streams=[(start + row, 0) for row in range(len(part))],
                    max_new_tokens=1,
                    sampling=Sampling(1.0),
                )
            )
        for one, other in zip(*drawn, strict=True):
            if one.tokens == other.tokens:
                same += 1
                differences.append(abs(one.logprobs[0] - other.logprobs[0]))
    return (
        f"same token in {same} of {len(prompts)} draws; for these |log-prob difference| has "
        f"mean {np.mean(differences):.4f}, maximum {max(differences):.4f} nats"
    )


def flops_per_token(model: factory.Model, config: DecodeBenchConfig) -> float:
    """Floating-point operations of one decoded token: two per weight, plus attention."""
    c = model.config
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    if not c.tie_embeddings:
        weights -= c.vocab_size * c.embed_dim  # The embedding is looked up, not multiplied.
    context = config.prompt_tokens + config.new_tokens / 2
    return 2 * weights + 4 * context * c.num_layers * c.num_heads * c.head_dim


def copy_bandwidth(threads: int, repeats: int = 5) -> list[float]:
    """GB/s of a memory copy in each repeat; read and written bytes both count."""
    size = 1 << 27  # float32 values, 512 MiB: larger than any CPU cache
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    parts = list(zip(np.split(source, threads), np.split(target, threads), strict=True))
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.monotonic()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            rates.append(2 * source.nbytes / (time.monotonic() - began) / 1e9)
    return rates


def gemm_peak(repeats: int = 5) -> list[float]:
    """GFLOP/s of a large square float32 matrix product in each repeat."""
    n = 3072
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    rates = []
    for _ in range(repeats):
        began = time.monotonic()
        product(a, a).block_until_ready()
        rates.append(2 * n**3 / (time.monotonic() - began) / 1e9)
    return rates
