"""Configs of the jobs sft, collect, evaluate and simulator_report, as frozen dataclasses.

Sections that jobs share are in `training/sections.py`, sections of RL in `training/config.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from zerosearch_jax.data.embedded.scripted_agent import Behaviours
from zerosearch_jax.errors import UserError
from zerosearch_jax.ranges import (
    Attempts,
    Backoff,
    Choice,
    Count,
    CountOrZero,
    Documents,
    NonNegativeFloat,
    Range,
    Rows,
    Seed,
    Share,
    Threads,
    ThreadsOrZero,
    Timeout,
    Tokens,
)
from zerosearch_jax.rl.config import OptimizerConfig
from zerosearch_jax.search.server import check_address, check_key_variable
from zerosearch_jax.training.config import LearnerConfig, LoraConfig
from zerosearch_jax.training.sections import (
    GeneratorConfig,
    LimitsConfig,
    MeshConfig,
    OverlongQuestions,
    PolicyConfig,
    SearchConfig,
)

EXAMPLE_KEYS = {
    "answers": ("source", "split"),
    "policy_transcripts": ("worlds", "entities_per_world", "questions_per_world", "behaviours"),
}
"""Kind of SFT examples: the keys of section `data` that it needs."""
PAIR_SUFFIXES = (".jsonl", ".json", ".parquet")
METHODS = ("direct", "cot", "rag", "search", "search_o1")
"""Inference baselines of the evaluate job, see `evaluation.baselines`."""
WITHOUT_ENGINE = ("direct", "cot")
LABEL_BY = ("rule", "labeler", "both")
LABELERS = ("none", "reader", "local", "server")


def is_path(examples: str) -> bool:
    """Whether `data.examples` of the sft job names a file of pairs."""
    return Path(examples).suffix in PAIR_SUFFIXES


@dataclass(frozen=True)
class SFTDataConfig:
    """Training examples. Keys that the kind of examples does not read may be absent."""

    examples: str
    """`policy_transcripts`, `answers`, or a .jsonl, .json or .parquet file of pairs."""
    validation: str
    """File of held-out pairs. "" holds out the last `validation_examples` examples."""
    validation_examples: CountOrZero
    """Number of held-out examples if `validation` is "". Above 0 and below the number of
    examples."""
    topk: Documents
    """Documents per search. A pair with fewer is refused."""
    inserted_weight: Share
    """Loss weight of prompt and inserted tokens. Tokens that the model writes have weight 1."""
    end_of_text: bool
    """End every example with the end-of-text token."""
    source: str | None = None
    """Questions of `answers`: `world`, synthetic:COUNT:SEED, or a .jsonl, .parquet, .tsv or .csv
    file."""
    split: str | None = None
    """Split of `source`."""
    worlds: Count | None = None
    """Worlds of `policy_transcripts`. Every tenth, from the first, has the embedded world's
    training entities; the rest are synthetic."""
    entities_per_world: Count | None = None
    """Entities of a synthetic world."""
    questions_per_world: Count | None = None
    """Most questions per world."""
    behaviours: Behaviours | None = None

    def __post_init__(self):
        if self.examples not in EXAMPLE_KEYS and not is_path(self.examples):
            raise UserError(
                f"examples is {self.examples!r}; choose {' or '.join(EXAMPLE_KEYS)}, or give a "
                f"{', '.join(PAIR_SUFFIXES)} file of pairs"
            )
        if not self.validation and not self.validation_examples:
            raise UserError(
                "validation_examples=0 holds out nothing; set it above 0, or set validation to a "
                "file of pairs"
            )
        lacking = [k for k in EXAMPLE_KEYS.get(self.examples, ()) if getattr(self, k) is None]
        if lacking:
            raise UserError(
                f"examples={self.examples} needs {' and '.join(lacking)}, which this section of "
                "the config file lacks; add it there"
            )


@dataclass(frozen=True)
class SFTLoopConfig:
    """Training steps, evaluations and checkpoints."""

    steps: Count
    """Training steps."""
    examples_per_step: Rows
    """Examples per step."""
    eval_every: Count
    """Steps between evaluations of the held-out loss. The last step also has one."""
    checkpoint_every: Count
    """Steps between checkpoints. The last step also saves one."""
    patience: CountOrZero
    """Number of evaluations without a lower held-out loss that ends the run. Above 0, the run
    exports the parameters with the lowest loss. 0 runs all steps and exports the last."""
    nonfinite_limit: Count
    """Number of consecutive skipped non-finite updates that stops the run."""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning of a policy or a simulator (job sft)."""

    job: str
    """Name of the job."""
    seed: Seed
    """Seed of every random draw."""
    init: str
    """Hugging Face directory to start from. "" starts from random weights and a new tokenizer."""
    mesh: MeshConfig
    data: SFTDataConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    learner: LearnerConfig
    sft: SFTLoopConfig
    vocab_size: Annotated[int, Range(257, 2**20)] | None = None
    """Largest vocabulary of a new tokenizer: 256 bytes, the end-of-text token and merges. Read if
    `init` is ""."""
    model: dict[str, Any] | None = None
    """Sizes of a new model, under Hugging Face's names. Read if `init` is ""."""

    def __post_init__(self):
        lacking = [key for key in ("vocab_size", "model") if getattr(self, key) is None]
        if not self.init and lacking:
            raise UserError(
                f'init="" starts a new model and needs {" and ".join(lacking)}, which the config '
                "file lacks; add it there or set init to a model directory"
            )


