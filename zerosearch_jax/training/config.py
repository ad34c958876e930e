"""The config of the rl job: `RLConfig` and the sections that only this job has.

Every key is one typed field with its documentation below it. `main --describe` prints both. The
sections that jobs share are in `training/sections.py`, those of the RL update in `rl/config.py`.
Checks of one section are in its `__post_init__`, checks between sections in `training/validate.py`.
"""

from dataclasses import dataclass
from typing import Annotated

from zerosearch_jax.errors import UserError
from zerosearch_jax.ranges import (
    Choice,
    Count,
    CountOrZero,
    NonNegativeFloat,
    PositiveFloat,
    Range,
    Rows,
    Seed,
    Share,
    ThreadsOrZero,
    Tokens,
)
from zerosearch_jax.rl.config import (
    AdvantageConfig,
    CriticConfig,
    Dtype,
    KLConfig,
    LossConfig,
    OptimizerConfig,
)
from zerosearch_jax.rl.rewards import REWARDS, RULES
from zerosearch_jax.training.sections import (
    MeshConfig,
    OverlongQuestions,
    PolicyConfig,
    SearchConfig,
)

OLD_LOGPROBS = ("sampler", "learner")
OVERLONG = ("keep", "mask")
WATCH_ACTIONS = ("log", "stop", "rollback")
# The next two repeat names of modules that import jax; a test compares them.
REMAT = ("none", "dots", "full")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class RolloutConfig:
    """Episodes of one training step."""

    questions_per_step: Rows
    """Groups that a step trains on, one question each."""
    group_size: Rows
    """Episodes per question. The paper has 5."""
    max_turns: CountOrZero
    """Most search or invalid turns before the final turn. A search in the final turn is not run. 0
    leaves only the final turn."""
    response_tokens: Tokens
    """Most tokens sampled per turn."""
    observation_tokens: Tokens
    """Most tokens inserted per search, tags included. Longer documents are cut."""
    temperature: PositiveFloat
    """Sampling temperature of the policy. Evaluations are greedy."""
    stop_on_failure: bool
    """Stop the run when a training search fails after all attempts. False inserts a failure text
    instead, as evaluations always do. A query that is too long for the engine never stops a run,
    because the policy wrote it: it gets the failure text and counts in `failed_search_ratio`."""
    concurrent_searches: ThreadsOrZero
    """Most batches of searches in flight while the policy decodes. 0 alternates searching and
    decoding, which is deterministic."""
    max_rounds: Annotated[int, Range(1, 1000)]
    """Most rounds of `questions_per_step` questions per step. Above 1, sampling continues until
    `questions_per_step` groups have rewards that differ (DAPO's dynamic sampling, arXiv 2503.14476
    §3.2)."""

    def __post_init__(self):
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

    start: Share
    """Probability in the first step."""
    end: Share
    """Probability in the last step."""
    base: PositiveFloat
    """Curvature. Above 1 the probability changes mostly late, below 1 mostly early; 1 is a straight
    line."""


@dataclass(frozen=True)
class RewardConfig:
    """Reward of an episode."""

    rule: Annotated[str, Choice(*RULES)]
    """`answer`: the score plus format_weight if the format is valid. `research`, `deepresearcher`
    and `r1_searcher`: the rule of that paper."""
    name: Annotated[str, Choice(*REWARDS)]
    """Score of rule `answer`: `f1`, `em` or `cover_em`."""
    format_weight: NonNegativeFloat
    """Reward of a valid format under rule `answer`."""
    stage_one_steps: CountOrZero
    """First steps, in which `r1_searcher` rewards only searches and format. At most rl.steps."""

    def __post_init__(self):
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
class PlateauConfig:
    """End of training before `rl.steps`, when the evaluations no longer improve."""

    patience: CountOrZero
    """Training ends after this number of evaluations in a row without a gain in `eval/em`. The run
    then exports and evaluates its last policy. 0 runs all steps."""
    min_gain: Share
    """An evaluation is a gain if its `eval/em` exceeds the best one by more than this."""


