"""Config sections that several jobs share: mesh, models, search engines and limits of an episode.

Every key is one typed field with its documentation below it. `main --describe` prints both.
"""

from dataclasses import dataclass
from typing import Annotated

from zerosearch_jax.errors import UserError
from zerosearch_jax.ranges import (
    Attempts,
    Backoff,
    Choice,
    CountOrZero,
    Devices,
    DevicesOrZero,
    Documents,
    NonNegativeFloat,
    Range,
    Rows,
    Share,
    Threads,
    Timeout,
    Tokens,
)
from zerosearch_jax.rl.config import Dtype
from zerosearch_jax.search.retriever import DIALECTS
from zerosearch_jax.search.server import check_address, check_key_variable
from zerosearch_jax.search.web import SERVERS
from zerosearch_jax.text.prompts import SIMULATOR_FORMS

OverlongQuestions = Annotated[str, Choice("error", "drop")]
ENGINES = {
    "bm25": ("corpus",),
    "noisy_bm25": ("corpus", "noise"),
    "simulated": ("simulator", "remote"),
    "retriever": ("remote",),
    "web": ("web", "remote"),
    "recorded_web": ("web",),
    "none": (),
}
"""Search engine: the keys of section `search` that it needs, in addition to `topk`."""


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh over all processes. The product of the sizes is the number of devices used."""

    data: Devices
    """Parts that share a batch and each hold a copy of the parameters."""
    fsdp: Devices
    """Parts over which parameters and batch rows are sharded."""
    tensor: Devices
    """Parts over which attention heads, MLP features and the vocabulary are sharded."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Sampling engine: slots of the KV cache and shapes of its compiled programs.

    A replica is one data × fsdp part of the generator's mesh and holds slots / replicas slots.
    """

    slots: Rows
    """Sequences in the KV cache of one process at once. A multiple of its replicas."""
    max_tokens: Tokens
    """Tokens per slot: prompt, inserted and sampled tokens together. At most the model's number of
    positions."""
    prefill_rows: Rows
    """Rows of one prefill per replica. At most the replica's slots are used."""
    prefill_buckets: tuple[Tokens, ...]
    """Lengths in tokens to which prefills are padded. Longer inputs are cut into several prefills.
    Each length is one compiled program."""
    decode_rows: tuple[Rows, ...]
    """Rows per replica that decode programs are compiled for. The smallest program that holds all
    decoding slots runs. If more slots decode than the largest program holds, they alternate. ()
    compiles one program for all slots."""
    chunk_tokens: Tokens
    """Most tokens that a slot samples per dispatched decode program."""
    window_tokens: Tokens
    """Decoding attends to as many cached tokens as the longest decoding context has, rounded up to
    a multiple of this and capped at max_tokens. Each multiple is one compiled program."""
    dtype: Dtype
    """Dtype of the weights and the KV cache: `float32` or `bfloat16`."""
    int8_weights: bool
    """Store the weight matrices as int8, with one scale per output channel. Activations and the
    cache keep `dtype`."""

    def __post_init__(self):
        if not self.prefill_buckets:
            raise UserError("prefill_buckets is empty; give at least one length")


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: a model directory and its generator."""

    model: str
    """Hugging Face directory of the policy before training."""
    generator: GeneratorConfig


@dataclass(frozen=True)
class WebConfig:
    """Web search service."""

    provider: Annotated[str, Choice(*SERVERS)]
    """`serper` or `serpapi`. The environment variable SERPER_API_KEY or SERPAPI_API_KEY holds its
    API key."""
    recording: str
    """Responses that `recorded_web` searches: a .jsonl file, or `world` (made from the embedded
    world)."""
    blocked_domains: tuple[str, ...]
    """Results from these domains and their subdomains are dropped."""


@dataclass(frozen=True)
class RemoteConfig:
    """HTTP client of a retriever, a web search service or a simulator on a server."""

    url: str
    """Address of the retriever, such as http://HOST:PORT; it may end in /retrieve. Other servers
    have their own address."""
    key_variable: str
    """Environment variable with the API key of the retriever or of the simulator's server. "" sends
    none. A web search service has its own variable."""
    dialect: Annotated[str, Choice(*DIALECTS)]
    """Protocol of the retriever: `search_r1` or `zerosearch`."""
    timeout_secs: Timeout
    """Deadline of one attempt in seconds."""
    attempts: Attempts
    """Attempts per request, the first included."""
    backoff_secs: Backoff
    """Seconds before the second attempt. Each further wait is twice as long, up to 60 seconds. A
    longer Retry-After is respected if it fits into the budget of the request: the deadlines of all
    attempts and these waits together."""
    workers: Threads
    """Most requests in flight per batch of searches. The dialect `search_r1` sends one request per
    batch."""

    def __post_init__(self):
        check_key_variable(self.key_variable)
        if self.url:
            check_address("url", self.url)


@dataclass(frozen=True)
class GateConfig:
    """Bounds that a simulator must meet in its report before a policy trains on it.

    Only searches that the real engine answered usefully count.
    """

    report: str
    """`report.json` of the simulator_report job. "" disables the gate."""
    useful_min: Share
    """Lowest accepted exact match of the reader on useful documents."""
    noisy_max: Share
    """Highest accepted exact match of the reader on noisy documents."""


@dataclass(frozen=True)
class SimulatorConfig:
    """Language model that writes the documents of the simulated engine."""

    model: str
    """Hugging Face directory, or the name of the model on the server."""
    url: str
    """Server with an OpenAI chat completions API that runs the simulator; the address may end in
    /v1. "" runs the simulator in this process."""
    gate: GateConfig
    devices: DevicesOrZero
    """Devices of each process that only the simulator uses, a multiple of mesh.tensor. Above 0 it
    requires rollout.concurrent_searches. 0 shares the policy's devices."""
    tensor: DevicesOrZero
    """Devices over which one replica of the simulator is sharded. Divides the simulator's devices
    of a process. 0 takes mesh.tensor."""
    form: Annotated[str, Choice(*SIMULATOR_FORMS)]
    """Prompt: `finetuned` for a simulator from the sft job, `prompted` for other models."""
    temperature: NonNegativeFloat
    """Sampling temperature. 0 is greedy."""
    top_k: CountOrZero
    """Sample from the k most likely tokens. 0 samples from all. Not sent to a server."""
    top_p: Annotated[float, Range(0, 1, open_low=True)]
    """Sample from the most likely tokens whose probabilities add up to this. 1 samples from all."""
    max_new_tokens: Tokens
    """Most tokens written per search. A long query may leave room for fewer. A search whose prompt
    leaves no room fails alone, see rollout.stop_on_failure."""
    generator: GeneratorConfig

    def __post_init__(self):
        if self.url:
            check_address("url", self.url)
        if not self.url and self.max_new_tokens >= self.generator.max_tokens:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"generator.max_tokens={self.generator.max_tokens}; lower the first or raise the "
                "second"
            )


