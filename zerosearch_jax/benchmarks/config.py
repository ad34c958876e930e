"""Configs of the benchmark suites, as frozen dataclasses. Model sizes have Hugging Face's names."""

from dataclasses import dataclass
from typing import Annotated, Any

from zerosearch_jax.data.embedded.scripted_agent import Behaviours
from zerosearch_jax.ranges import (
    Choice,
    Count,
    CountOrZero,
    Documents,
    NonNegativeFloat,
    Rows,
    Threads,
    Tokens,
)
from zerosearch_jax.rl.config import Dtype, OptimizerConfig
from zerosearch_jax.training.config import REMAT
from zerosearch_jax.training.sections import LimitsConfig

# The next three repeat names of the suites, which import jax; a test compares them.
MIXES = ("embedded", "long", "service")
VARIANTS = (
    "lockstep",
    "without keep_cache",
    "without share_prompts",
    "without refill",
    "without return_early",
    "without compact",
    "without overlap",
)
PARTS = ("update", "step", "packing", "memory")


@dataclass(frozen=True)
class RolloutGeneratorConfig:
    """A model and the generator that runs it."""

    model: str
    """Hugging Face directory."""
    slots: Rows
    """Sequences in the KV cache at once."""
    lockstep_slots: Rows
    """Sequences at once in the lockstep variant, which does not refill slots."""
    max_tokens: Tokens
    """Tokens per slot."""
    prefill_rows: Rows
    """Rows of one prefill."""
    prefill_buckets: tuple[Tokens, ...]
    """Lengths to which prefills are padded."""
    decode_rows: tuple[Rows, ...]
    """Smaller numbers of rows that decoding also compiles."""
    chunk_tokens: Tokens
    """Decode steps per dispatch."""
    window_tokens: Tokens
    """Decoding attends to the cache up to the longest context, rounded up to a multiple of this."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of the simulator. The policy's is 1."""
    max_new_tokens: Tokens | None = None
    """Tokens that the simulator writes per search."""


@dataclass(frozen=True)
class LongMixConfig:
    """Mix of episodes with long prompts and documents."""

    questions: Count
    """Questions."""
    prompt_words: tuple[CountOrZero, CountOrZero]
    """Least and most words added to a question."""
    document_words: tuple[CountOrZero, CountOrZero]
    """Least and most words of the documents of a search."""
    max_tokens: Tokens
    """Tokens per slot."""
    limits: LimitsConfig


@dataclass(frozen=True)
class ServiceMixConfig:
    """Mix of episodes whose searches go to a slow service."""

    seconds: tuple[NonNegativeFloat, NonNegativeFloat]
    """Least and most seconds of a request."""
    concurrent: Threads
    """Batches of searches in flight while the policy decodes."""


@dataclass(frozen=True)
class RolloutBenchConfig:
    """Rollouts against the lockstep loop of other libraries (suite rollout)."""

    job: str
    """Name of the job."""
    suite: str
    """Name of the suite."""
    repeats: Count
    """Timed repeats."""
    mixes: tuple[Annotated[str, Choice(*MIXES)], ...]
    """Mixes of episodes: `embedded`, `long`, `service`."""
    variants: tuple[Annotated[str, Choice(*VARIANTS)], ...]
    """Variants to compare with: `lockstep`, or `without FEATURE`."""
    questions: Count
    """Questions of the embedded and the service mix."""
    group_size: Rows
    """Episodes per question."""
    policy: RolloutGeneratorConfig
    simulator: RolloutGeneratorConfig
    limits: LimitsConfig
    long: LongMixConfig
    service: ServiceMixConfig


@dataclass(frozen=True)
class DecodePeersConfig:
    """Python interpreters of the peers' environments. "" leaves a peer out."""

    tunix_python: str
    """Interpreter with Tunix."""
    llamacpp_python: str
    """Interpreter with llama-cpp-python."""


@dataclass(frozen=True)
class DecodeBenchConfig:
    """Decode and prefill against other libraries (suite decode)."""

    job: str
    """Name of the job."""
    suite: str
    """Name of the suite."""
    repeats: Count
    """Timed repeats."""
    model: str
    """Hugging Face directory."""
    slots: tuple[Rows, ...]
    """Batch sizes."""
    prompt_tokens: Tokens
    """Tokens of each prompt."""
    new_tokens: Tokens
    """Decoded tokens per row."""
    prefill_tokens: Tokens
    """Prompt tokens of the prefill measurement."""
    threads: Threads
    """CPU threads of the peers."""
    peers: DecodePeersConfig