@dataclass(frozen=True)
class UpdateConfig:
    """Training steps, and the updates per step."""

    steps: Count
    """Training steps. `stop_when` may end training earlier. The curriculum spans all of them."""
    stop_when: PlateauConfig
    epochs: Annotated[int, Range(1, 1000)]
    """Passes over the episodes of a step."""
    minibatch_episodes: CountOrZero
    """Episodes per update. The last update of a pass may have fewer. 0 makes one update per pass,
    on all episodes of the step."""
    old_logprobs: Annotated[str, Choice(*OLD_LOGPROBS)]
    """Source of the old log-probs of the ratio. `sampler` keeps the sampling log-probs. The ratio
    then includes the rounding difference of generator and learner. `learner` makes every ratio of a
    step's first update exactly 1, and recomputes log-probs for its later updates."""
    overlong: Annotated[str, Choice(*OVERLONG)]
    """`mask` excludes truncated episodes from the loss (DAPO); `keep` trains on them. An episode is
    truncated if an observation did not fit the slot, or if its last turn was cut at
    rollout.response_tokens or the end of the slot."""
    refresh_reference: CountOrZero
    """Steps after which the current policy becomes the reference policy of the KL. Checkpoints then
    hold the reference, too. 0 keeps the start policy."""
    document_mask: bool
    """True trains only on sampled tokens. False also trains on text inserted after the prompt, for
    Search-R1's ablation."""

    def __post_init__(self):
        if not self.document_mask and self.old_logprobs != "learner":
            raise UserError(
                "rl.document_mask=False trains on inserted tokens, which have no sampler "
                "log-prob; set rl.old_logprobs=learner"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: Annotated[int, Range(0, 2**16)]
    """Rank of the adapters. 0 trains all parameters."""
    alpha: PositiveFloat
    """An adapter's product is multiplied by alpha / rank."""
    targets: tuple[Annotated[str, Choice(*LORA_TARGETS)], ...]
    """Projections with adapters, at least one of `q`, `k`, `v`, `o`, `gate`, `up`, `down`."""

    def __post_init__(self):
        if not self.targets:
            raise UserError(f"lora.targets is empty; choose some of {', '.join(LORA_TARGETS)}")


@dataclass(frozen=True)
class WatchConfig:
    """Detection of a collapsing run and of non-finite updates."""

    window: Count
    """Steps per window. The collapse signals compare the newest window with earlier ones."""
    action: Annotated[str, Choice(*WATCH_ACTIONS)]
    """Reaction to metrics that show a collapse. `log` prints a warning. `stop` also saves a
    checkpoint and stops. `rollback` continues from the checkpoint with the best `eval/em`, or from
    the start policy before the first evaluation, with lower learning rates."""
    rollback_rate_factor: Annotated[float, Range(0, 1, open_low=True)]
    """Factor of all learning rates at each rollback."""
    max_rollbacks: Count
    """Most rollbacks of a run. The next collapse stops it."""
    nonfinite_limit: Count
    """Number of consecutive skipped non-finite updates that stops the run."""


@dataclass(frozen=True)
class LearnerConfig:
    """Batches and arithmetic of the learner."""

    row_tokens: Tokens
    """Tokens per packed row. In RL at least policy.generator.max_tokens, so that every episode
    fits. SFT drops longer examples."""
    rows: Rows
    """Rows per microbatch over the whole mesh. Empty rows fill it up to a multiple of data ×
    fsdp."""
    compute_dtype: Dtype
    """Dtype of the forward and backward pass: `float32` or `bfloat16`. Parameters are float32."""
    remat: Annotated[str, Choice(*REMAT)]
    """Activations kept for the backward pass: `none` keeps all, `dots` keeps the results of
    products with weights, `full` recomputes every layer."""
    logprob_chunk: Tokens
    """Positions of each row whose logits are in memory at once."""


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
    train_limit: Count | None
    """Number of training questions: the first of the split. None uses all."""
    overlong: OverlongQuestions
    """Reaction to a question whose prompt does not fit a slot of the policy or a local simulator.
    `error` refuses the first one. `drop` drops all and prints their number."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with a real engine, during and after training."""

    every: Count
    """Steps between evaluations. Above rl.steps, only the trained policy is evaluated."""
    questions: Count
    """Questions per evaluation during training: the first of data.eval_split."""
    test_questions: Count
    """Questions of the evaluation after training: the first of data.test_split."""
    max_failed_searches: Share
    """Largest share of failed searches in a result. With more, an evaluation during training has no
    scores. The evaluation after training writes no summary and the job exits with 2; the same
    command evaluates again."""
    search: SearchConfig

    def __post_init__(self):
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
    seed: Seed
    """Seed of every random draw."""
    checkpoint_every: Count
    """Steps between checkpoints. The last step also saves one."""
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

    @property
    def episodes_per_step(self) -> int:
        """Episodes that a step trains on."""
        return self.rollout.questions_per_step * self.rollout.group_size

    @property
    def episodes_per_update(self) -> int:
        """Episodes of every update but the last of a pass, which may have fewer."""
        return self.rl.minibatch_episodes or self.episodes_per_step

    @property
    def updates_per_step(self) -> int:
        """Updates of a step, over all passes."""
        return self.rl.epochs * -(-self.episodes_per_step // self.episodes_per_update)
