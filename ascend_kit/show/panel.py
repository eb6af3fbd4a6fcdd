"""A form over the parameters in JupyterLab: edit, check, save as YAML. Headless: what is not default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from ascend_kit.files import write_atomic
from ascend_kit.params import Experiment, ParameterError, build_experiment, parse_overrides
from ascend_kit.show.progress import in_browser
from ascend_kit.show.tables import readable

if TYPE_CHECKING:
    import pandas

# Title -> first parameter of the group; a group reaches to the next one's first.
GROUPS = {
    "Run": "experiment",
    "Model": "model_name",
    "Device": "device",
    "Engine": "max_seq_length",
    "Generation": "prompts_file",
    "Sweep": "sweep_concurrency",
    "Evaluation": "eval_datasets",
    "Comparison": "compare_runs",
}


class ParameterPanel:
    """Shows an experiment's parameters; `experiment` is the last state that passed the check."""

    def __init__(self, experiment: Experiment, *, browser: bool | None = None) -> None:
        self.experiment = experiment
        self._browser = in_browser() if browser is None else browser
        self._fields: dict[str, Any] = {}
        self._message: Any = None
        self._path: Any = None

    def table(self) -> pandas.DataFrame:
        """Value and meaning of every parameter that is not at its default."""
        import pandas

        defaults = build_experiment({})

        rows = [
            {
                "group": title,
                "parameter": key,
                "value": _as_text(getattr(self.experiment, key)),
                "default": _as_text(getattr(defaults, key)),
                "meaning": Experiment.model_fields[key].description,
            }
            for title, keys in grouped().items()
            for key in keys
            if getattr(self.experiment, key) != getattr(defaults, key)
        ]
        return pandas.DataFrame(rows)

    def check(self) -> str:
        """Validate the fields as they stand; returns the message that the form shows."""
        try:
            self.experiment = build_experiment(self.values())
        except ParameterError as error:
            return f"not valid: {error}"
        return f"fine: results go to {self.experiment.run_folder}"

    def values(self) -> dict[str, Any]:
        """What the fields hold, texts read as YAML. ParameterError for text that is not YAML."""
        values = {}
        for key, field in self._fields.items():
            is_text = isinstance(field.value, str) and not _choices(key)
            values[key] = parse_overrides([f"{key}={field.value}"])[key] if is_text else field.value
        return values or self.experiment.model_dump()

    def save(self, path: str | Path) -> str:
        """Check, then write the parameters that differ from the defaults to `path`."""
        message = self.check()
        if not message.startswith("fine"):
            return message
        defaults = build_experiment({}).model_dump()
        changed = {key: value for key, value in self.experiment.model_dump().items() if value != defaults[key]}
        write_atomic(Path(path), yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))
        return f"written to {path}; run it with: python -m ascend_kit run {path}"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        table = readable(self.table())
        if not self._browser:
            display(table)
            return
        # A reader without a kernel cannot draw the form and takes the table that stands beside it.
        form = self.widget()._repr_mimebundle_()
        fallback = {"text/html": table.data if table else "", "text/plain": self.table().to_string()}
        display({**form, **fallback}, raw=True)

    def widget(self) -> Any:
        """The form as an ipywidgets box."""
        import ipywidgets as w

        pages = [w.VBox([self._row(w, key) for key in keys]) for keys in grouped().values()]
        tabs = w.Tab(children=pages, titles=list(GROUPS))
        self._message = w.Label()
        self._path = w.Text(value=f"params/{self.experiment.experiment}-new.yaml", description="file")
        check, save = w.Button(description="Check"), w.Button(description="Save as YAML")
        check.on_click(lambda _: self._say(self.check()))
        save.on_click(lambda _: self._say(self.save(self._path.value)))
        return w.VBox([tabs, w.HBox([check, save, self._path]), self._message])

    def _say(self, message: str) -> None:
        self._message.value = message

    def _row(self, w: Any, key: str) -> Any:
        value, choices = getattr(self.experiment, key), _choices(key)
        if choices:
            field = w.Dropdown(options=choices, value=value)
        elif isinstance(value, bool):
            field = w.Checkbox(value=value, indent=False)
        else:
            field = w.Text(value=_as_text(value))
        self._fields[key] = field
        name = w.Label(key, layout={"width": "180px"})
        return w.HBox([name, field, w.Label(Experiment.model_fields[key].description or "")])


def grouped() -> dict[str, list[str]]:
    """Group title -> its parameters, in the order of the Experiment."""
    titles = {first: title for title, first in GROUPS.items()}
    groups: dict[str, list[str]] = {}
    title = next(iter(GROUPS))
    for key in Experiment.model_fields:
        title = titles.get(key, title)
        groups.setdefault(title, []).append(key)
    return groups


def _choices(key: str) -> list[str]:
    """Allowed words of a parameter that is a choice, else nothing."""
    annotation = Experiment.model_fields[key].annotation
    return [word for word in get_args(annotation) if isinstance(word, str)]


def _as_text(value: Any) -> str:
    """The value in one line of YAML, as a person would write it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
