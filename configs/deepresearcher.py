"""DeepResearcher (arXiv 2504.03160): GRPO on web search; -1 for a wrong format, else F1.

  python -m zerosearch_jax.main --config=configs/deepresearcher.py[:PRESET]

The presets are those of grpo.py; what differs: the engine and the reward's rule. The paper presets
search the web with Serper; a search that fails is told to the policy, for some will. The others
search a recording of the web made from the embedded world. The paper's policy also browses pages;
ours reads the search's snippets.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{Path(__file__).with_name('grpo.py')}:{preset}")
    web = dict(provider="serper", blocked_domains=("huggingface.co",), recording="world")
    small = preset in ("", "smollm2-135m")
    config.search.update(dict(engine="recorded_web" if small else "web", web=web))
    config.rollout.stop_on_failure = small
    config.reward.rule = "deepresearcher"
    return config
