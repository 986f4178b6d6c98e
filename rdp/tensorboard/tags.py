"""The names under which everything is written, and what TensorBoard says beside each. docs/recipes.md has them too."""

from __future__ import annotations

from rdp.phases import Phase

TAGS = {
    "train/loss": "Training loss, mean over the steps since the last point, so over all phases alike.",
    "train/lr": "Learning rate of the latest step.",
    "train/gradient_norm": "Norm of the whole gradient, mean over one cycle of phases: comparable between algorithms.",
    "test/loss": "Loss on the test data, of the plain network.",
    "test/top1": "Share of the test data for which the most likely class (or character) is right, in percent.",
    "test/top5": "Share of the test data for which the right class is among the five most likely ones, in percent.",
    "rdp/rate": "Drop rate of the deepest branch in this cycle, as the schedule and `handle.rate` make it.",
    "rdp/learning_rows": "Share of the pairs of a row and a branch in which the branch learns from the row, in "
    "percent, mean over one cycle of phases. In DROP these are the undropped ones, in FREEZE the dropped ones; 100 in "
    "plain training.",
    "rdp/frozen_parameters": "Share of the parameters that the optimizer leaves alone, in percent, mean over one "
    "cycle: those of branches that learn from no row. With masks for each row there is nearly always one.",
    "feature_reuse/reused": "Mean similarity of two layers that every layer in between carries; 1 if layers pass "
    "their input on.",
    "feature_reuse/recreated": "Mean similarity of two layers that was lost in between and came back; the paper's "
    "complaint.",
    "time/epoch_seconds": "Seconds of training in an epoch, testing not included.",
    "time/images_per_second": "Training images in a second.",
    "features/nodes": "What every node or channel computes, layer by layer; the same colour is the same value, and a "
    "row is one channel as far as shapes agree. Lines are weights: colour shows the sign, width the magnitude. The "
    "slider replays training (the paper's Figures 1 and 4).",
    "features/similarity": "Left: Euclidean distance (root mean square over inputs). Right: linear CKA (unbiased) and "
    "cosine. Curves compare each layer with the input, heatmaps all pairs of layers (the paper's Figure 3).",
    "lesions": "Left: how much worse the network is without each branch. Right: with fewer and fewer branches, those "
    "that are worth least taken away first, or random ones.",
    "training/overview": "Rows that each branch has learnt from since the last picture, by phase; loss by phase and "
    "smoothed; gradient norm, drop rate, tests, and lesions if they were measured.",
}
"""What is written, by tag."""

BY_PHASE = ("train/loss", "train/gradient_norm", "rdp/learning_rows", "rdp/frozen_parameters")
"""What is written for each phase too, where there are several: `drop/loss`, `freeze/loss` and so on."""

LAYOUT = {
    "Learning": {
        "accuracy, %": ["Multiline", ["test/(top1|accuracy)$", "test_ema/top1$"]],
        "loss": ["Multiline", ["train/loss$", "test/loss$"]],
        "gradient norm": ["Multiline", ["train/gradient_norm$"]],
        "learning rate": ["Multiline", ["train/lr$"]],
    },
    "Residual DropPath": {
        "loss by phase": ["Multiline", ["train/loss$", "drop/loss$", "freeze/loss$"]],
        "rows that branches learn from, %": ["Multiline", ["drop/learning_rows$", "freeze/learning_rows$"]],
        "frozen parameters, %": ["Multiline", ["drop/frozen_parameters$", "freeze/frozen_parameters$"]],
        "drop rate": ["Multiline", ["rdp/rate$"]],
    },
    "Feature reuse": {"reused and recreated": ["Multiline", ["feature_reuse/reused$", "feature_reuse/recreated$"]]},
}
"""Categories of the Custom Scalars tab, the charts of each, and their tags as regular expressions."""

SORTED_BY = (
    *("test/top1", "test/loss", "train/loss", "feature_reuse/reused"),
    *("final/relative_flops", "final/train_seconds"),
)
"""Whose last values are columns of the HParams tab."""


def of_phase(tag: str, phase: Phase) -> str:
    """The tag of `tag` in one phase only, such as "drop/loss"."""
    return f"{phase.name.lower()}/{tag.split('/')[-1]}"


def describe(tag: str) -> str:
    """What TensorBoard says beside a chart or a picture, in Markdown."""
    if tag in TAGS:
        return TAGS[tag]
    for phase in Phase:
        for whole in BY_PHASE:
            if tag == of_phase(whole, phase):
                return f"In {phase.name} steps alone. {TAGS[whole]}"
    group, _, name = tag.partition("/")
    if group == "test_ema":
        return f"Of the moving average of the weights. {describe(f'test/{name}')}"
    return "At the end of the run." if group == "final" else "Given by the training loop."
