"""Learner speed against other libraries, padded batches and the machine's limits.

An *update* is the part of a GRPO step after the rewards: the reference's log-probs, the policy's
forward and backward pass (log-probs and entropy over the whole vocabulary, clipped surrogate,
entropy bonus, k3 KL), gradient clipping and AdamW. A *step* also samples the completions.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zerosearch_jax.benchmarks import decode, run_peers
from zerosearch_jax.benchmarks.config import (
    BatchConfig,
    LearnerBenchConfig,
    MFUBenchConfig,
    PackingConfig,
)
from zerosearch_jax.benchmarks.rows import Row
from zerosearch_jax.data import sft_data
from zerosearch_jax.data.embedded.world import corpus, load_entities
from zerosearch_jax.data.packing import TokenSequence, pack
from zerosearch_jax.errors import UserError
from zerosearch_jax.generate.sampling import Sampling
from zerosearch_jax.models.config import ModelConfig, from_hf
from zerosearch_jax.models.transformer import abstract_model, init_params
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl.advantages import group_advantages
from zerosearch_jax.rl.batch import LearnerBatch
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.rl.losses import aggregation_weights
from zerosearch_jax.rl.objective import Objective, policy_terms
from zerosearch_jax.text.tokenizer import encode
from zerosearch_jax.training import factory
from zerosearch_jax.training.config import LearnerConfig

OBJECTIVE, KL = Objective(), 0.001

# An update costs five forward passes: one of the reference, one of the policy, one more of the
# policy (layers and logits are checkpointed) and two for the backward pass. Model FLOPs do not
# count the recomputation.
DONE_PASSES, MODEL_PASSES = 5, 4


def run(config: LearnerBenchConfig) -> list[Row]:
    """Runs the parts `config.parts` and prints each row as soon as it is measured."""
    rows = []
    for name in config.parts:
        for row in PARTS[name](config):
            print(row, flush=True)
            rows.append(row)
    return rows


class Updater:
    """A learner with its state and a frozen reference in the compute dtype."""

    def __init__(
        self, model: factory.Model, config: LearnerBenchConfig | MFUBenchConfig, dtype: str
    ):
        settings = LearnerConfig(
            row_tokens=0,  # The caller packs.
            rows=0,
            compute_dtype=dtype,
            remat=config.learner.remat,
            logprob_chunk=config.learner.logprob_chunk,
        )
        self.learner = factory.make_learner(
            model.config, make_mesh(), config.optimizer, settings, steps=1
        )
        self.state = self.learner.init(model.params)
        self.reference = jax.tree.map(lambda x: x.astype(factory.dtype_of(dtype)), model.params)

    def update(self, batch: LearnerBatch) -> tuple[float, float]:
        """Runs one update on a device batch; returns its seconds and loss."""
        began = time.monotonic()
        scores = self.learner.logprobs(self.reference, batch)
        self.state, metrics = self.learner.rl_step(
            self.state, replace(batch, ref_logprobs=scores), objective=OBJECTIVE, kl_coef=KL
        )
        jax.block_until_ready(self.state)
        return time.monotonic() - began, float(metrics["loss/total"])

    def put(
        self, sequences: Sequence[TokenSequence], row_tokens: int, rows: int, room: int
    ) -> LearnerBatch:
        """Packs sequences into micro-batches of `rows` rows that hold `room` rows in total.

        Returns:
          The batch on the device. Its shape does not depend on the sequences.
        """
        return self.learner.put(
            pack(sequences, row_tokens=row_tokens, rows=rows, microbatches=-(-room // rows))
        )

    def on_policy(self, sequences: Sequence[TokenSequence], row_tokens: int):
        """Adds the columns that the sequences would have if the reference had sampled them.

        The rewards are random.
        """
        batch = pack(sequences, row_tokens=row_tokens, rows=1, microbatches=None)
        scores = self.learner.logprobs(self.reference, self.learner.put(batch))
        scored = [
            with_columns(sequence, old_logprobs=row[: len(sequence.tokens)])
            for sequence, row in zip(sequences, batch.unpack(np.asarray(scores)), strict=True)
        ]
        rewards = np.random.default_rng(1).random((1, len(sequences)), np.float32)
        return rewarded(scored, rewards)


def rewarded(sequences: Sequence[TokenSequence], rewards: np.ndarray) -> list[TokenSequence]:
    """Adds GRPO's advantages of `rewards` `[Q, G]` and the weights of a mean over tokens."""
    advantages = np.asarray(group_advantages(jnp.asarray(rewards))).ravel()
    lengths = jnp.array([sum(s.mask[1:]) for s in sequences], jnp.float32)
    weights = np.asarray(aggregation_weights(lengths, aggregate="token_mean"))
    return [
        with_columns(s, advantages=np.full(len(s.tokens), a), weights=np.full(len(s.tokens), w))
        for s, a, w in zip(sequences, advantages, weights, strict=True)
    ]