@dataclass(frozen=True)
class CollectDataConfig:
    """Questions of the collecting agent."""

    source: str
    """`world`, synthetic:COUNT:SEED, or a .jsonl, .parquet, .tsv or .csv file."""
    split: str
    """Split of `source`. A file has only one split."""
    limit: Count
    """Number of questions: the first of the split."""
    overlong: OverlongQuestions
    """Reaction to a question whose prompt does not fit a slot of the policy or a local simulator.
    `error` refuses the first one. `drop` drops all and prints their number."""


@dataclass(frozen=True)
class CollectRolloutConfig:
    """Searches of the collecting agent."""

    stop_on_failure: bool
    """Stop the job when a search fails after all attempts. False inserts a failure text instead."""
    concurrent_searches: ThreadsOrZero
    """Most batches of searches in flight while the agent decodes. 0 alternates searching and
    decoding, which is deterministic."""


@dataclass(frozen=True)
class CollectStageConfig:
    """Number of episodes and their sampling."""

    samples: Rows
    """Episodes per question."""
    temperature: NonNegativeFloat
    """Sampling temperature of the agent. 0 is greedy."""
    batch_questions: Rows
    """Questions per write to episodes.jsonl. A killed run loses at most one batch."""


@dataclass(frozen=True)
class LabelingServerConfig:
    """Client of the labeling server."""

    key_variable: str
    """Environment variable with the API key. "" sends none."""
    timeout_secs: Timeout
    """Deadline of one attempt in seconds."""
    attempts: Attempts
    """Attempts per request, the first included."""
    backoff_secs: Backoff
    """Seconds before the second attempt. Each further wait is twice as long, up to 60 seconds."""
    workers: Threads
    """Most requests in flight at once."""

    def __post_init__(self):
        check_key_variable(self.key_variable)


@dataclass(frozen=True)
class LabelingConfig:
    """Second label of each search, next to the paper's rule."""

    kind: Annotated[str, Choice(*LABELERS)]
    """`reader` answers the question from the documents. `local` and `server` ask a language model
    whether the documents support the gold answer. `none` gives no second label."""
    model: str
    """Hugging Face directory, or the name of the model on the server."""
    url: str
    """Server with an OpenAI chat completions API; the address may end in /v1. Read by `server`."""
    response_tokens: Tokens
    """Most tokens of a reply. 8 suffice for yes or no."""
    observation_tokens: Tokens
    """Most tokens of the documents that `reader` reads; the rest is cut."""
    batch: Count
    """Searches per write to labels.jsonl."""
    server: LabelingServerConfig
    generator: GeneratorConfig

    def __post_init__(self):
        if self.url:
            check_address("url", self.url)
        if self.kind != "none" and not self.model:
            raise UserError(
                f"labeling.kind={self.kind} needs labeling.model: a model directory, or the name "
                "of the model on the server"
            )
        if self.kind == "server" and not self.url:
            raise UserError("labeling.kind=server needs labeling.url, such as http://HOST:PORT")


