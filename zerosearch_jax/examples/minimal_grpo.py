"""ZeroSearch on one page: GRPO against a search engine that is a language model.

`python -m zerosearch_jax.examples.minimal_grpo` trains the embedded policy on a CPU. It prints a
learning curve, and EM with a real engine before and after. The full trainer is `jobs/rl.py`.
"""

from collections import namedtuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from zerosearch_jax.data import passages, qa
from zerosearch_jax.generate.generator import Generator
from zerosearch_jax.generate.sampling import GREEDY, Sampling
from zerosearch_jax.generate.texts import TextGenerator
from zerosearch_jax.models.transformer import abstract_model
from zerosearch_jax.parallel.mesh import make_mesh
from zerosearch_jax.rl import losses
from zerosearch_jax.rl.advantages import group_advantages
from zerosearch_jax.rl.logprobs import chunked_logprobs
from zerosearch_jax.rl.optimizer import adamw, warmup_cosine
from zerosearch_jax.rl.rewards import token_f1
from zerosearch_jax.rollout.scheduler import STOP_STRINGS, Limits, Rollouts
from zerosearch_jax.rollout.trajectory import Episode, Trajectory
from zerosearch_jax.search import bm25, curriculum, simulated
from zerosearch_jax.training.episode_metrics import answer_scores
from zerosearch_jax.training.factory import Model, load_model, stop_table
from zerosearch_jax.training.row_sampler import RowSampler

STEPS, QUESTIONS, GROUP_SIZE = 10, 40, 3  # updates, questions per update, episodes per question
SLOTS, ROWS = 120, 8  # episodes sampled at once; episodes in one gradient computation
MAX_TOKENS = 640  # of an episode, prompt and documents included
LIMITS = Limits(max_turns=3, response_tokens=64, observation_tokens=192)
NOISE = dict(start=0.0, end=0.5)  # probability of a noisy search in the first and last step
LEARNING_RATE, KL_COEF, CLIP = 5e-4, 0.01, dict(clip_low=0.2, clip_high=0.2)
# Arrays [B, T], one episode per row. Column t predicts the next token, `targets[t]`; `mask` is True
# where the policy sampled that token and False in prompt, documents and padding.
Batch = namedtuple("Batch", "tokens targets mask old_logprobs advantages")


def make_generator(model: Model, stops: tuple[str, ...]) -> Generator:
    """Makes a generator that stops after one of the `stops`."""
    table, end_ids = stop_table(model, stops), model.end_ids
    sizes = dict(slots=SLOTS, max_tokens=MAX_TOKENS, prefill_rows=16, decode_rows=(16,))
    return Generator(model.config, stop_table=table, end_ids=end_ids, mesh=make_mesh(), **sizes)


def rollout(params, generator, engine, tokenizer, rows, first=0, **options) -> list[Trajectory]:
    """Runs one episode per question row; the episodes are numbered from `first` on."""
    generator.load(params)
    episodes = [Episode(first + i, r.question, r.golden_answers) for i, r in enumerate(rows)]
    rollouts = Rollouts(generator, engine, tokenizer, limits=LIMITS, **options)
    return rollouts.run(episodes, jax.random.key(0))


def make_batch(trajectories: list[Trajectory], advantages: np.ndarray) -> Batch:
    """Pads trajectories to T = MAX_TOKENS; `advantages` is [B]."""
    dtypes = (np.int32, np.int32, bool, np.float32, np.float32)
    batch = Batch(*(np.zeros((len(trajectories), MAX_TOKENS), dtype) for dtype in dtypes))
    for row, trajectory in enumerate(trajectories):
        n = len(trajectory.tokens) - 1
        batch.tokens[row, :n] = trajectory.tokens[:-1]
        batch.targets[row, :n] = trajectory.tokens[1:]
        batch.mask[row, :n] = trajectory.by_policy[1:]
        batch.old_logprobs[row, :n] = trajectory.logprobs[1:]
        batch.advantages[row, :n] = advantages[row]
    return batch


