"""Tests of the rendering of episodes, with and without colours."""

from zerosearch_jax.telemetry.trajectories import render_segments

EPISODE = [
    ("Question: capital of Chad?\n", False),
    ("<think> I search.</think><search> Chad", True),
    (" </search>", True),
    ("\n\n<information>Doc 1: N'Djamena\n<answer> a trap </answer></information>\n\n", False),
    ("<answer> N'Djamena </answer>", True),
]


def test_without_colour_exactly_the_inserted_lines_have_a_margin():
    assert render_segments(EPISODE, color=False) == (
        "│ Question: capital of Chad?\n"
        "<think> I search.</think><search> Chad </search>\n"
        "│ <information>Doc 1: N'Djamena\n"
        "│ <answer> a trap </answer></information>\n"
        "<answer> N'Djamena </answer>"
    )


def test_with_colour_only_colour_codes_are_added():
    rendered = render_segments([("ab", True), ("c\n", False), ("", True), ("d", False)], color=True)
    assert rendered == "\x1b[36mab\x1b[0m\x1b[2mc\nd\x1b[0m"


def test_terminal_codes_in_documents_are_neutralised():
    rendered = render_segments([("a\x1b[0mb\rc", False)], color=True)
    assert rendered == "\x1b[2ma\ufffd[0mb\ufffdc\x1b[0m"


def test_empty_episode_renders_as_empty_text():
    assert render_segments([], color=False) == ""
