"""Does the model still answer correctly? lm-eval over the engine, local data, paired comparison of runs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """`from ascend_kit import evaluate` finds this package once any of its modules was imported, and the
    function of the same name before that; calling either must do the same.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from ascend_kit.evaluate.harness import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
