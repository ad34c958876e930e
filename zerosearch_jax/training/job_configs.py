"""Configs of the jobs sft, collect, evaluate and simulator_report, as frozen dataclasses.

The sections that they share with the rl job are in `training/config.py`.
"""

import os
from dataclasses import dataclass
from typing import Any

from zerosearch_jax.data.embedded.scripted_agent import Behaviours
from zerosearch_jax.errors import UserError, check_positive
from zerosearch_jax.rl.config import check_choice
from zerosearch_jax.rl.optimizer import OptimizerConfig
from zerosearch_jax.training.config import (
    GeneratorConfig,
    LearnerConfig,
    LimitsConfig,
    LoraConfig,
    MeshConfig,
    PolicyConfig,
    SearchConfig,
)

EXAMPLE_KEYS = {
    "answers": ("source", "split"),
    "policy_transcripts": ("worlds", "entities_per_world", "questions_per_world", "behaviours"),
}
"""Kinds of SFT examples, and the keys of section `data` that each needs."""
LABEL_BY = ("rule", "labeler", "both")
LABELERS = ("none", "reader", "local", "server")


@dataclass(frozen=True)
class SFTDataConfig:
    """Training examples. Each kind of examples needs only some of the keys."""

    examples: str
    """`policy_transcripts`, `answers`, or a .jsonl, .json or .parquet file of pairs."""
    validation: str
    """File of held-out pairs. "" holds out the last `validation_examples` examples."""
    validation_examples: int
    """Examples that are held out without a `validation` file."""
    topk: int
    """Documents per search."""
    inserted_weight: float
    """Loss weight of inserted tokens. The policy's own tokens have weight 1."""
    end_of_text: bool
    """End every example with the end-of-text token."""
    source: str | None = None
    """Questions of `answers`: `world`, synthetic:COUNT:SEED, or a file of questions."""
    split: str | None = None
    """Split of `source`."""
    worlds: int | None = None
    """Worlds of `policy_transcripts`: every tenth is the embedded world, the others synthetic."""
    entities_per_world: int | None = None
    """Entities of a synthetic world."""
    questions_per_world: int | None = None
    """Questions per world."""
    behaviours: Behaviours | None = None

    def __post_init__(self):
        lacking = [k for k in EXAMPLE_KEYS.get(self.examples, ()) if getattr(self, k) is None]
        if lacking:
            raise UserError(
                f"examples={self.examples} needs {' and '.join(lacking)}, which this section of "
                "the config file lacks; add it there"
            )


@dataclass(frozen=True)
class SFTLoopConfig:
    """Training steps, evaluations and checkpoints."""

    steps: int
    """Training steps."""
    examples_per_step: int
    """Examples per step."""
    eval_every: int
    """Steps between evaluations of the held-out loss."""
    checkpoint_every: int
    """Steps between checkpoints."""
    patience: int
    """Evaluations without a lower held-out loss that end the run. 0 runs all steps."""
    nonfinite_limit: int
    """Skipped non-finite updates in a row that stop the run."""

    def __post_init__(self):
        check_positive(eval_every=self.eval_every, checkpoint_every=self.checkpoint_every)


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a policy or a simulator (job sft)."""

    job: str
    """Name of the job."""
    seed: int
    """Seed of every random draw."""
    init: str
    """Hugging Face directory to start from. "" starts from random weights and a new tokenizer."""
    mesh: MeshConfig
    data: SFTDataConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    learner: LearnerConfig
    sft: SFTLoopConfig
    vocab_size: int | None = None
    """Most ids of a new tokenizer. Read without `init`."""
    model: dict[str, Any] | None = None
    """Sizes of a new model, under Hugging Face's names. Read without `init`."""


@dataclass(frozen=True)
class CollectDataConfig:
    """Questions of the collecting agent."""

    source: str
    """`world`, synthetic:COUNT:SEED, or a file of questions."""
    split: str
    """Split of `source`."""
    limit: int
    """Use only the first questions."""


@dataclass(frozen=True)
class CollectRolloutConfig:
    """Searches of the collecting agent."""

    stop_on_failure: bool
    """Stop when a search fails after all attempts. False inserts a failure text instead."""
    concurrent_searches: int
    """Batches of searches in flight while the agent decodes. 0 alternates the two."""


@dataclass(frozen=True)
class CollectStageConfig:
    """Number of episodes and their sampling."""

    samples: int
    """Episodes per question."""
    temperature: float
    """Sampling temperature of the agent."""
    batch_questions: int
    """Questions between two writes, which a killed run loses at most."""

    def __post_init__(self):
        check_positive(samples=self.samples, batch_questions=self.batch_questions)