def with_columns(sequence: TokenSequence, **columns: np.ndarray) -> TokenSequence:
    return replace(sequence, columns={**sequence.columns, **columns})


def sequence_of(tokens: Sequence[int], mask: Sequence[float], **columns) -> TokenSequence:
    """Returns a sequence whose column "correct" is 0."""
    return TokenSequence(tokens, mask, {"correct": np.zeros(len(tokens)), **columns})


def random_sequences(sizes: BatchConfig, vocab_size: int) -> list[TokenSequence]:
    """Returns `sizes.rows` sequences of `sizes.tokens` random ids.

    The mask excludes the first `sizes.prompt_tokens` tokens.
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, (sizes.rows, sizes.tokens))
    mask = [float(at >= sizes.prompt_tokens) for at in range(sizes.tokens)]
    return [sequence_of(row, mask) for row in ids.tolist()]


def peer_settings(config: LearnerBenchConfig) -> dict[str, float]:
    """Optimizer and loss settings for every peer."""
    names = ("learning_rate", "beta1", "beta2", "weight_decay", "clip_norm")
    loss = dict(clip=OBJECTIVE.loss.clip_low, kl=KL, entropy=OBJECTIVE.loss.entropy)
    return {name: getattr(config.optimizer, name) for name in names} | loss


def updates(config: LearnerBenchConfig) -> Iterator[Row]:
    """Updates of one model against transformers on torch and against the GEMM peak."""
    sizes = config.batch
    model = factory.load_model(config.model, make_mesh(), "float32")
    tokens = sizes.rows * sizes.tokens
    for dtype in sizes.dtypes:
        secs, peer_secs = update_secs(model, config, dtype)
        rates = [tokens / s for s in secs]
        peer_rates = [tokens / s for s in peer_secs]
        yield Row(f"update {dtype} / transformers", rates, peer_rates, "tokens/s")
        if dtype == "float32":
            flops = DONE_PASSES * forward_flops(model.config, (sizes.tokens + 1) / 2)
            done = [rate * flops / 1e9 for rate in rates]
            peak = decode.gemm_peak(config.repeats)
            yield Row(f"update {dtype} / GEMM peak", done, peak, "GFLOP/s")


def update_secs(
    model: factory.Model, config: LearnerBenchConfig | MFUBenchConfig, dtype: str
) -> tuple[list[float], list[float]]:
    """Seconds of our updates and of torch's, which alternate.

    Each side uses the fastest of `config.batch.micro_rows`.
    """
    sizes = config.batch
    updater = Updater(model, config, dtype)
    sequences = updater.on_policy(random_sequences(sizes, model.config.vocab_size), sizes.tokens)
    peer = run_peers.TorchUpdater(
        config.model, dtype=dtype, threads=config.threads, **peer_settings(config)
    )

    def ours(count, micro_rows):
        return updater.update(updater.put(sequences[:count], sizes.tokens, micro_rows, sizes.rows))

    def theirs(count, micro_rows):
        batch = pack(sequences[:count], row_tokens=sizes.tokens, rows=count, microbatches=1)
        arrays = {name: array[0] for name, array in batch.arrays().items() if array.ndim}
        return peer.update(arrays, micro_rows)

    tried = max(sizes.micro_rows)
    chosen = [fastest(partial(update, tried), sizes.micro_rows) for update in (ours, theirs)]
    print(f"update {dtype}: rows of a micro-batch: ours {chosen[0]}, transformers {chosen[1]}")
    secs, peer_secs = [], []
    for _ in range(config.repeats):
        (mine, loss), (other, peer_loss) = (
            update(sizes.rows, micro_rows)
            for update, micro_rows in zip((ours, theirs), chosen, strict=True)
        )
        secs.append(mine)
        peer_secs.append(other)
    print(f"update {dtype}: loss: ours {loss:.6f}, transformers {peer_loss:.6f}")
    return secs, peer_secs


def fastest(update: Callable[[int], tuple[float, float]], choices: Sequence[int]) -> int:
    """Returns the choice with the fastest second update, since the first may compile."""
    for choice in choices:
        update(choice)
    return min(choices, key=lambda choice: update(choice)[0])


def steps(config: LearnerBenchConfig) -> Iterator[Row]:
    """Whole GRPO steps against the trainers of TRL and Tunix; no completion ends early."""
    sizes = config.step
    model = factory.load_model(config.model, make_mesh(), "float32")
    prompts = stretches(model.tokenizer, sizes.questions, sizes.prompt_tokens)
    ours = step_secs(model, prompts, config)
    print(f"GRPO step: {', '.join(f'{s:.1f}' for s in ours)} s", flush=True)
    for name, python, script in (
        ("TRL", config.peers.trl_python, "trl_step.py"),
        ("Tunix", config.peers.tunix_python, "tunix_step.py"),
    ):
        if not python:
            print(f"{name}: not run (config.peers has no interpreter for it)")
            continue
        request = dict(
            model=str(Path(config.model).absolute()),
            prompts=prompts,
            group_size=sizes.group_size,
            new_tokens=sizes.new_tokens,
            micro_rows=sizes.micro_rows[name],
            repeats=config.repeats,
            threads=config.threads,
            **peer_settings(config),
        )
        response = run_peers.subprocess_peer(python, decode.PEERS / script, request)
        print(f"{name} {response['version']}", flush=True)
        rates, peer_rates = ([3600 / s for s in secs] for secs in (ours, response["step_secs"]))
        yield Row(f"GRPO step / {name}", rates, peer_rates, "steps/h")


def step_secs(
    model: factory.Model, prompts: Sequence[Sequence[int]], config: LearnerBenchConfig
) -> list[float]:
    """Seconds of each of our steps except the first, which compiles."""
    sizes = config.step
    repeated = [prompt for prompt in prompts for _ in range(sizes.group_size)]
    slots, row_tokens = range(len(repeated)), sizes.prompt_tokens + sizes.new_tokens
    generator = decode.make_generator(
        model,
        len(slots),
        row_tokens,
        prefill_rows=len(prompts),
        prefill_buckets=(sizes.prompt_tokens,),
        chunk_tokens=sizes.new_tokens,
    )
    updater = Updater(model, config, "float32")
    mask = [0.0] * sizes.prompt_tokens + [1.0] * sizes.new_tokens
    secs = []
    for step in range(1 + config.repeats):
        began = time.monotonic()
        generator.load(updater.learner.policy(updater.state))
        generator.start(slots, repeated)
        completions = generator.decode(
            slots,
            key=jax.random.key(step),
            streams=[(slot, 0) for slot in slots],
            max_new_tokens=sizes.new_tokens,
            sampling=Sampling(1.0),
        )
        rewards = np.array([len(set(c.tokens)) for c in completions], np.float32)
        sequences = [
            sequence_of([*prompt, *c.tokens], mask, old_logprobs=[0.0] * len(prompt) + c.logprobs)
            for prompt, c in zip(repeated, completions, strict=True)
        ]
        ready = rewarded(sequences, rewards.reshape(-1, sizes.group_size))
        updater.update(updater.put(ready, row_tokens, sizes.micro_rows["ours"], len(slots)))
        secs.append(time.monotonic() - began)
    return secs[1:]


def stretches(tokenizer, count: int, tokens: int) -> list[list[int]]:
    """Returns `count` stretches of `tokens` ids of real text.

    Decoding and encoding a stretch gives the same ids.
    """
    passages = corpus(load_entities())[: count * tokens]  # Each passage has at least one token.
    ids = encode(tokenizer, " ".join(passage.text for passage in passages))
    cut = [ids[start : start + tokens] for start in range(0, len(ids) - tokens, tokens)]
    whole = (part for part in cut if encode(tokenizer, tokenizer.decode(part)) == part)
    return [part for part, _ in zip(whole, range(count), strict=False)]


def packing(config: LearnerBenchConfig) -> Iterator[Row]:
    """Updates on packed episodes against one episode per row, with one compiled program."""
    sizes = config.packing
    model = factory.load_model(sizes.model, make_mesh(), "float32")
    updater = Updater(model, config, "float32")
    sequences = updater.on_policy(episodes(model.tokenizer, sizes), sizes.row_tokens)
    print(f"{len(sequences)} episodes of {np.mean([len(s.tokens) for s in sequences]):.0f} tokens")
    alone = [padded(sequence, sizes.row_tokens) for sequence in sequences]
    batches = [
        updater.put(each, sizes.row_tokens, sizes.rows, len(sequences))
        for each in (sequences, alone)
    ]
    updater.update(batches[0])  # This call compiles.
    secs = [[updater.update(batch)[0] for batch in batches] for _ in range(config.repeats)]
    rates = [[len(sequences) / s for s in column] for column in zip(*secs, strict=True)]
    yield Row("update packed / one episode per row", *rates, "episodes/s")


def episodes(tokenizer, sizes: PackingConfig) -> list[TokenSequence]:
    """Returns tokenised episodes of the embedded world's scripted agent that fit a row."""
    transcripts = sft_data.policy_transcripts(
        worlds=1,  # The first world is the real one, whose number of entities is fixed.
        entities_per_world=0,
        questions_per_world=2 * sizes.episodes,
        behaviours=sizes.behaviours,
        topk=sizes.topk,
        seed=0,
    )
    options = dict(system=None, inserted_weight=0.0, end_of_text=False)
    tokenised = (sft_data.tokenise(each, tokenizer, **options) for each in transcripts)
    fitting = [s for s in tokenised if len(s.tokens) <= sizes.row_tokens]
    return [sequence_of(s.tokens, s.mask) for s in fitting[: sizes.episodes]]


