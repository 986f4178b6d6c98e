"""When the ranks ask each other what is live: once a step, or once a forward under `Join`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import rdp
from internals.distributed.wire import Wire, lives
from rdp.distributed.agreement import Agreement, ShadowHook
from rdp.distributed.ranks import Question, Ranks

FACTS = {"the step": 3, "the seed": 0}


@dataclass(frozen=True)
class Config:
    """What `Join` tells those in its list, as far as it matters here."""

    enable: bool
    is_first_joinable: bool


def agreement(config: Config | None = None) -> Agreement:
    made = Agreement(Ranks(), lambda: FACTS)
    made.join_config = config
    return made


@pytest.mark.parametrize("config", [None, Config(False, False), Config(False, True)])
def test_outside_of_join_ranks_ask_once_a_step(config: Config | None, wire: Wire):
    mine = agreement(config)
    assert mine.forward_begins(lives(1, 1, 1)) is None
    assert wire.sent == []
    Ranks().ask(lives(0, 1, 0), FACTS)
    assert mine.settle(lives(1, 0, 0), []).tolist() == [True, True, False]


def test_under_join_they_ask_at_every_forward_and_not_at_the_step(wire: Wire):
    mine, asked = agreement(Config(enable=True, is_first_joinable=False)), []
    for own, others in ((lives(1, 0, 0, 0), lives(0, 1, 0, 0)), (lives(0, 0, 0, 0), None)):
        question = mine.forward_begins(own)
        assert isinstance(question, Question)
        asked.append(question)
        Ranks().ask(others, FACTS)
        wire.wait()
        wire.sent.clear()
    assert mine.settle(lives(1, 1, 1, 1), asked).tolist() == [True, True, False, False]
    assert wire.sent == []


def test_under_join_facts_are_compared_too(wire: Wire):
    mine = agreement(Config(enable=True, is_first_joinable=False))
    question = mine.forward_begins(lives(1))
    assert question is not None
    Ranks().ask(lives(1), {"the step": 4, "the seed": 0})
    with pytest.raises(rdp.RankError, match="disagree on the step"):
        mine.settle(lives(1), [question])


def test_the_model_must_come_first_in_join(wire: Wire):
    with pytest.raises(rdp.RankError) as error:
        agreement(Config(enable=True, is_first_joinable=True)).forward_begins(lives(1))
    assert str(error.value) == "the handle is first in Join([...]); list the model first: Join([ddp_model, handle])"


def test_a_rank_that_is_out_of_data_answers_and_catches_up(wire: Wire):
    wire.others = [7]
    skipped: list[int] = []
    hook = ShadowHook(agreement(), lambda: 4, skipped.append)
    hook.main_hook()
    assert [len(sent) for sent in wire.sent] == [2 * 2 * 4 + 1024]
    assert not wire.sent[0].any()
    hook.post_hook(is_last_joiner=False)
    assert skipped == [7]
