"""Measures the prompts of questions against the slots of the models, before anything is compiled.

A question that is too long for a slot would otherwise end a run in the middle of a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zerosearch_jax.data.qa import QARow
from zerosearch_jax.errors import UserError
from zerosearch_jax.models.directory import read_model_files
from zerosearch_jax.text import prompts
from zerosearch_jax.text.tokenizer import encode, encode_prompt
from zerosearch_jax.training.config import RolloutConfig
from zerosearch_jax.training.job_configs import RefineConfig
from zerosearch_jax.training.sections import (
    LimitsConfig,
    PolicyConfig,
    SearchConfig,
    SimulatorConfig,
)

# A prompt contains a question at most twice. At its ends, tokens of the template may split, which
# the margin covers.
_COPIES, _MARGIN_TOKENS = 2, 16


@dataclass(frozen=True)
class PromptLimit:
    """Limit on the tokens of a prompt that is made from a question.

    Attributes:
      name: name of the prompt, for errors.
      tokenizer: tokenizer of the model.
      tokens: counts the tokens of a row's prompt.
      most: largest number of prompt tokens that fit the slot.
      slot: the config values from which `most` is computed, for errors.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    tokens: Callable[[QARow], int]
    most: int
    slot: str

    def excess(self, row: QARow, template_tokens: int) -> str:
        """Describes by how much the row's prompt is too long; "" if it fits.

        Args:
          template_tokens: tokens of the prompt of an empty row.
        """
        # Encoding a whole prompt takes milliseconds, so two cheaper bounds come first: the number
        # of characters (an ASCII token has at least one), and the tokens of the texts alone.
        room = (self.most - template_tokens - _MARGIN_TOKENS) // _COPIES
        text = f"{row.question} {row.golden_answers[0]}"
        if text.isascii() and len(text) <= room or len(encode(self.tokenizer, text)) <= room:
            return ""
        tokens = self.tokens(row)
        if tokens <= self.most:
            return ""
        return f"the {self.name} has {tokens} tokens, and at most {self.most} fit ({self.slot})"


def prompt_limits(
    policy: PolicyConfig,
    episode: LimitsConfig | RolloutConfig,
    searches: Iterable[SearchConfig] = (),
    methods: Sequence[str] = ("search",),
    refine: RefineConfig | None = None,
) -> list[PromptLimit]:
    """Returns the limits of the policy's prompt and of the simulators' prompts.

    Args:
      episode: limits of an episode. The policy's prompt must leave room for one turn of
        `response_tokens`.
      searches: search engines; only those with a simulator in this process have a limit. A
        simulator's prompt is measured with the question as the query, and must leave room for
        `max_new_tokens`. A longer query of the policy may fail its own search.
      methods: names of `evaluation.baselines.METHODS`, which begin with different texts.
      refine: adds the limit of the prompt that refines documents. It is measured with the question
        as the query and without documents, which are cut to fit.

    Raises:
      UserError: as `read_model_files`, or `observation_tokens` is too small.
    """
    tokenizer = read_model_files(policy.model).tokenizer
    tags = len(encode(tokenizer, prompts.information_block("")))
    if episode.max_turns and episode.observation_tokens <= tags:
        raise UserError(
            f"observation_tokens={episode.observation_tokens} leaves no room between the {tags} "
            "tokens of the information tags; raise it"
        )

    def policy_tokens(row: QARow) -> int:
        prompt = len(encode_prompt(tokenizer, prompts.policy_prompt(row.question)))
        openings = {
            "direct": prompts.FORCED_ANSWER,
            "rag": prompts.forced_search(row.question),
        }
        texts = [openings[method] for method in methods if method in openings]
        return prompt + max((len(encode(tokenizer, text)) for text in texts), default=0)

    size, response_tokens = policy.generator.max_tokens, episode.response_tokens
    limits = [
        PromptLimit(
            "policy's prompt",
            tokenizer,
            policy_tokens,
            size - response_tokens,
            f"config.policy.generator.max_tokens={size} less response_tokens={response_tokens}",
        )
    ]
    if refine is not None:
        limits.append(_refiner_limit(tokenizer, size, refine))
    local = [s for s in searches if s.engine == "simulated" and not s.simulator.url]
    return limits + [_simulator_limit(search.simulator, search.topk) for search in local]


def _refiner_limit(
    tokenizer: PreTrainedTokenizerBase, size: int, refine: RefineConfig
) -> PromptLimit:
    def tokens(row: QARow) -> int:
        text = prompts.refine_prompt(row.question, row.question, "")
        return len(encode_prompt(tokenizer, text, system=""))

    new = refine.max_new_tokens
    slot = f"config.policy.generator.max_tokens={size} less config.refine.max_new_tokens={new}"
    return PromptLimit("refiner's prompt", tokenizer, tokens, size - new, slot)


def _simulator_limit(simulator: SimulatorConfig, topk: int) -> PromptLimit:
    tokenizer = read_model_files(simulator.model).tokenizer

    def tokens(row: QARow) -> int:
        question, answer = row.question, row.golden_answers[0]
        texts = [
            prompts.simulator_prompt(question, answer, question, noisy, simulator.form, topk)
            for noisy in (True, False)
        ]
        return max(len(encode_prompt(tokenizer, text, system="")) for text in texts)

    size, new = simulator.generator.max_tokens, simulator.max_new_tokens
    slot = f"simulator.generator.max_tokens={size} less simulator.max_new_tokens={new}"
    return PromptLimit("simulator's prompt", tokenizer, tokens, size - new, slot)


def fitting(rows: Sequence[QARow], limits: Sequence[PromptLimit], overlong: str) -> list[QARow]:
    """Returns the rows whose prompts fit all `limits`, in order.

    Args:
      overlong: "error" refuses the first row that does not fit. "drop" drops such rows and prints
        their number.

    Raises:
      UserError: a row does not fit, or with "drop" no row fits.
    """
    empty = QARow("", "", ("",), "")
    template_tokens = [limit.tokens(empty) for limit in limits]
    kept, excesses = [], []
    for row in rows:
        measured = zip(limits, template_tokens, strict=True)
        excess = next(filter(None, (limit.excess(row, tokens) for limit, tokens in measured)), "")
        if excess:
            excesses.append(f"{row.where}: {excess}")
        else:
            kept.append(row)
    if not excesses:
        return kept
    count = f"{len(excesses)} of {len(rows)} questions are too long"
    if overlong == "error":
        raise UserError(
            f"{excesses[0]}; {count}: shorten them, raise max_tokens, or set "
            "config.data.overlong=drop"
        )
    if not kept:
        raise UserError(f"{excesses[0]}; {count}, so none is left: raise max_tokens")
    print(f"{count} and dropped; the first: {excesses[0]}", flush=True)
    return kept
