"""Sections of a config as frozen dataclasses, and `RLConfig`, the config of the rl job.

Every key is one typed field with its documentation below it; `main --describe` prints them. The
sections of the RL update are in `rl/config.py` and `rl/optimizer.py`. Checks of one section are in
its `__post_init__`, checks between sections in `training/validate.py`.
"""

from dataclasses import dataclass

from zerosearch_jax.errors import UserError, check_positive
from zerosearch_jax.rl.config import (
    AdvantageConfig,
    CriticConfig,
    KLConfig,
    LossConfig,
    check_choice,
)
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
"""Search engines, and the keys that each needs besides `topk`."""


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh. The product of the sizes is the number of devices."""

    data: int
    """Data parallelism: every part holds all parameters."""
    fsdp: int
    """Parts over which parameters and batches are sharded."""
    tensor: int
    """Parts over which heads and MLP features are sharded."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Sampling engine: slots of the KV cache and the shapes of its compiled programs."""

    slots: int
    """Sequences in the KV cache at once."""
    max_tokens: int
    """Tokens per slot: prompt, inserted and sampled tokens together."""
    prefill_rows: int
    """Rows of one prefill."""
    prefill_buckets: tuple[int, ...]
    """Lengths to which prefills are padded. Each length is one compiled program."""
    decode_rows: tuple[int, ...]
    """Smaller numbers of rows that decoding also compiles, for when few slots are active."""
    chunk_tokens: int
    """Decode steps per dispatch."""
    window_tokens: int
    """Decoding attends to the cache up to the longest context, rounded up to a multiple of this."""
    dtype: str
    """Dtype of weights and cache: `float32` or `bfloat16`."""
    int8_weights: bool
    """Keep the weights in 8 bits, with one scale per output channel."""

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: a model directory and its generator."""

    model: str
    """Hugging Face directory of the start policy."""
    generator: GeneratorConfig


@dataclass(frozen=True)
class WebConfig:
    """Web search service."""

    provider: str
    """`serper` or `serpapi`. The API key is read from SERPER_API_KEY or SERPAPI_API_KEY."""
    recording: str
    """Read by `recorded_web`: a .jsonl file of responses, or `world`."""
    blocked_domains: tuple[str, ...]
    """Results from these domains and their subdomains are dropped."""


@dataclass(frozen=True)
class RemoteConfig:
    """Client of a server: a retriever, a web search service or a simulator."""

    url: str
    """Address of the retriever."""
    dialect: str
    """Protocol of the retriever: `search_r1` or `zerosearch`."""
    timeout_secs: float
    """Deadline of one attempt."""
    attempts: int
    """Attempts per request."""
    backoff_secs: float
    """Wait before the second attempt. It doubles with each further attempt."""
    workers: int
    """Requests in flight at once."""


@dataclass(frozen=True)
class GateConfig:
    """Test that a simulator must have passed before a policy trains on it."""

    report: str
    """`report.json` of the simulator_report job. "" disables the gate."""
    useful_min: float
    """Least exact match of the reader on useful documents, 0 to 1."""
    noisy_max: float
    """Greatest exact match of the reader on noisy documents, 0 to 1."""


@dataclass(frozen=True)
class SimulatorConfig:
    """Language model that writes the documents of the simulated engine."""

    model: str
    """Hugging Face directory, or the name of the model on the server."""
    url: str
    """Server with an OpenAI chat completions API that runs the simulator. "" runs it here."""
    gate: GateConfig
    devices: int
    """Devices of each process that only the simulator uses. 0 shares the policy's devices."""
    tensor: int
    """Devices of one replica of the simulator. 0 takes mesh.tensor."""
    form: str
    """Prompt: `finetuned` for a simulator of the sft job, `prompted` for other models."""
    temperature: float
    """Sampling temperature."""
    top_k: int
    """Sample from the k most likely tokens. 0 samples from all."""
    top_p: float
    """Sample from the most likely tokens whose probabilities add up to this. 1 samples from all."""
    max_new_tokens: int
    """Tokens written per search."""
    generator: GeneratorConfig


@dataclass(frozen=True)
class SearchConfig:
    """Search engine. An engine needs only some of the keys; the others may be absent."""

    engine: str
    """`simulated`, `bm25`, `noisy_bm25`, `retriever`, `web`, `recorded_web`, or `none`."""
    topk: int
    """Documents per search."""
    corpus: str | None = None
    """Passages of `bm25` and `noisy_bm25`: `world`, synthetic:COUNT:SEED or a .jsonl file."""
    noise: float | None = None
    """Fraction of the searches that `noisy_bm25` answers with passages without a gold answer."""
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
    """Turns that may search, before the last turn. 0 leaves one turn, without search."""
    response_tokens: int
    """Tokens sampled per turn."""
    observation_tokens: int
    """Tokens inserted per search, tags included."""


