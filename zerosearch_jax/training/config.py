"""The config of the rl job: `RLConfig` and the sections that only this job has.

Every key is one typed field with its documentation below it. `main --describe` prints both. The
sections that jobs share are in `training/sections.py`, those of the RL update in `rl/config.py` and
`rl/optimizer.py`. Checks of one section are in its `__post_init__`, checks between sections in
`training/validate.py`.
"""

from dataclasses import dataclass

from zerosearch_jax.errors import UserError, check_choice, check_positive
from zerosearch_jax.rl.config import AdvantageConfig, CriticConfig, KLConfig, LossConfig
from zerosearch_jax.rl.optimizer import OptimizerConfig
from zerosearch_jax.rl.rewards import RULES
from zerosearch_jax.training.sections import DTYPES, MeshConfig, PolicyConfig, SearchConfig

OLD_LOGPROBS = ("sampler", "learner")
OVERLONG = ("keep", "mask")


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
    """Source of the old log-probs of the ratio. `sampler` keeps those of sampling, so the ratio
    includes the rounding difference of generator and learner. `learner` makes every ratio of a
    step's first update exactly 1, and recomputes them before it for later updates."""
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