@dataclass(frozen=True)
class LabelingServerConfig:
    """Client of the labeling server."""

    key_variable: str
    """Environment variable with the API key. "" sends none."""
    timeout_secs: float
    """Deadline of one attempt."""
    attempts: int
    """Attempts per request."""
    backoff_secs: float
    """Wait before the second attempt. It doubles with each further attempt."""
    workers: int
    """Requests in flight at once."""

    def __post_init__(self):
        if self.key_variable and self.key_variable not in os.environ:
            raise UserError(
                f"key_variable={self.key_variable}: the environment has no such variable; set it "
                "to the server's API key"
            )


@dataclass(frozen=True)
class LabelingConfig:
    """Second label of each search, next to the paper's rule."""

    kind: str
    """`reader` answers from the documents; `local` and `server` ask a language model whether the
    documents support the answer; `none` leaves the rule alone."""
    model: str
    """Hugging Face directory, or the name of the model on the server."""
    url: str
    """Server with an OpenAI chat completions API. Read by `server`."""
    response_tokens: int
    """Most tokens of a reply. 8 suffice for yes or no."""
    observation_tokens: int
    """Most tokens of the documents that `reader` reads."""
    batch: int
    """Searches between two writes."""
    server: LabelingServerConfig
    generator: GeneratorConfig

    def __post_init__(self):
        check_choice("labeling.kind", self.kind, LABELERS)
        if self.kind != "none" and not self.model:
            raise UserError(
                f"labeling.kind={self.kind} needs labeling.model: a model directory, or the name "
                "of the model on the server"
            )
        if self.kind == "server" and not self.url:
            raise UserError("labeling.kind=server needs labeling.url, such as http://HOST:PORT")
        check_positive(batch=self.batch)


@dataclass(frozen=True)
class ExtractConfig:
    """Pairs that are made of the labeled searches."""

    label_by: str
    """Label of a search: `rule`, `labeler`, or `both`, which keeps an episode's last search only
    if the two agree and takes the rule for earlier searches."""
    last_only: bool
    """Keep only the last search of each episode."""
    balance: bool
    """Cut the more frequent label to the size of the other."""
    heldout_share: float
    """Fraction of the gold answers whose pairs are held out, in [0, 1)."""

    def __post_init__(self):
        check_choice("extract.label_by", self.label_by, LABEL_BY)
        if not 0 <= self.heldout_share < 1:
            raise UserError(f"extract.heldout_share={self.heldout_share} must be in [0, 1)")


@dataclass(frozen=True)
class CollectConfig:
    """Collection of training pairs for a simulator (job collect, paper §3.2)."""

    job: str
    """Name of the job."""
    seed: int
    """Seed of every random draw."""
    mesh: MeshConfig
    policy: PolicyConfig
    search: SearchConfig
    data: CollectDataConfig
    limits: LimitsConfig
    rollout: CollectRolloutConfig
    collect: CollectStageConfig
    labeling: LabelingConfig
    extract: ExtractConfig

    def __post_init__(self):
        if self.extract.label_by != "rule" and self.labeling.kind == "none":
            raise UserError(
                f"extract.label_by={self.extract.label_by} needs a labeler; set "
                "config.labeling.kind"
            )


@dataclass(frozen=True)
class EvaluateDataConfig:
    """Question sets."""

    sets: tuple[str, ...]
    """SOURCE/SPLIT, such as world/test, or a file of questions."""
    limit: int | None
    """Use only the first questions of each set. None uses all."""


@dataclass(frozen=True)
class RefineConfig:
    """Refinement of the documents by the method search_o1."""

    max_new_tokens: int
    """Tokens written per search."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a model: methods × engines × question sets (job evaluate)."""

    job: str
    """Name of the job."""
    seed: int
    """Seed of a simulator's draws. The policy is greedy."""
    mesh: MeshConfig
    policy: PolicyConfig
    data: EvaluateDataConfig
    methods: tuple[str, ...]
    """`direct`, `cot`, `rag`, `search` or `search_o1`; see evaluation/baselines.py."""
    engines: dict[str, SearchConfig]
    """Engines by name."""
    limits: LimitsConfig
    refine: RefineConfig


@dataclass(frozen=True)
class ReaderConfig:
    """Fixed model that answers questions from documents."""

    model: str
    """Hugging Face directory."""
    generator: GeneratorConfig
    response_tokens: int
    """Most tokens of an answer."""
    observation_tokens: int
    """Most tokens of the documents."""


@dataclass(frozen=True)
class SimulatorReportConfig:
    """Quality report of simulators (job simulator_report)."""

    job: str
    """Name of the job."""
    seed: int
    """Seed of every random draw."""
    mesh: MeshConfig
    pairs: str
    """File of held-out pairs."""
    limit: int
    """Most pairs of each label."""
    reader: ReaderConfig
    simulators: dict[str, SearchConfig]
    """Simulated engines by name."""

    def __post_init__(self):
        check_positive(limit=self.limit)
        for name, search in self.simulators.items():
            if search.engine != "simulated":
                raise UserError(
                    f"simulators.{name}.engine is {search.engine!r}; set it to simulated"
                )