@dataclass(frozen=True)
class ExtractConfig:
    """Selection of the labeled searches that become pairs."""

    label_by: Annotated[str, Choice(*LABEL_BY)]
    """Label of a search: `rule`, `labeler` or `both`. `both` drops an episode's last search unless
    rule and labeler agree; earlier searches get the rule's label."""
    last_only: bool
    """Keep only the last search of each episode."""
    balance: bool
    """Drop pairs of the more frequent label until both labels are equally frequent."""
    heldout_share: Annotated[float, Range(0, 1, open_high=True)]
    """Probability that all pairs of a gold answer are held out."""


@dataclass(frozen=True)
class CollectConfig:
    """Collection of training pairs for a simulator (job collect, paper §3.2)."""

    job: str
    """Name of the job."""
    seed: Seed
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
        if self.search.engine == "none":
            raise UserError("search.engine=none collects no searches; choose an engine")
        if self.extract.label_by != "rule" and self.labeling.kind == "none":
            raise UserError(
                f"extract.label_by={self.extract.label_by} needs a labeler; set "
                "config.labeling.kind"
            )


@dataclass(frozen=True)
class EvaluateDataConfig:
    """Question sets."""

    sets: tuple[str, ...]
    """SOURCE/SPLIT, such as world/test, or a .jsonl, .parquet, .tsv or .csv file."""
    limit: Count | None
    """Number of questions per set: the first of the set. None uses all."""
    overlong: OverlongQuestions
    """Reaction to a question whose prompt does not fit a slot of the policy or a local simulator.
    `error` refuses the first one. `drop` drops all and prints their number."""


@dataclass(frozen=True)
class RefineConfig:
    """Refinement of the documents by the method `search_o1`."""

    max_new_tokens: Tokens
    """Most tokens written per search."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of a model: methods × engines × question sets (job evaluate)."""

    job: str
    """Name of the job."""
    seed: Seed
    """Seed of the draws of `simulated` and `noisy_bm25`. The policy is greedy."""
    mesh: MeshConfig
    policy: PolicyConfig
    data: EvaluateDataConfig
    methods: tuple[Annotated[str, Choice(*METHODS)], ...]
    """Any of `direct`, `cot`, `rag`, `search` and `search_o1`; see evaluation/baselines.py."""
    engines: dict[str, SearchConfig]
    """Engines by name."""
    max_failed_searches: Share
    """Largest share of failed searches in a result. A row with more is not written, the job exits
    with 2, and the same command runs the row again."""
    limits: LimitsConfig
    refine: RefineConfig

    def __post_init__(self):
        if not self.methods or not self.data.sets:
            raise UserError("methods and data.sets must not be empty; give at least one of each")
        for name, search in self.engines.items():
            if search.engine == "none":
                raise UserError(
                    f"engines.{name}.engine=none cannot answer searches; choose an engine (the "
                    "methods direct and cot need none)"
                )


@dataclass(frozen=True)
class ReaderConfig:
    """Fixed model that answers questions from documents."""

    model: str
    """Hugging Face directory."""
    generator: GeneratorConfig
    response_tokens: Tokens
    """Most tokens of the reader's turn."""
    observation_tokens: Tokens
    """Most tokens of the documents; the rest is cut."""


@dataclass(frozen=True)
class SimulatorReportConfig:
    """Quality report of simulators (job simulator_report)."""

    job: str
    """Name of the job."""
    seed: Seed
    """Seed of every random draw."""
    mesh: MeshConfig
    pairs: str
    """File of held-out pairs. Only the last search of each episode is used."""
    limit: Count
    """Most pairs per label."""
    reader: ReaderConfig
    simulators: dict[str, SearchConfig]
    """Simulated engines by name."""

    def __post_init__(self):
        for name, search in self.simulators.items():
            if search.engine != "simulated":
                raise UserError(
                    f"simulators.{name}.engine is {search.engine!r}; set it to simulated"
                )
