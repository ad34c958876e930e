"""Sections of a config as frozen dataclasses, and `RLConfig`, the config of the rl job.

Every key is one typed field with its documentation below it. `main --describe` prints both. The
sections of the RL update are in `rl/config.py` and `rl/optimizer.py`. Checks of one section are in
its `__post_init__`, checks between sections in `training/validate.py`.
"""

from dataclasses import dataclass

from zerosearch_jax.errors import UserError, check_choice, check_positive
from zerosearch_jax.rl.config import AdvantageConfig, CriticConfig, KLConfig, LossConfig
from zerosearch_jax.rl.optimizer import OptimizerConfig
from zerosearch_jax.rl.rewards import RULES

DTYPES = ("float32", "bfloat16")
OLD_LOGPROBS = ("sampler", "learner")
OVERLONG = ("keep", "mask")
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

    data: int
    """Parts that share a batch and each hold a copy of the parameters."""
    fsdp: int
    """Parts over which parameters and batch rows are sharded."""
    tensor: int
    """Parts over which attention heads, MLP features and the vocabulary are sharded."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Sampling engine: slots of the KV cache and shapes of its compiled programs.

    A replica is one data × fsdp part of the generator's mesh and holds slots / replicas slots.
    """

    slots: int
    """Sequences in the KV cache of one process at once. A multiple of its replicas."""
    max_tokens: int
    """Tokens per slot: prompt, inserted and sampled tokens together. At most the model's number of
    positions."""
    prefill_rows: int
    """Rows of one prefill per replica, at least 1. At most the replica's slots are used."""
    prefill_buckets: tuple[int, ...]
    """Lengths in tokens to which prefills are padded. Longer inputs are cut into several prefills.
    Each length is one compiled program."""
    decode_rows: tuple[int, ...]
    """Rows per replica that decode programs are compiled for, each at least 1. The smallest program
    that holds all decoding slots runs. If more slots decode than the largest program holds, they
    alternate. () compiles one program for all slots."""
    chunk_tokens: int
    """Most tokens that a slot samples per dispatched decode program, at least 1."""
    window_tokens: int
    """Decoding attends to as many cached tokens as the longest decoding context has, rounded up to
    a multiple of this and capped at max_tokens. Each multiple is one compiled program."""
    dtype: str
    """Dtype of the weights and the KV cache: `float32` or `bfloat16`."""
    int8_weights: bool
    """Store the weight matrices as int8, with one scale per output channel. Activations and the
    cache keep `dtype`."""

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: a model directory and its generator."""

    model: str
    """Hugging Face directory of the policy before training."""
    generator: GeneratorConfig


@dataclass(frozen=True)
class WebConfig:
    """Web search service."""

    provider: str
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
    """Address of the retriever. Other servers have their own address."""
    dialect: str
    """Protocol of the retriever: `search_r1` or `zerosearch`."""
    timeout_secs: float
    """Deadline of one attempt in seconds, above 0."""
    attempts: int
    """Attempts per request, the first included. At least 1."""
    backoff_secs: float
    """Seconds before the second attempt, at least 0. Each further wait is twice as long."""
    workers: int
    """Most requests in flight per batch of searches, at least 1. The dialect `search_r1` sends one
    request per batch."""


@dataclass(frozen=True)
class GateConfig:
    """Bounds that a simulator must meet in its report before a policy trains on it.

    Only searches that the real engine answered usefully count.
    """

    report: str
    """`report.json` of the simulator_report job. "" disables the gate."""
    useful_min: float
    """Lowest accepted exact match of the reader on useful documents, 0 to 1."""
    noisy_max: float
    """Highest accepted exact match of the reader on noisy documents, 0 to 1."""


@dataclass(frozen=True)
class SimulatorConfig:
    """Language model that writes the documents of the simulated engine."""

    model: str
    """Hugging Face directory, or the name of the model on the server."""
    url: str
    """Server with an OpenAI chat completions API that runs the simulator. "" runs the simulator in
    this process."""
    gate: GateConfig
    devices: int
    """Devices of each process that only the simulator uses, a multiple of mesh.tensor. Above 0 it
    requires rollout.concurrent_searches. 0 shares the policy's devices."""
    tensor: int
    """Devices over which one replica of the simulator is sharded. Divides the simulator's devices
    of a process. 0 takes mesh.tensor."""
    form: str
    """Prompt: `finetuned` for a simulator from the sft job, `prompted` for other models."""
    temperature: float
    """Sampling temperature, at least 0. 0 is greedy."""
    top_k: int
    """Sample from the k most likely tokens. 0 samples from all. Not sent to a server."""
    top_p: float
    """Sample from the most likely tokens whose probabilities add up to this, in (0, 1]. 1 samples
    from all."""
    max_new_tokens: int
    """Most tokens written per search."""
    generator: GeneratorConfig