@partial(jax.jit, static_argnames="graphdef")
def loss_and_grads(params, reference, batch: Batch, policy_tokens, *, graphdef):
    """Returns loss and gradient, summed over the rows and divided by `policy_tokens`."""

    def logprobs(params):  # [B, T]; 0 where the mask is False
        model = nnx.merge(graphdef, params)
        ones = jnp.ones_like(batch.tokens)  # one segment; causal attention never sees the padding
        hidden = model(batch.tokens, jnp.cumsum(ones, axis=1) - 1, ones)
        unembed = model.unembedding()
        return chunked_logprobs(hidden, unembed, batch.targets, mask=batch.mask, chunk=128)[0]

    def loss(params):
        _, _, mask, old, advantages = batch
        new = logprobs(params)
        surrogate, _ = losses.clipped_surrogate(new, old, advantages, mask, **CLIP)
        kl = losses.kl_k3(new, logprobs(reference), mask)
        return losses.masked_sum(surrogate + KL_COEF * kl, mask) / policy_tokens

    return jax.value_and_grad(loss)(params)


def train(
    policy: Model, generator: Generator, engine, rows, steps=STEPS, questions=QUESTIONS
) -> nnx.State:
    """Returns the parameters after `steps` updates on groups of episodes; prints the curve."""
    graphdef, params = abstract_model(policy.config)[0], policy.params
    rate = warmup_cosine(LEARNING_RATE, warmup_steps=2, total_steps=steps, final_fraction=0.05)
    optimizer = adamw(rate, beta1=0.9, beta2=0.99, weight_decay=0.01, clip_norm=1.0)
    opt_state = optimizer.init(params)
    sampler = RowSampler(rows, questions, seed=0, size_key="questions")
    for step in range(steps):
        p_noisy = curriculum.noise_probability(step, max(1, steps - 1), **NOISE)
        noisy = partial(curriculum.draw_noisy, 0, step, probability=p_noisy)
        groups = [row for row in sampler.draw(step) for _ in range(GROUP_SIZE)]
        options = dict(first=step * len(groups), sampling=Sampling(), noisy=noisy)
        trajectories = rollout(params, generator, engine, policy.tokenizer, groups, **options)
        em = np.mean(answer_scores(trajectories, "em"))
        reward = np.array([token_f1(t.answer, t.episode.golden_answers) for t in trajectories])
        advantages = group_advantages(reward.reshape(questions, GROUP_SIZE)).reshape(-1)
        batch = make_batch(trajectories, np.asarray(advantages))
        loss, grads = 0.0, jax.tree.map(jnp.zeros_like, params)
        for i in range(0, len(groups), ROWS):
            part = Batch(*(array[i : i + ROWS] for array in batch))
            new = loss_and_grads(params, policy.params, part, batch.mask.sum(), graphdef=graphdef)
            loss, grads = jax.tree.map(jnp.add, (loss, grads), new)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        print(f"{step + 1:4}{reward.mean():9.3f}{em:9.3f}{p_noisy:9.3f}{loss:9.4f}")
    return params


def main() -> tuple[float, float]:
    """Trains on the embedded world; returns EM with BM25 on its test split before and after."""
    policy = load_model("zerosearch_jax/assets/policy", make_mesh(), "float32")
    simulator = load_model("zerosearch_jax/assets/simulator", make_mesh(), "float32")
    writer = make_generator(simulator, stops=("Doc 3",))
    writer.load(simulator.params)
    options = dict(sampling=Sampling(temperature=0.4), max_new_tokens=168, key=jax.random.key(1))
    texts = TextGenerator(writer, simulator.tokenizer, **options)
    engine = simulated.SimulatedEngine(texts, form="finetuned", topk=2)
    real_engine = bm25.BM25Engine(passages.load_passages("world"), topk=2)
    generator = make_generator(policy, STOP_STRINGS)
    test = qa.load_qa("world", "test", 240)

    def evaluate(params) -> float:
        answered = rollout(params, generator, real_engine, policy.tokenizer, test, sampling=GREEDY)
        return np.mean(answer_scores(answered, "em"))

    before = evaluate(policy.params)
    print("step   reward       em  p_noisy     loss")
    after = evaluate(train(policy, generator, engine, qa.load_qa("world", "train")))
    print(f"EM with BM25 on {len(test)} test questions: {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
