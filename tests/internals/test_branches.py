"""`rdp.branches`: the table that printing a handle shows, character by character."""

from __future__ import annotations

from rdp.branches import Branch, Refusal, branch_table


def branch(name: str, rate: float, parameters: int, **more: object) -> Branch:
    names = tuple(f"{name}.{number}" for number in range(parameters))
    return Branch(name, "", "identity", names, rate=rate, **more)


def test_columns_are_as_wide_as_their_widest_cell():
    branches = (branch("layers.10.attention", 0.0, 12), branch("l", 0.12345, 0, compute="rows", note="called twice"))
    assert branch_table(branches, ()) == "\n".join(
        [
            "branch               rate   kind      compute  parameters  note",
            "layers.10.attention  0.000  identity  dense    12          rate 0: trained plainly in all phases",
            "l                    0.123  identity  rows     0           called twice",
        ]
    )


def test_what_is_not_gated_stands_below_with_its_place_and_reason():
    refused = (Refusal("a.b", "a", "used twice"), Refusal("", "c", "no module"), Refusal("", "", "a function"))
    assert [str(refusal) for refusal in refused] == [
        "`a.b`: used twice",
        "`c`: no module",
        "a sum in the forward of the model itself: a function",
    ]
    assert branch_table((), refused) == "\n".join(
        ["branch  rate  kind  compute  parameters  note", *(f"not gated: {refusal}" for refusal in refused)]
    )