@dataclass(frozen=True)
class SearchConfig:
    """Search engine. Keys that the engine does not read may be absent."""

    engine: str
    """`simulated`, `bm25`, `noisy_bm25`, `retriever`, `web`, `recorded_web`, or `none`. `none`
    requires rollout.max_turns=0."""
    topk: int
    """Most documents per search, at least 1."""
    corpus: str | None = None
    """Passages of `bm25` and `noisy_bm25`: `world`, synthetic:COUNT:SEED or a .jsonl file."""
    noise: float | None = None
    """Probability, 0 to 1, that `noisy_bm25` answers a search only with passages that contain no
    gold answer."""
    web: WebConfig | None = None
    remote: RemoteConfig | None = None
    simulator: SimulatorConfig | None = None

    def __post_init__(self):
        check_choice("engine", self.engine, tuple(ENGINES))
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

    max_turns: int
    """Most search or invalid turns before the final turn, at least 0. A search in the final turn is
    not run. 0 leaves only the final turn."""
    response_tokens: int
    """Most tokens sampled per turn."""
    observation_tokens: int
    """Most tokens inserted per search, tags included. Longer documents are cut."""


@dataclass(frozen=True)
class RolloutConfig:
    """Episodes of one training step."""

    questions_per_step: int
    """Groups that a step trains on, one question each."""
    group_size: int
    """Episodes per question. The paper has 5."""
    max_turns: int
    """Most search or invalid turns before the final turn, at least 0. A search in the final turn is
    not run. 0 leaves only the final turn."""
    response_tokens: int
    """Most tokens sampled per turn."""
    observation_tokens: int
    """Most tokens inserted per search, tags included. Longer documents are cut."""
    temperature: float
    """Sampling temperature of the policy, above 0. Evaluations are greedy."""
    stop_on_failure: bool
    """Stop the run when a training search fails after all attempts. False inserts a failure text
    instead, as evaluations always do."""
    concurrent_searches: int
    """Most batches of searches in flight while the policy decodes. 0 alternates searching and
    decoding, which is deterministic."""
    max_rounds: int
    """Most rounds of `questions_per_step` questions per step, at least 1. Above 1, sampling
    continues until `questions_per_step` groups have rewards that differ (DAPO's dynamic sampling,
    arXiv 2503.14476 §3.2)."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(
                f"rollout.temperature={self.temperature} must be above 0, so that the episodes "
                "of a group differ"
            )
        if self.max_turns < 0:
            raise UserError(
                f"rollout.max_turns={self.max_turns} must be at least 0; 0 leaves one turn"
            )
        if self.max_rounds > 1 and self.group_size == 1:
            raise UserError(
                "rollout.max_rounds > 1 looks for groups whose rewards differ; set "
                "rollout.group_size above 1"
            )


@dataclass(frozen=True)
class CurriculumConfig:
    """Probability that a training search is noisy, by step (arXiv 2505.04588).

    Only `search.engine=simulated` reads it.
    """

    start: float
    """Probability in the first step, 0 to 1."""
    end: float
    """Probability in the last step, 0 to 1."""
    base: float
    """Curvature, above 0. Above 1 the probability changes mostly late, below 1 mostly early; 1 is a
    straight line."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward of an episode."""

    rule: str
    """`answer`: the score plus format_weight if the format is valid. `research`, `deepresearcher`
    and `r1_searcher`: the rule of that paper."""
    name: str
    """Score of rule `answer`: `f1`, `em` or `cover_em`."""
    format_weight: float
    """Reward of a valid format under rule `answer`."""
    stage_one_steps: int
    """First steps, in which `r1_searcher` rewards only searches and format. 0 to rl.steps."""

    def __post_init__(self):
        check_choice("reward.rule", self.rule, tuple(RULES))
        if self.rule != "answer" and (self.name != "f1" or self.format_weight != 0):
            raise UserError(
                "reward.name and reward.format_weight require reward.rule=answer, not "
                f"{self.rule}; set them to f1 and 0"
            )
        if self.rule != "r1_searcher" and self.stage_one_steps != 0:
            raise UserError(
                f"reward.stage_one_steps={self.stage_one_steps} requires "
                f"reward.rule=r1_searcher, not {self.rule}; set it to 0"
            )