@dataclass(frozen=True)
class SearchConfig:
    """Search engine. Keys that the engine does not read may be absent."""

    engine: Annotated[str, Choice(*ENGINES)]
    """`simulated`, `bm25`, `noisy_bm25`, `retriever`, `web`, `recorded_web`, or `none`. `none`
    requires rollout.max_turns=0."""
    topk: Documents
    """Most documents per search."""
    corpus: str | None = None
    """Passages of `bm25` and `noisy_bm25`: `world`, synthetic:COUNT:SEED or a .jsonl file."""
    noise: Share | None = None
    """Probability that `noisy_bm25` answers a search only with passages that contain no gold
    answer."""
    web: WebConfig | None = None
    remote: RemoteConfig | None = None
    simulator: SimulatorConfig | None = None

    def __post_init__(self):
        lacking = [key for key in ENGINES[self.engine] if getattr(self, key) is None]
        if lacking:
            possible = [
                name
                for name, keys in ENGINES.items()
                if all(getattr(self, key) is not None for key in keys)
            ]
            raise UserError(
                f"engine={self.engine} needs {' and '.join(lacking)}, which this section of the "
                f"config file lacks; add it there or choose one of {', '.join(possible)}"
            )


@dataclass(frozen=True)
class LimitsConfig:
    """Limits of an episode."""

    max_turns: CountOrZero
    """Most search or invalid turns before the final turn. A search in the final turn is not run. 0
    leaves only the final turn."""
    response_tokens: Tokens
    """Most tokens sampled per turn."""
    observation_tokens: Tokens
    """Most tokens inserted per search, tags included. Longer documents are cut."""