def padded(sequence: TokenSequence, length: int) -> TokenSequence:
    """Pads a sequence to a whole row; the mask excludes the padding."""
    more = length - len(sequence.tokens)
    return TokenSequence(
        [*sequence.tokens, *[0] * more],
        [*sequence.mask, *[0.0] * more],
        {name: [*column, *[0.0] * more] for name, column in sequence.columns.items()},
    )


def memory(config: LearnerBenchConfig) -> Iterator[Row]:
    """Temporary bytes of a gradient with whole logits, against chunked logits."""
    sizes = config.memory
    model_config = from_hf(dict(sizes.model))
    chunked = partial(chunked_logprobs, chunk=sizes.logprob_chunk)
    whole, ours = (
        gradient_bytes(model_config, sizes.tokens, each) for each in (whole_logprobs, chunked)
    )
    name = f"memory, {model_config.vocab_size} whole logits / chunks"
    yield Row(name, [whole], [ours], "bytes")


def gradient_bytes(config: ModelConfig, tokens: int, logprobs_of: Callable) -> int:
    """Temporary bytes of the gradient program on one row of `tokens` tokens.

    Args:
      logprobs_of: (hidden `[1, T, D]`, unembedding, targets) -> log-probs and entropy `[1, T]`.
    """
    graphdef, params = abstract_model(config, remat="full")

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        hidden = model(batch.tokens, batch.positions, batch.segment_ids)
        logprobs, entropy = logprobs_of(hidden, model.unembedding(), batch.targets)
        return policy_terms(OBJECTIVE, KL, logprobs, entropy, batch)[0]

    names = ("old_logprobs", "ref_logprobs", "advantages", "weights")
    zeros = dict.fromkeys(names, np.zeros(tokens))
    sequence = sequence_of([0] * tokens, [1.0] * tokens, **zeros)
    batch = pack([sequence], row_tokens=tokens, rows=1, microbatches=1)
    microbatch = LearnerBatch(**batch.arrays()).microbatch(0)
    compiled = jax.jit(jax.grad(loss)).lower(params, microbatch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def whole_logprobs(
    hidden: jax.Array, unembed: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the result of `chunked_logprobs` from whole logits `[B, T, V]`."""
    logits = jnp.dot(hidden, unembed, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return logprobs, -(jnp.exp(log_p) * log_p).sum(axis=-1)


def forward_flops(config: ModelConfig, attended: float) -> float:
    """Floating-point operations of one token's forward pass with the logits.

        2·(L·(2·D·N·H + 2·D·K·H + 3·D·F) + D·V) + 4·L·N·H·attended

    The first term is two per weight, the second is attention's two products.

    Args:
      attended: mean number of keys that a token attends to: (T + 1) / 2 in a causal row of T.
    """
    d, heads = config.embed_dim, config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    layer = 2 * d * heads + 2 * d * kv_heads + 3 * d * config.mlp_dim
    products = config.num_layers * layer + d * config.vocab_size
    return 2 * products + 4 * config.num_layers * heads * attended


def mfu(config: MFUBenchConfig) -> list[Row]:
    """Model FLOP/s of updates of random models on an accelerator, against its peak.

    Raises:
      UserError: `config.peak_tflops` is missing.
    """
    if not config.peak_tflops:
        raise UserError(
            "config.peak_tflops is 0; set the device's dense bfloat16 peak, such as "
            "--config.peak_tflops=989 for an H100 SXM"
        )
    rows, sizes = [], config.batch
    for name, shape in config.models.items():
        model_config = from_hf(dict(shape))
        # The state copies the parameters; no other reference keeps the originals in memory.
        updater = Updater(
            factory.Model(model_config, init_params(model_config, 0), None, {}), config, "bfloat16"
        )
        sequences = updater.on_policy(
            random_sequences(sizes, model_config.vocab_size), sizes.tokens
        )
        batch = updater.put(sequences, sizes.tokens, sizes.rows, sizes.rows)
        updater.update(batch)  # This call compiles.
        rates = [
            sizes.rows * sizes.tokens / updater.update(batch)[0] for _ in range(config.repeats)
        ]
        stats = jax.devices()[0].memory_stats()  # None on CPU
        peak = f", peak memory {stats['peak_bytes_in_use'] / 1e9:.1f} GB" if stats else ""
        print(f"{name}: {np.median(rates):.0f} tokens/s{peak}", flush=True)
        flops = MODEL_PASSES * forward_flops(model_config, (sizes.tokens + 1) / 2)
        done = [rate * flops / 1e12 for rate in rates]
        rows.append(Row(f"update {name} / peak (MFU)", done, [config.peak_tflops], "TFLOP/s"))
    return rows


PARTS = {"update": updates, "step": steps, "packing": packing, "memory": memory}