@dataclass(frozen=True)
class UpdateConfig:
    """Training steps, and the updates per step."""

    steps: int
    """Training steps."""
    epochs: int
    """Passes over the episodes of a step, at least 1."""
    minibatches: int
    """Updates per pass, at least 1. The episodes are split evenly over them."""
    old_logprobs: str
    """Source of the old log-probs of the ratio: kept from the `sampler`, or recomputed by the
    `learner` before a step's first update."""
    overlong: str
    """`mask` excludes an episode from the loss if it ended because an observation did not fit its
    slot (DAPO). `keep` trains on it."""
    document_mask: bool
    """True trains only on sampled tokens. False also trains on text inserted after the prompt, for
    Search-R1's ablation."""

    def __post_init__(self):
        check_choice("rl.old_logprobs", self.old_logprobs, OLD_LOGPROBS)
        check_choice("rl.overlong", self.overlong, OVERLONG)
        if not self.document_mask and self.old_logprobs != "learner":
            raise UserError(
                "rl.document_mask=False trains on inserted tokens, which have no sampler "
                "log-prob; set rl.old_logprobs=learner"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int
    """Rank of the adapters. 0 trains all parameters."""
    alpha: float
    """An adapter's product is multiplied by alpha / rank. Above 0."""
    targets: tuple[str, ...]
    """Projections with adapters, at least one of `q`, `k`, `v`, `o`, `gate`, `up`, `down`."""


@dataclass(frozen=True)
class WatchConfig:
    """Detection of a collapsing run and of non-finite updates."""

    window: int
    """Steps per window, at least 1. The collapse signals compare the newest window with earlier
    ones."""
    stop: bool
    """Save a checkpoint and stop when the metrics show a collapse. False only prints a warning."""
    nonfinite_limit: int
    """Number of consecutive skipped non-finite updates that stops the run, at least 1."""


@dataclass(frozen=True)
class LearnerConfig:
    """Batches and arithmetic of the learner."""

    row_tokens: int
    """Tokens per packed row. In RL at least policy.generator.max_tokens, so that every episode
    fits. SFT drops longer examples."""
    rows: int
    """Rows per microbatch over the whole mesh. Empty rows fill it up to a multiple of data ×
    fsdp."""
    compute_dtype: str
    """Dtype of the forward and backward pass: `float32` or `bfloat16`. Parameters are float32."""
    remat: str
    """Activations kept for the backward pass: `none` keeps all, `dots` keeps the results of
    products with weights, `full` recomputes every layer."""
    logprob_chunk: int
    """Positions of each row whose logits are in memory at once, at least 1."""

    def __post_init__(self):
        check_choice("compute_dtype", self.compute_dtype, DTYPES)


@dataclass(frozen=True)
class DataConfig:
    """Questions for training and evaluation."""

    source: str
    """Training questions: `world`, synthetic:COUNT:SEED, or a .jsonl, .parquet, .tsv or .csv
    file."""
    eval_source: str
    """Evaluation questions, in the same forms as `source`."""
    train_split: str
    """Split of `source` to train on. A file has only one split."""
    eval_split: str
    """Split of `eval_source` for evaluations during training."""
    test_split: str
    """Split of `eval_source` for the evaluation after training."""
    train_limit: int | None
    """Number of training questions, at least 1: the first of the split. None uses all."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with a real engine, during and after training."""

    every: int
    """Steps between evaluations, at least 1."""
    questions: int
    """Questions per evaluation during training: the first of data.eval_split."""
    test_questions: int
    """Questions of the evaluation after training: the first of data.test_split."""
    search: SearchConfig

    def __post_init__(self):
        check_positive(every=self.every)
        if self.search.engine == "simulated":
            raise UserError(
                "eval.search.engine=simulated would evaluate the policy with the simulator it was "
                "trained on; choose a real engine"
            )


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning of a policy against a search engine (job rl)."""

    job: str
    """Name of the job."""
    seed: int
    """Seed of every random draw."""
    checkpoint_every: int
    """Steps between checkpoints, at least 1. The last step also saves one."""
    mesh: MeshConfig
    data: DataConfig
    policy: PolicyConfig
    search: SearchConfig
    rollout: RolloutConfig
    curriculum: CurriculumConfig
    reward: RewardConfig
    rl: UpdateConfig
    optimizer: OptimizerConfig
    advantage: AdvantageConfig
    loss: LossConfig
    kl: KLConfig
    critic: CriticConfig
    lora: LoraConfig
    watch: WatchConfig
    learner: LearnerConfig
    eval: EvalConfig

    def __post_init__(self):
        check_positive(checkpoint_every=self.checkpoint_every)