@dataclass(frozen=True)
class BandwidthBenchConfig:
    """Decode as a share of an accelerator's memory bandwidth (suite bandwidth)."""

    job: str
    """Name of the job."""
    suite: str
    """Name of the suite."""
    repeats: Count
    """Timed repeats."""
    peak_gb_per_s: NonNegativeFloat
    """Memory bandwidth of the device."""
    slots: tuple[Rows, ...]
    """Batch sizes."""
    prompt_tokens: Tokens
    """Tokens of each prompt."""
    new_tokens: Tokens
    """Decoded tokens per row."""
    dtype: Dtype
    """Dtype of weights and cache."""
    int8_weights: bool
    """Store the weight matrices as int8. Transformers keeps `dtype`."""
    torch_device: str
    """Device of transformers. "" leaves that peer out."""
    models: dict[str, dict[str, Any]]
    """Sizes of models with random weights."""


@dataclass(frozen=True)
class LearnerSectionConfig:
    """Arithmetic of the learner."""

    remat: Annotated[str, Choice(*REMAT)]
    """`none` keeps activations for the backward pass; `full` recomputes every layer."""
    logprob_chunk: Tokens
    """Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class BatchConfig:
    """Batch of random sequences."""

    rows: Rows
    """Rows."""
    tokens: Tokens
    """Tokens per row."""
    prompt_tokens: Tokens
    """Tokens at the start of a row that are not trained on."""
    dtypes: tuple[Dtype, ...] | None = None
    """Compute dtypes."""
    micro_rows: tuple[Rows, ...] | None = None
    """Rows per microbatch to try. Each side is measured with its fastest."""


@dataclass(frozen=True)
class StepConfig:
    """Whole GRPO steps."""

    questions: Count
    """Questions per step."""
    group_size: Rows
    """Episodes per question."""
    prompt_tokens: Tokens
    """Tokens of each prompt."""
    new_tokens: Tokens
    """Sampled tokens per episode."""
    micro_rows: dict[str, Rows]
    """Rows per microbatch of each library."""


@dataclass(frozen=True)
class PackingConfig:
    """Packed episodes against one episode per row."""

    model: str
    """Hugging Face directory."""
    episodes: Count
    """Episodes."""
    row_tokens: Tokens
    """Tokens per row."""
    rows: Rows
    """Rows per microbatch."""
    topk: Documents
    """Documents per search."""
    behaviours: Behaviours


@dataclass(frozen=True)
class MemoryConfig:
    """Memory of the gradient: whole logits against chunks of them."""

    tokens: Tokens
    """Tokens of the sequence."""
    logprob_chunk: Tokens
    """Tokens whose logits are in memory at once."""
    model: dict[str, Any]
    """Sizes of the model."""


@dataclass(frozen=True)
class LearnerPeersConfig:
    """Python interpreters of the peers' environments. "" leaves a peer out."""

    trl_python: str
    """Interpreter with TRL."""
    tunix_python: str
    """Interpreter with Tunix."""


@dataclass(frozen=True)
class LearnerBenchConfig:
    """Learner against other libraries (suite learner)."""

    job: str
    """Name of the job."""
    suite: str
    """Name of the suite."""
    parts: tuple[Annotated[str, Choice(*PARTS)], ...]
    """Measurements: `update`, `step`, `packing`, `memory`."""
    repeats: Count
    """Timed repeats."""
    threads: Threads
    """CPU threads of the peers."""
    model: str
    """Hugging Face directory."""
    optimizer: OptimizerConfig
    learner: LearnerSectionConfig
    batch: BatchConfig
    step: StepConfig
    packing: PackingConfig
    memory: MemoryConfig
    peers: LearnerPeersConfig


@dataclass(frozen=True)
class MFUBenchConfig:
    """Updates as a share of an accelerator's peak (suite mfu)."""

    job: str
    """Name of the job."""
    suite: str
    """Name of the suite."""
    repeats: Count
    """Timed repeats."""
    peak_tflops: NonNegativeFloat
    """Dense bfloat16 peak of the device."""
    optimizer: OptimizerConfig
    learner: LearnerSectionConfig
    batch: BatchConfig
    models: dict[str, dict[str, Any]]
    """Sizes of models with random weights."""
