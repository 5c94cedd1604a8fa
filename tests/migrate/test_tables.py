"""The migration rules agree with each other, and with the nodes that they refer to."""

import pytest

from migrate.our_nodes import NEW_NODES
from migrate.tables import DROPPED, PASSES_ON, REMOVED, STOCK, WRAPPER

RULES = {**WRAPPER, **STOCK}


@pytest.mark.parametrize("old", RULES)
def test_rules_name_inputs_that_there_are(old):
    for part in RULES[old].parts:
        new = NEW_NODES[part.node]
        assert part.carry.keys() <= new.slots.keys() | new.widgets.keys()
        assert part.adapt.keys() <= part.carry.keys() & new.widgets.keys()
        # Links come from inputs that are not widgets of the old node.
        carried = {source for target, source in part.carry.items() if target in new.widgets}
        assert carried <= RULES[old].widgets.keys()


def test_an_old_node_is_of_one_kind():
    kinds = [*RULES, *REMOVED]
    assert len(kinds) == len({*kinds})
    assert not {*kinds} & NEW_NODES.keys()


def test_what_is_dropped_is_carried_by_no_rule():
    carried = {source for rule in WRAPPER.values() for part in rule.parts for source in part.carry.values()}
    assert not carried & DROPPED.keys()


def test_outputs_that_pass_an_input_on_are_no_rules():
    """The first output of a node with a rule becomes its new node's."""
    assert all(slot == 1 or kind in REMOVED for kind, slot in PASSES_ON)
