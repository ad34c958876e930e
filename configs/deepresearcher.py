"""DeepResearcher (arXiv 2504.03160): GRPO on web search; reward -1 for a wrong format, else F1.

  python -m zerosearch_jax.main --config=configs/deepresearcher.py[:PRESET]

Differs from grpo.py: the engine and the reward rule. The presets of the paper's models search the
web with Serper (SERPER_API_KEY) and insert a failure text if a search fails, because web searches
sometimes fail. The default and smollm2-135m search a recording made from the embedded world. The
paper's policy also browses pages; this one reads only the snippets of the results.

Presets, hardware and time are those of grpo.py. Score in the miniature: docs/miniature/report.md.
"""

from pathlib import Path

from ml_collections import ConfigDict

from zerosearch_jax import config_flags

GRPO = Path(__file__).with_name("grpo.py")
PRESETS = config_flags.presets(GRPO)


def get_config(preset: str = "") -> ConfigDict:
    config = config_flags.load(f"{GRPO}:{preset}")
    web = dict(provider="serper", blocked_domains=("huggingface.co",), recording="world")
    small = preset in ("", "smollm2-135m")
    config.search.update(dict(engine="recorded_web" if small else "web", web=web))
    config.curriculum.end = 0.0  # only the simulator reads it
    config.rollout.stop_on_failure = small
    config.reward.rule = "deepresearcher"
    return config
