"""The viewer sets inserted text apart from the policy's, with and without colours."""

from zerosearch_jax.telemetry.trajectories import render_segments

EPISODE = [
    ("Question: capital of Chad?\n", False),
    ("<think> I search.</think><search> Chad", True),
    (" </search>", True),
    ("\n\n<information>Doc 1: N'Djamena\n<answer> a trap </answer></information>\n\n", False),
    ("<answer> N'Djamena </answer>", True),
]


def test_without_colour_every_inserted_line_and_no_other_has_the_margin():
    assert render_segments(EPISODE, color=False) == (
        "│ Question: capital of Chad?\n"
        "<think> I search.</think><search> Chad </search>\n"
        "│ <information>Doc 1: N'Djamena\n"
        "│ <answer> a trap </answer></information>\n"
        "<answer> N'Djamena </answer>"
    )


def test_with_colour_the_text_is_unchanged_but_for_the_colours():
    rendered = render_segments([("ab", True), ("c\n", False), ("", True), ("d", False)], color=True)
    assert rendered == "\x1b[36mab\x1b[0m\x1b[2mc\nd\x1b[0m"


def test_a_document_cannot_smuggle_in_terminal_codes():
    rendered = render_segments([("a\x1b[0mb\rc", False)], color=True)
    assert rendered == "\x1b[2ma\ufffd[0mb\ufffdc\x1b[0m"


def test_nothing_renders_as_nothing():
    assert render_segments([], color=False) == ""
