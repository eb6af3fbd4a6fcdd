"""Demo assets made by code: a small Qwen3 model trained on the spot, sample data sets and prompts."""

from ascend_kit.demo.assets import cache_root, cached_model, ensure_data, ensure_model, resolve

# Shown wherever scores of the demo appear.
DEMO_SCORES_NOTE = (
    "These scores come from a tiny model trained for a minute on questions written for this project, part of "
    "the test questions included. They demonstrate the pipeline and nothing else."
)

__all__ = ["DEMO_SCORES_NOTE", "cache_root", "cached_model", "ensure_data", "ensure_model", "resolve"]
