"""Demo assets made by code: a small Qwen3 model trained on the spot, sample data sets and prompts."""

from ascend_kit.demo.assets import cache_root, cached_model, ensure_data, ensure_model, resolve

__all__ = ["cache_root", "cached_model", "ensure_data", "ensure_model", "resolve"]