@dataclass(frozen=True)
class RolloutConfig:
    """Episodes of one training step."""

    questions_per_step: int
    """Groups per step, one question each."""
    group_size: int
    """Episodes per question. The paper has 5."""
    max_turns: int
    """Turns that may search, before the last turn. 0 leaves one turn, without search."""
    response_tokens: int
    """Tokens sampled per turn."""
    observation_tokens: int
    """Tokens inserted per search, tags included."""
    temperature: float
    """Sampling temperature of the policy."""
    stop_on_failure: bool
    """Stop the run when a search fails after all attempts. False inserts a failure text instead."""
    concurrent_searches: int
    """Batches of searches in flight while the policy decodes. 0 alternates the two."""
    max_rounds: int
    """Rounds of questions per step. Above 1, sampling continues until `questions_per_step`
    groups have rewards that differ (DAPO's dynamic sampling, arXiv 2503.14476 §3.2)."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(
                f"rollout.temperature={self.temperature} must be above 0, so that the episodes "
                "of a group differ"
            )
        if self.max_turns < 0:
            raise UserError(
                f"rollout.max_turns={self.max_turns} must be at least 0, which leaves one turn"
            )
        if self.max_rounds > 1 and self.group_size == 1:
            raise UserError(
                "rollout.max_rounds > 1 looks for groups whose rewards differ; set "
                "rollout.group_size above 1"
            )


@dataclass(frozen=True)
class CurriculumConfig:
    """Probability that a search is noisy, from the first to the last step (arXiv 2505.04588)."""

    start: float
    """Probability in the first step."""
    end: float
    """Probability in the last step."""
    base: float
    """Above 1 the noise rises late, below 1 early; 1 is a straight line."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward of an episode."""

    rule: str
    """`answer`: score plus format_weight times format; or the rule of another paper:
    `research`, `deepresearcher`, `r1_searcher`."""
    name: str
    """Score of `answer`: `f1`, `em` or `cover_em`."""
    format_weight: float
    """Weight of the format in `answer`."""
    stage_one_steps: int
    """Steps in which `r1_searcher` rewards searches and format alone."""

    def __post_init__(self):
        check_choice("reward.rule", self.rule, tuple(RULES))
        if self.rule != "answer" and (self.name != "f1" or self.format_weight != 0):
            raise UserError(
                f"reward.name and reward.format_weight require reward.rule=answer; {self.rule} "
                "defines its score and format: set them to f1 and 0"
            )
        if self.rule != "r1_searcher" and self.stage_one_steps != 0:
            raise UserError(
                f"reward.stage_one_steps={self.stage_one_steps} requires "
                f"reward.rule=r1_searcher, not {self.rule}; set it to 0"
            )


@dataclass(frozen=True)
class UpdateConfig:
    """Training steps, and the updates of each."""

    steps: int
    """Training steps."""
    epochs: int
    """Passes over the episodes of a step."""
    minibatches: int
    """Updates per pass."""
    old_logprobs: str
    """Old log-probs of the ratio: kept from the `sampler`, or recomputed by the `learner`."""
    overlong: str
    """`mask` takes episodes that ran out of tokens out of the loss (DAPO); `keep` keeps them."""
    document_mask: bool
    """False also trains on inserted documents, for the ablation of Search-R1 only."""

    def __post_init__(self):
        check_choice("rl.old_logprobs", self.old_logprobs, OLD_LOGPROBS)
        check_choice("rl.overlong", self.overlong, OVERLONG)
        if not self.document_mask and self.old_logprobs != "learner":
            raise UserError(
                "rl.document_mask=False trains on tokens that no policy sampled, so they have no "
                "sampler log-prob; set rl.old_logprobs=learner"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int
    """Rank of the adapters. 0 trains all parameters."""
    alpha: float
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """Projections with adapters: `q`, `k`, `v`, `o`, `gate`, `up`, `down`."""


@dataclass(frozen=True)
class WatchConfig:
    """Detection of a collapsing run and of non-finite updates."""

    window: int
    """Steps over which the collapse metrics are compared."""
    stop: bool
    """Stop the run when its metrics show a collapse. False prints a warning."""
    nonfinite_limit: int
    """Skipped non-finite updates in a row that stop the run."""


@dataclass(frozen=True)
class LearnerConfig:
    """Batches and arithmetic of the learner."""

    row_tokens: int
    """Tokens per packed row. An episode must fit."""
    rows: int
    """Rows per microbatch."""
    compute_dtype: str
    """Dtype of the forward and backward pass. Parameters are float32."""
    remat: str
    """Activations kept for the backward pass: `none` recomputes nothing, `dots` keeps the results
    of matrix products, `full` recomputes every layer."""
    logprob_chunk: int
    """Tokens whose logits are in memory at once."""

    def __post_init__(self):
        check_choice("compute_dtype", self.compute_dtype, DTYPES)


@dataclass(frozen=True)
class DataConfig:
    """Questions for training and evaluation."""

    source: str
    """Training questions: `world`, synthetic:COUNT:SEED, or a file of questions."""
    eval_source: str
    """Evaluation questions, from the same kinds of sources."""
    train_split: str
    """Split of `source` to train on."""
    eval_split: str
    """Split of `eval_source` that is evaluated during training."""
    test_split: str
    """Split of `eval_source` that is evaluated after training."""
    train_limit: int | None
    """Use only the first questions. None uses all."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with a real engine, during and after training."""

    every: int
    """Steps between evaluations."""
    questions: int
    """Questions of an evaluation during training."""
    test_questions: int
    """Questions of the evaluation after training."""
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
    """Steps between checkpoints."""
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
